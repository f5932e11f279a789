"""``maskgit import-jax``: a pretrained folder from checkpoints of the released JAX code."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.importers.files import check_flax_file, check_out, read_class_names

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-jax",
        help="make a pretrained folder from released JAX checkpoints",
        description="Make a pretrained folder, as training writes it, from checkpoints of google-research/maskgit.",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="e.g. tokenizer_imagenet256_checkpoint"
    )
    parser.add_argument("--transformer", type=Path, metavar="FILE", help="e.g. maskgit_imagenet256_checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the pretrained folder")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="256|512",
        help="edge of the images in px (default: what the transformer's grid says; 256 without a transformer)",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="names of the classes, one a line (default: ImageNet's where there are 1000, else numbers)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads, checks and writes."""
    check_out(args.out)
    check_flax_file(args.tokenizer)
    if args.transformer is not None:
        check_flax_file(args.transformer)
    class_names = None if args.class_names is None else read_class_names(args.class_names)
    from maskgit_pl.importers.released import import_jax

    import_jax(
        args.tokenizer, args.out, transformer=args.transformer, image_size=args.image_size, class_names=class_names
    )
    return 0

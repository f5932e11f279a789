"""``maskgit import-jax``: converts checkpoints of the released JAX code to a pretrained folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.import_flags import add_class_names_argument, add_out_argument, read_class_names_flag
from maskgit_pl.importers.files import check_flax_file, check_out

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-jax",
        help="convert released JAX checkpoints to a pretrained folder",
        description="Convert checkpoints of google-research/maskgit to a pretrained folder. Nothing in them is "
        "executed.",
        epilog="Example: maskgit import-jax --tokenizer tokenizer_imagenet256_checkpoint --transformer "
        "maskgit_imagenet256_checkpoint --out pretrained/imagenet256",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="such as tokenizer_imagenet256_checkpoint"
    )
    parser.add_argument("--transformer", type=Path, metavar="FILE", help="such as maskgit_imagenet256_checkpoint")
    add_out_argument(parser)
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="256|512",
        help="side of the images in pixels (default: from the transformer's grid; 256 without a transformer)",
    )
    add_class_names_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Reads the checkpoints, checks them and writes the folder."""
    check_out(args.out)
    check_flax_file(args.tokenizer)
    if args.transformer is not None:
        check_flax_file(args.transformer)
    class_names = read_class_names_flag(args)
    from maskgit_pl.importers.released import import_jax

    import_jax(
        args.tokenizer, args.out, transformer=args.transformer, image_size=args.image_size, class_names=class_names
    )
    return 0

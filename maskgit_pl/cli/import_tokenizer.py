"""``maskgit import-tokenizer``: converts a tokenizer that others released to a pretrained folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.flags import check_at_least
from maskgit_pl.cli.import_flags import add_out_argument
from maskgit_pl.importers.files import TOKENIZER_LAYOUTS, check_out, check_torch_file, find_weights

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-tokenizer",
        help="convert a released tokenizer, such as taming-transformers' or MaskBit's",
        description=f"Convert a tokenizer of {', '.join(TOKENIZER_LAYOUTS)} to DIR/tokenizer, and print what was read. "
        "Nothing in the checkpoint is executed.",
        epilog="Example: maskgit import-tokenizer vqgan_imagenet_f16_1024.ckpt --out pretrained/taming",
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="checkpoint: .ckpt, .pt, .bin or .safetensors, or a folder that diffusers saved",
    )
    add_out_argument(parser, "pretrained folder; DIR/tokenizer is written")
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="PIXELS", help="side of the images in pixels (default: 256)"
    )
    parser.add_argument(
        "--layout",
        choices=TOKENIZER_LAYOUTS,
        help="project that wrote the file (default: by the names of its tensors); IBQ and taming-transformers have the "
        "same names",
    )
    parser.add_argument(
        "--signed-images",
        action=argparse.BooleanOptionalAction,
        help="the network expects images in [-1, 1]; with --no-signed-images, in [0, 1] (default: as in the published "
        "networks; only those of taming-transformers, LlamaGen, diffusers and IBQ have the choice)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints a report."""
    check_out(args.out)
    check_torch_file(find_weights(args.file))
    check_at_least(args, image_size=1)
    from maskgit_pl.importers.tokenizers import import_tokenizer

    imported = import_tokenizer(
        args.file, args.out, image_size=args.image_size, layout=args.layout, signed_images=args.signed_images
    )
    print(imported.report(args.image_size))
    return 0

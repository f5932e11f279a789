"""``maskgit import-taming``: converts a tokenizer of taming-transformers or LlamaGen to a pretrained folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.flags import check_at_least
from maskgit_pl.importers.files import check_out, check_torch_file

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-taming",
        help="convert a tokenizer of taming-transformers or LlamaGen",
        description="Convert a VQGAN of taming-transformers or LlamaGen to DIR/tokenizer, and print what was read. "
        "Nothing in the checkpoint is executed.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint: .ckpt, .pt or .safetensors")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="pretrained folder; DIR/tokenizer is written"
    )
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="PIXELS", help="edge of the images in pixels (default: 256)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints a report."""
    check_out(args.out)
    check_torch_file(args.file)
    check_at_least(args, image_size=1)
    from maskgit_pl.importers.taming import import_taming

    print(import_taming(args.file, args.out, image_size=args.image_size).report(args.image_size))
    return 0

"""``maskgit import-taming``: a tokenizer of taming-transformers or LlamaGen as a pretrained folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.importers.files import check_out, check_torch_file

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("import-taming", help="import a tokenizer of taming-transformers or LlamaGen")
    parser.add_argument("file", type=Path, metavar="FILE", help="its .ckpt, .pt or .safetensors file")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="pretrained folder: DIR/tokenizer is made"
    )
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="PIXELS", help="edge of the images (default: 256)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Imports, and prints what was written."""
    check_out(args.out)
    check_torch_file(args.file)
    if args.image_size < 1:
        raise ValueError(f"--image-size: at least 1 is needed, got {args.image_size}")
    from maskgit_pl.importers.taming import import_taming

    print(import_taming(args.file, args.out, image_size=args.image_size).report(args.image_size))
    return 0

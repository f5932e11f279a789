"""``maskgit import-transformer``: converts a transformer of Halton-MaskGIT or MaskGIL to a pretrained folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.cli.flags import check_at_least
from maskgit_pl.cli.import_flags import add_class_names_argument, add_out_argument, read_class_names_flag
from maskgit_pl.importers.files import check_out, check_torch_file

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "import-transformer",
        help="convert a transformer of Halton-MaskGIT or MaskGIL",
        description="Convert a transformer of Halton-MaskGIT or MaskGIL and its tokenizer to a pretrained folder, and "
        "print what was read. Nothing in the checkpoint is executed.",
        epilog="Example: maskgit import-transformer ImageNet_384_large.pth --tokenizer pretrained/llamagen "
        "--out pretrained/halton-384",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint, such as ImageNet_384_large.pth")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of its tokenizer, as maskgit import-tokenizer writes it",
    )
    add_out_argument(parser)
    parser.add_argument(
        "--num-heads",
        type=int,
        metavar="N",
        help="attention heads, for a network of another size than the published ones",
    )
    add_class_names_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts the checkpoint and prints a report."""
    check_out(args.out)
    check_torch_file(args.file)
    check_at_least(args, num_heads=1)
    names = read_class_names_flag(args)
    from maskgit_pl.importers.transformers import import_transformer

    imported = import_transformer(
        args.file, args.out, tokenizer=args.tokenizer, num_heads=args.num_heads, class_names=names
    )
    print(imported.report())
    return 0

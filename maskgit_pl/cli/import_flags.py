"""Flags that the commands of importers share."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.importers.files import read_class_names

__all__ = ["add_class_names_argument", "add_out_argument", "read_class_names_flag"]


def add_out_argument(parser: argparse.ArgumentParser, text: str = "pretrained folder to write") -> None:
    """Adds ``--out``, which ``importers.files.check_out`` checks."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)


def add_class_names_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--class-names``, which ``read_class_names_flag`` reads."""
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="file with one class name per line (default: ImageNet's names for 1000 classes, else numbers)",
    )


def read_class_names_flag(args: argparse.Namespace) -> list[str] | None:
    """Returns the class names of ``--class-names``, or None without it."""
    return None if args.class_names is None else read_class_names(args.class_names)

"""``maskgit edit``: what is in a part of an image becomes something of another class."""

from __future__ import annotations

import argparse

from maskgit_pl.cli.inpaint import add_region_arguments, run

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser("edit", help="generate a part of an image anew, as a class", allow_abbrev=False)
    add_region_arguments(parser, class_required=True)
    parser.set_defaults(run=run)

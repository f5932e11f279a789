"""Tables on the terminal: rows of plain values, or the same rows as JSON for programs."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from maskgit_pl.text import printable

__all__ = ["add_json_argument", "print_rows"]


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag ``--json`` of the commands that print a table."""
    parser.add_argument("--json", action="store_true", help="print JSON, a list of objects, instead of the table")


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Prints rows that have the same keys.

    Args:
        rows: One mapping a row; the keys are the columns.
        as_json: True to print a JSON list of objects, with unchanged values.
    """
    if as_json:
        print(json.dumps([dict(row) for row in rows], indent=1))
        return
    # Names of packages and files are untrusted: no control characters.
    cells = [[column.replace("_", " ") for column in rows[0]] if rows else []]
    cells += [[printable(str(value)) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Only a terminal cuts a line; a file and a pipe have the whole text.
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for line in cells:
        text = "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        print(text if len(text) <= limit else f"{text[: limit - 3]}...")

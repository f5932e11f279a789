"""Compares this project with a folder of arrays recorded from the released code; the README beside it says how.

    python tests/golden/check.py tests/golden            # every array of every file
    python tests/golden/check.py --full tests/golden     # and the full-size models (a minute or two, 0.7 GB of disk)

Exit codes: 0 everything agrees, 1 something is off or was not compared, 2 the folder cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from comparators.every import check_folder
from comparators.folder import FolderError
from comparators.full import check_full

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each array, what else is wrong, and the count; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare this project with arrays recorded from the released code.")
    parser.add_argument("folder", type=Path, help="folder with a manifest.json")
    parser.add_argument("--full", action="store_true", help="also compare the full-size models of FOLDER/full")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order
    try:
        report = check_folder(arguments.folder)
        if arguments.full:
            report += check_full(arguments.folder / "full")
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for comparison in report.comparisons:
        print(comparison)
    for problem in report.problems:
        print(f"OFF {problem}")
    print(report.summary())
    return 0 if report.agrees else 1


if __name__ == "__main__":
    sys.exit(main())

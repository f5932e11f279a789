"""``maskgit export``: a checkpoint of a run as a pretrained folder, whatever ranks wrote it."""

from __future__ import annotations

import argparse
from pathlib import Path

from maskgit_pl.runs.exporting import export
from maskgit_pl.runs.recipe_files import STAGES

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint's averaged weights as a pretrained folder",
        description="Write a checkpoint's averaged weights as a pretrained folder (safetensors and JSON), as training "
        "does at its end. Checkpoints of any number of ranks are read, on a CPU.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME)")
    parser.add_argument("--stage", choices=STAGES, help="only this stage (default: each that has a checkpoint)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's shards, if they lie elsewhere now")
    parser.add_argument("--out", type=Path, metavar="DIR", help="pretrained folder (default: RUN/pretrained)")
    parser.add_argument("--replace", action="store_true", help="in place of what an earlier export wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports."""
    export(args.folder, stage=args.stage, step=args.step, data=args.data, out=args.out, replace=args.replace)
    return 0

"""``maskgit export``: writes a checkpoint as a pretrained folder. Any number of ranks may have written it."""

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
        help="write the EMA weights of a checkpoint as a pretrained folder",
        description="Write the EMA weights of a checkpoint as a pretrained folder (safetensors and JSON), as training "
        "does at its end. Reads checkpoints of any number of ranks, on one CPU.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME)")
    parser.add_argument(
        "--stage", choices=STAGES, help="export only this stage (default: every stage that has a checkpoint)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder, if it has moved since the training")
    parser.add_argument("--out", type=Path, metavar="DIR", help="pretrained folder (default: RUN/pretrained)")
    parser.add_argument("--replace", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports the checkpoint."""
    export(args.folder, stage=args.stage, step=args.step, data=args.data, out=args.out, replace=args.replace)
    return 0

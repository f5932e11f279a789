"""``--negative-model``, the flag of every command that generates images with a single model."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_negative_model_argument", "check_negative_model_flag"]


def add_negative_model_argument(parser: argparse._ActionsContainer) -> None:
    """Adds ``--negative-model``."""
    parser.add_argument(
        "--negative-model",
        type=Path,
        metavar="DIR",
        help="weaker model that guidance moves away from, such as an early checkpoint of the run: a run or a folder of "
        "`maskgit export` (default: that of decoding.json, or none)",
    )


def check_negative_model_flag(args: argparse.Namespace) -> None:
    """Checks that ``--negative-model`` names a folder with a transformer, before torch is imported."""
    if args.negative_model is None:
        return
    from maskgit_pl.pipeline.sharing import find_transformer

    try:
        find_transformer(args.negative_model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--negative-model{str(error).removeprefix('negative_model')}") from error

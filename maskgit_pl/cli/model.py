"""The model that a command uses: the argument that names it, its facts without torch, and the model itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.cli.flags import read_device_flag

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["add_classes_argument", "add_model_argument", "find_model", "open_pipe"]


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that names the model."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="run folder (runs/NAME), pretrained folder, or owner/name on the Hub"
    )


def add_classes_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that names classes."""
    parser.add_argument(
        "--classes", default="all", metavar="A,B,...", help="numbers or names, or all (default: all, at most 10)"
    )


def find_model(args: argparse.Namespace) -> tuple[Path, Outline]:
    """Returns the folder with ``tokenizer/`` and ``transformer/`` of the model, and its facts, without torch."""
    from maskgit_pl.pipeline.outline import Outline
    from maskgit_pl.pipeline.sharing import find_folder

    folder = find_folder(args.folder)
    outline = Outline.read(folder)
    if outline is None:  # loading the model says what is wrong with it
        from maskgit_pl.pipeline import MaskGIT

        outline = MaskGIT.from_pretrained(folder).outline
    return folder, outline


def open_pipe(folder: Path, args: argparse.Namespace, *, device: str | None = None) -> MaskGIT:
    """Loads the model to the device that ``--device`` names, with a transformer of 8 bits if ``--int8`` asks for it.

    Args:
        folder: The folder with ``tokenizer/`` and ``transformer/``.
        args: The flags of ``decoding.add_decoding_arguments``.
        device: Default in place of the usual one.
    """
    place = read_device_flag(args, default="cpu" if args.int8 else device)
    from maskgit_pl.pipeline import MaskGIT

    pipe = MaskGIT.from_pretrained(folder).to(place)
    return pipe.quantize() if args.int8 else pipe

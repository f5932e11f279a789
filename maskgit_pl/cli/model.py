"""The model of a command: its argument, its sizes and classes read without torch, and the loaded pipeline."""

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
    """Adds the positional argument RUN that names the model."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo, a model in the "
        "package",
    )


def add_classes_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--classes``."""
    parser.add_argument(
        "--classes", default="all", metavar="A,B,...", help="class names or indices, or all (default: all, at most 10)"
    )


def find_model(args: argparse.Namespace) -> tuple[Path, Outline]:
    """Returns the folder with ``tokenizer/`` and ``transformer/``, and the model's outline, without torch."""
    from maskgit_pl.pipeline.outline import Outline
    from maskgit_pl.pipeline.sharing import find_folder

    folder = find_folder(args.folder)
    outline = Outline.read(folder)
    if outline is None:  # a damaged folder: loading the model raises the error that names the fault
        from maskgit_pl.pipeline import MaskGIT

        outline = MaskGIT.from_pretrained(folder).outline
    return folder, outline


def open_pipe(folder: Path, args: argparse.Namespace, *, device: str | None = None) -> MaskGIT:
    """Loads the model to the device of ``--device``, with the arithmetic of ``--dtype`` or ``--int8``.

    Args:
        folder: The folder with ``tokenizer/`` and ``transformer/``.
        args: Flags of ``decoding_flags.add_decoding_arguments``.
        device: Default device; None for a GPU if there is one, else the CPU.
    """
    # int8 works on the CPU only, so it is the default device with --int8.
    place = read_device_flag(args, default="cpu" if args.int8 else device)
    from maskgit_pl.devices import parse_dtype
    from maskgit_pl.pipeline import MaskGIT

    pipe = MaskGIT.from_pretrained(
        folder,
        decoding=args.decoding,
        negative_model=args.negative_model,
        device=place,
        dtype=parse_dtype(args.dtype, place),
    )
    return pipe.quantize() if args.int8 else pipe

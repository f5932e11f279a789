"""Flags and steps that the commands share which use a trained model: where it is, its facts, its device, its flags."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.outline import Outline

__all__ = [
    "add_classes_argument",
    "add_device_argument",
    "add_model_argument",
    "check_at_least",
    "device_of",
    "find_model",
    "naming_flags",
    "open_pipe",
    "read_outline",
]


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


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that ``device_of`` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: a GPU if there is one)")


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Refuses numbers that are too small, or not finite; None is a flag that was left out.

    Args:
        args: The flags.
        least: By the name of the flag, such as ``num_steps=1`` for ``--num-steps``.

    Raises:
        ValueError: with the first of them.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: at least {bound} is needed, got {value}")


@contextmanager
def naming_flags(args: argparse.Namespace) -> Iterator[None]:
    """Makes an error that begins with the name of a setting (``num_steps: ...``) begin with its flag.

    Args:
        args: The flags.

    Raises:
        TypeError: as what is raised inside.
        ValueError: as what is raised inside.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        name = re.split(r"[^a-z_]", str(error), maxsplit=1)[0]
        is_flag = name in args and not callable(getattr(args, name))  # ``run`` is the command itself
        if not is_flag:  # the error is of something else, and stays as it was raised
            raise
        text = f"--{name.replace('_', '-')}" + str(error).removeprefix(name)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error


def find_model(args: argparse.Namespace) -> tuple[Path, Outline]:
    """Finds the model that the command names, and reads its facts, without torch.

    Returns:
        The folder with ``tokenizer/`` and ``transformer/``, and its outline.

    Raises:
        FileNotFoundError: if there is no such run, or a stage of it is missing.
        ValueError: if a file of it is not as it must be.
    """
    from maskgit_pl.pipeline.sharing import find_folder

    folder = find_folder(args.folder)
    return folder, read_outline(folder)


def read_outline(folder: Path) -> Outline:
    """Reads the facts of the model in a folder with ``tokenizer/`` and ``transformer/``.

    Raises:
        ValueError: if a file of it is not as it must be.
    """
    from maskgit_pl.pipeline.outline import Outline

    outline = Outline.read(folder)
    if outline is None:  # loading the model says what is wrong with it
        from maskgit_pl.pipeline import MaskGIT

        return MaskGIT.from_pretrained(folder).outline
    return outline


def device_of(args: argparse.Namespace, *, default: str | None = None) -> str:
    """Returns the device that ``--device`` names, checked to be there; the default, or a GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    from maskgit_pl.devices import check_device, default_device

    if args.device is None:
        return default or default_device()
    return str(check_device(args.device, name="--device"))


def open_pipe(folder: Path, args: argparse.Namespace, *, device: str | None = None) -> MaskGIT:
    """Loads the model to the device that ``--device`` names, with a transformer of 8 bits if ``--int8`` asks for it.

    Args:
        folder: The folder with ``tokenizer/`` and ``transformer/``.
        args: The flags of ``decoding.add_decoding_arguments``.
        device: Default in place of the usual one.

    Raises:
        ValueError: if there is no such device, or a file of the folder is not as it must be.
    """
    place = device_of(args, default="cpu" if args.int8 else device)
    from maskgit_pl.pipeline import MaskGIT

    pipe = MaskGIT.from_pretrained(folder).to(place)
    return pipe.quantized() if args.int8 else pipe

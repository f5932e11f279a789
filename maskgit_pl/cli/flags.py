"""Flags that many commands share, and checks of their values. Imported by the other files of flags."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskgit_pl.files import check_writable
from maskgit_pl.image_format import is_image_file_name

__all__ = [
    "FOLDER",
    "add_device_argument",
    "add_dtype_argument",
    "check_at_least",
    "check_outputs",
    "format_flag",
    "make_folder",
    "read_device_flag",
    "use_flag_names",
]

FOLDER = ""  # used in place of a file suffix


def add_device_argument(parser: argparse.ArgumentParser, *, default: str = "a GPU if there is one") -> None:
    """Adds ``--device``, which ``read_device_flag`` reads; the help names the default."""
    parser.add_argument("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps ... (default: {default})")


def add_dtype_argument(parser: argparse._ActionsContainer, *, of: str) -> None:
    """Adds ``--dtype``, the arithmetic of what ``of`` names; ``devices.parse_dtype`` reads it."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        help=f"arithmetic of {of}; auto: bfloat16 on devices with instructions for it, else float32 "
        "(default: that of the weights)",
    )


def read_device_flag(args: argparse.Namespace, *, default: str | None = None) -> str:
    """Returns the device of ``--device`` if it is available; without the flag, ``default`` or a GPU or the CPU."""
    from maskgit_pl.devices import check_device, default_device

    if args.device is None:
        return default or default_device()
    return str(check_device(args.device, name="--device"))


def format_flag(name: str) -> str:
    """Returns the flag of a setting, such as ``--num-steps`` for ``num_steps``."""
    return f"--{name.replace('_', '-')}"


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Checks lower bounds of numbers. A flag that is not given (None) is not checked.

    Args:
        args: Parsed flags.
        least: Smallest allowed value of each flag, such as ``num_steps=1`` for ``--num-steps``.

    Raises:
        ValueError: if a number is smaller, or not finite.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            raise ValueError(f"{format_flag(name)} must be >= {bound}, got {value}")


def check_outputs(args: argparse.Namespace, **endings: str) -> None:
    """Checks, before any work, that outputs can be written, are no inputs, and have the suffix of their format.

    Args:
        args: Parsed flags. One that is not given (None) is not checked.
        endings: Suffix of each flag's file, such as ``.png``; ``FOLDER`` for a folder.

    Raises:
        ValueError: if a suffix is wrong, two flags name the same file, an output is a file that the command reads, or
            an output cannot be written (``files.check_writable``).
    """
    values = [value for name, value in vars(args).items() if name not in endings]
    inputs = {os.path.realpath(each) for each in values if isinstance(each, Path) and each.is_file()}
    named: dict[str, str] = {}
    for name, ending in endings.items():
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        if ending != FOLDER and path.suffix.lower() != ending:
            raise ValueError(f"{format_flag(name)} must end in {ending}, got {path}")
        real = os.path.realpath(path)
        if real in named:
            raise ValueError(f"{format_flag(name)} must differ from {named[real]}, got {path} for both")
        named[real] = format_flag(name)
        lost = [
            each
            for each in inputs
            if each == real
            or (ending == FOLDER and os.path.dirname(each) == real and is_image_file_name(os.path.basename(each)))
        ]
        if lost:
            raise ValueError(
                f"{format_flag(name)} must not overwrite a file that the command reads, got {path} and {lost[0]}; give "
                f"another {format_flag(name)}"
            )
        check_writable(format_flag(name), path, is_folder=ending == FOLDER)


def make_folder(folder: Path) -> None:
    """Makes a missing folder and prints its name."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: new folder")


@contextmanager
def use_flag_names(args: argparse.Namespace) -> Iterator[None]:
    """Makes a TypeError or ValueError that begins with a setting (``num_steps must ...``) begin with its flag.

    Library functions name their own arguments in errors. The user of a command knows the flags. A positional argument,
    such as the source of ``data make``, keeps its name.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        # "num_steps must be ..." -> num_steps; "height of the image must ..." -> height, no flag of the command.
        name = re.split(r"[^a-z_]", str(error), maxsplit=1)[0]
        if format_flag(name).removeprefix("--") not in args.flags:  # the error is about something else
            raise
        text = format_flag(name) + str(error).removeprefix(name)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error

"""Flags that many commands have, and the checks of their values. Imported by the other files of flags."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskgit_pl.files import check_writable

__all__ = [
    "FOLDER",
    "add_device_argument",
    "check_at_least",
    "check_outputs",
    "format_flag",
    "make_folder",
    "read_device_flag",
    "use_flag_names",
]

FOLDER = ""  # in place of a file's ending


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that ``read_device_flag`` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: a GPU if there is one)")


def read_device_flag(args: argparse.Namespace, *, default: str | None = None) -> str:
    """Returns the device that ``--device`` names, checked to be there; the default, or a GPU if there is one."""
    from maskgit_pl.devices import check_device, default_device

    if args.device is None:
        return default or default_device()
    return str(check_device(args.device, name="--device"))


def format_flag(name: str) -> str:
    """Returns the flag of a setting: ``--num-steps`` for ``num_steps``."""
    return f"--{name.replace('_', '-')}"


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
            raise ValueError(f"{format_flag(name)}: at least {bound} is needed, got {value}")


def check_outputs(args: argparse.Namespace, **endings: str) -> None:
    """Refuses outputs that cannot be written, or whose name says another format than what is written.

    Args:
        args: The flags. One that was left out (None) is not checked.
        endings: The ending of each flag's file; ``FOLDER`` for a folder.

    Raises:
        ValueError: if two flags name the same file; see also ``files.check_writable``.
    """
    named: dict[Path, str] = {}
    for name, ending in endings.items():
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        if ending != FOLDER and path.suffix.lower() != ending:
            raise ValueError(f"{format_flag(name)} must end in {ending}, got {path}")
        if path.absolute() in named:
            raise ValueError(f"{format_flag(name)} must differ from {named[path.absolute()]}, got {path} for both")
        named[path.absolute()] = format_flag(name)
        check_writable(format_flag(name), path, is_folder=ending == FOLDER)


def make_folder(folder: Path) -> None:
    """Makes a folder that is not there, and says so."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: new folder")


@contextmanager
def use_flag_names(args: argparse.Namespace) -> Iterator[None]:
    """Makes a TypeError or ValueError that begins with a setting (``num_steps: ...``) begin with its flag."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name = re.split(r"[^a-z_]", str(error), maxsplit=1)[0]
        is_flag = name in args and not callable(getattr(args, name))  # ``run`` is the command itself
        if not is_flag:  # the error is of something else, and stays as it was raised
            raise
        text = format_flag(name) + str(error).removeprefix(name)
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error

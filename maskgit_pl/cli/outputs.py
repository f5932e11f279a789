"""The files that commands write: their names and folders are checked before any work is done."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

__all__ = ["check_outputs", "made_folder"]

_FOLDER = ""
_PICTURES = {"out": ".png", "gif": ".gif", "filmstrip": ".png", "images": _FOLDER}


def check_outputs(args: argparse.Namespace, **endings: str) -> None:
    """Refuses outputs that cannot be written, or whose name says another format than what is written.

    Args:
        args: The flags. One that was left out (None) is not looked at.
        endings: The ending of each flag's file, an empty one for a folder; by default those of the commands that
            generate: ``out``, ``gif``, ``filmstrip`` and ``images``.

    Raises:
        ValueError: if a name has another ending, two flags name the same file, a file is named where there is a folder
            or the other way round, or the nearest folder that exists cannot be written to.
    """
    named: dict[Path, str] = {}
    for name, ending in (endings or _PICTURES).items():
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if path.suffix.lower() != ending and ending != _FOLDER:
            raise ValueError(f"{flag} must end in {ending}, got {path}")
        if path.absolute() in named:
            raise ValueError(f"{flag} must differ from {named[path.absolute()]}, got {path} for both")
        named[path.absolute()] = flag
        _check_place(flag, path, is_folder=ending == _FOLDER)


def _check_place(flag: str, path: Path, *, is_folder: bool) -> None:
    if path.exists() and path.is_dir() != is_folder:
        here, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise ValueError(f"{flag} must be a {wanted}, got the {here} {path}")
    folder = path if is_folder else path.parent
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions do not say it of every file system
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} must lie in a folder that can be written to, got {path} ({existing}: {error.strerror})"
        ) from error


def made_folder(folder: Path) -> None:
    """Makes a folder that is not there, and says so."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{folder}: new folder")

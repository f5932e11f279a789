"""Class names that a user gives, and class names of an existing data folder. Used by ``maskgit data``."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from maskgit_pl.checks import shorten
from maskgit_pl.data.manifest import read_manifest_summary

__all__ = ["find_class_names", "parse_class_names"]

_MAX_BYTES = 2**24  # of a file with class names


def parse_class_names(given: str) -> list[str]:
    """Parses class names, in the order of their labels.

    Args:
        given: Names separated by commas, or the path of a UTF-8 file with one name per line.

    Raises:
        ValueError: if a name is empty or repeated, or the file is too large or not text.
    """
    is_file = os.path.isfile(given)  # Path.is_file() raises an error if many names make a path that is too long
    names = _read_lines(Path(given)) if is_file else [name.strip() for name in given.split(",")]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if not all(names) or doubled:
        raise ValueError(f"class names must be unique and not empty, got {shorten(doubled[0] if doubled else given)}")
    return names


def _read_lines(file: Path) -> list[str]:
    with open(file, "rb") as stream:
        text = stream.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"class names {file} must have at most {_MAX_BYTES} bytes")
    try:
        lines = text.decode("utf-8-sig").splitlines()  # Windows writes a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"class names {file} must be UTF-8 text, one name per line: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def find_class_names(folder: Path) -> list[str] | None:
    """Returns the class names of a data folder's manifests.

    Returns:
        The names; None if there is no valid manifest, or its names are only numbers or one name.
    """
    try:
        names = read_manifest_summary(folder).classes
    except (FileNotFoundError, ValueError):
        return None
    # Numbers and the name of unlabelled data were not given by a user.
    return None if names == tuple(map(str, range(len(names)))) or len(names) == 1 else list(names)

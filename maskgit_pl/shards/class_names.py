"""Class names: those that a user gives, and those that a data folder has already. Used by ``maskgit data``."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from maskgit_pl.checks import shorten
from maskgit_pl.shards.manifest import read_manifest_summary

__all__ = ["find_class_names", "parse_class_names"]

_MAX_BYTES = 2**24  # of a file


def parse_class_names(given: str) -> list[str]:
    """Reads class names in the order of their labels.

    Args:
        given: Names after commas, or the path of a UTF-8 file with one name a line.

    Raises:
        ValueError: if a name is empty or comes twice, or the file is too large or not text.
    """
    is_file = os.path.isfile(given)  # False for many names, which Path.is_file() finds too long for a path
    names = _read_lines(Path(given)) if is_file else [name.strip() for name in given.split(",")]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if not all(names) or doubled:
        raise ValueError(f"class names: each once and none empty, got {shorten(doubled[0] if doubled else given)}")
    return names


def _read_lines(file: Path) -> list[str]:
    with open(file, "rb") as stream:
        text = stream.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"class names {file} must have at most {_MAX_BYTES} bytes")
    try:
        lines = text.decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"class names {file} must be UTF-8 text, one name a line: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def find_class_names(folder: Path) -> list[str] | None:
    """Returns the class names of a data folder's manifests; None if there are none, or only numbers."""
    try:
        names = read_manifest_summary(folder).classes
    except (FileNotFoundError, ValueError):
        return None  # none yet, or none that can be read
    return None if names == tuple(map(str, range(len(names)))) or len(names) == 1 else list(names)

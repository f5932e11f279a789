"""The check of a shard for which there is time before each run: its length, and headers at both ends.

Used by ``manifest``; ``verify`` reads everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maskgit_pl.files import open_regular
from maskgit_pl.shards.tar import BLOCK, header_size

__all__ = ["find_fault"]


def find_fault(path: Path, size: int, rows: npt.NDArray[np.void]) -> str | None:
    """Compares the length and the first and last headers of a shard with what its manifest says.

    Args:
        path: The shard.
        size: Its bytes.
        rows: Its rows of the index.

    Returns:
        The difference in a few words; None if there is none.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        return f"{size} bytes expected, {error.strerror}"
    try:
        return _fault_of(descriptor, size, rows)
    except OSError as error:
        return f"{size} bytes expected, {error.strerror}"
    finally:
        os.close(descriptor)


def _fault_of(descriptor: int, size: int, rows: npt.NDArray[np.void]) -> str | None:
    actual = os.fstat(descriptor).st_size
    if actual != size:
        return f"{size} bytes expected, {actual} found"
    for offset, length in _ends(rows):
        found = header_size(os.pread(descriptor, BLOCK, offset))
        if found is None or length not in (None, found):
            stated = "" if length is None else f" of {length} bytes"
            actual_length = "none" if found is None else f"one of {found} bytes"
            return f"a member{stated} expected at byte {offset}, {actual_length} found; changed after indexing"
    return None


def _ends(rows: npt.NDArray[np.void]) -> Iterator[tuple[int, int | None]]:
    """Yields places of headers, of the first member and of the first and last image, with lengths where known."""
    yield 0, None
    for row in rows[[0, -1]] if len(rows) else ():
        yield int(row["offset"]) - BLOCK, int(row["size"])

"""The quick check of a shard before each run: its length, and the headers at its start and end.

Used by ``manifest``. ``verify`` reads everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.tar import BLOCK, header_size
from maskgit_pl.files import open_regular

__all__ = ["find_fault"]


def find_fault(path: Path, size: int, rows: npt.NDArray[np.void]) -> str | None:
    """Compares the length and the first and last headers of a shard with its manifest.

    Args:
        path: The shard.
        size: Its length in bytes in the manifest.
        rows: (n,) INDEX_DTYPE, its rows of the index.

    Returns:
        The difference in a few words; None if there is no difference.
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
        # A valid checksum, and the length of the payload in the index.
        found = header_size(os.pread(descriptor, BLOCK, offset))
        if found is None or length not in (None, found):
            stated = "" if length is None else f" of {length} bytes"
            actual_length = "none" if found is None else f"one of {found} bytes"
            return f"a member{stated} expected at byte {offset}, {actual_length} found; changed after indexing"
    return None


def _ends(rows: npt.NDArray[np.void]) -> Iterator[tuple[int, int | None]]:
    """Yields (offset of a header, payload length or None) of the first member and of the first and last image."""
    yield 0, None
    for row in rows[[0, -1]] if len(rows) else ():
        yield int(row["offset"]) - BLOCK, int(row["size"])

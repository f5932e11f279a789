"""Memory-mapped ``.npy`` files, of which the index of a data folder and a token store consist."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.files import open_regular


def map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, hint: str) -> npt.NDArray[Any]:
    """Maps a ``.npy`` file of a known shape and type into memory, read-only."""
    array = map_any_array(path)
    if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(f"{path} must be {shape} of {dtype}, got {array.shape} of {array.dtype}; {hint}")
    return array


def map_any_array(path: Path) -> npt.NDArray[Any]:
    """Maps a ``.npy`` file of any shape and type without Python objects into memory, read-only."""
    try:
        os.close(open_regular(path))  # rejects a FIFO or a device, which would block
        with np.errstate(over="raise"):  # NumPy only warns if the product of a shape overflows
            array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except Exception as error:  # the header is a Python literal, whose parser raises many kinds of errors
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return array


def check_unchanged(path: Path, sha256: str, *, expected: str, hint: str) -> None:
    """Raises a ``ValueError`` if the hash of a file differs from the expected one; ``hint`` is the way to make it."""
    if sha256 != expected:
        raise ValueError(
            f"{path} changed since it was made: sha256 {expected[:12]} expected, got {sha256[:12]}; {hint}"
        )

"""Memory-mapped arrays, safe with files that are damaged or that are truncated while they are mapped.

Used by everything that reads indexes and token stores.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.files import open_regular

__all__ = ["has_all_bytes", "map_array"]


def map_array(path: Path) -> npt.NDArray[Any]:
    """Maps a ``.npy`` file into memory, read-only.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a complete ``.npy`` file of plain values.
    """
    try:
        os.close(open_regular(path))  # rejects a FIFO or a device, which would block
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the header is a Python literal, whose parser raises many kinds of errors
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return array


def has_all_bytes(array: npt.NDArray[Any]) -> bool:
    """Returns whether the file of a mapped array still has all its bytes.

    Reading beyond the end of a truncated file would kill the process with SIGBUS.
    """
    # Views of a mapped array have it as a base.
    mapped = array
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    return not isinstance(mapped.base, mmap.mmap) or mapped.base.size() >= len(mapped.base)

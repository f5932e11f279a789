"""Arrays that are mapped into memory from files that may be anything, or be cut while they are read.

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

__all__ = ["is_whole", "map_array"]


def map_array(path: Path) -> npt.NDArray[Any]:
    """Maps a ``.npy`` file into memory, to be read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole ``.npy`` file of plain values.
    """
    try:
        os.close(open_regular(path))
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the header is Python source, and its parsers raise errors of many kinds
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
    return array


def is_whole(array: npt.NDArray[Any]) -> bool:
    """Returns whether the file behind a mapped array still has all its bytes.

    To read beyond the end of a file that was cut would end the process with a signal.
    """
    mapped = array
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    return not isinstance(mapped.base, mmap.mmap) or mapped.base.size() >= len(mapped.base)

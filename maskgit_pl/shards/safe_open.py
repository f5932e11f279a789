"""Opens files that may be anything: a FIFO, a device or a folder in the place of a shard is refused and not waited for.

Used by everything that reads shards, indexes and token stores.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["file_sha256", "hash_file", "is_whole", "map_array", "open_regular"]

_CHUNK = 2**20


def open_regular(path: str | Path) -> int:
    """Opens a file to read it.

    Args:
        path: A regular file, or a link to one.

    Returns:
        The descriptor; the caller closes it.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer. It has no effect on regular files.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    number, kind = (errno.EISDIR, "a folder") if stat.S_ISDIR(mode) else (errno.EINVAL, "a FIFO, a socket or a device")
    raise OSError(number, f"must be a regular file, got {kind}", str(path))


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file, in hex.

    Raises:
        OSError: if it cannot be read.
    """
    descriptor = open_regular(path)
    try:
        return hash_file(descriptor)
    finally:
        os.close(descriptor)


def hash_file(descriptor: int) -> str:
    """Returns the sha256 of an open file, in hex; its position is neither used nor changed."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, _CHUNK, offset):
        digest.update(block)
        offset += len(block)
    return digest.hexdigest()


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

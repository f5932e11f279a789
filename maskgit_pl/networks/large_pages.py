"""Large memory pages for weights that are read again and again.

Linux gives out memory in pages of 4 kB, so that a product with a weight of 10 MB looks up the addresses of thousands of
pages. On virtual machines these lookups take up to half of the time of the linear layers, if there are only a few
hundred rows. In pages of 2 MB there are few.

Source: the manual of Linux, ``madvise(2)``: ``MADV_COLLAPSE``.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from mmap import PAGESIZE
from pathlib import Path

__all__ = ["are_available", "move"]

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25


@cache
def are_available() -> bool:
    """Returns True if programs on this machine may ask for large pages."""
    # Where they are "always" in use, a weight has them already, except at its ends.
    return sys.platform == "linux" and "[never]" not in _read("enabled", default="[never]")


def move(address: int, num_bytes: int) -> None:
    """Moves memory to large pages. Its content and its addresses stay.

    Args:
        address: First address.
        num_bytes: Size. The large pages at both ends are completed with the memory around.

    A large page of which less than half would be in use stays small, so that the program does not grow much. So does
    what the system cannot move, for example because free memory is scattered. Nothing happens before Linux 6.1, and
    where large pages are not available.
    """
    if not are_available():
        return
    size = int(_read("hpage_pmd_size", default="2097152"))
    for page in range(address // size * size, address + num_bytes, size):
        if _count_used(page, size) * 2 * PAGESIZE >= size:
            # MADV_HUGEPAGE would also change what is stored at these addresses later.
            _libc().madvise(page, size, _MADV_COLLAPSE)


def _count_used(address: int, num_bytes: int) -> int:
    """Returns the number of small pages that are in memory; 0 if some of the addresses belong to nothing."""
    is_used = ctypes.create_string_buffer(num_bytes // PAGESIZE)
    failed = _libc().mincore(address, num_bytes, is_used)
    return 0 if failed else sum(byte & 1 for byte in is_used.raw)


def _read(name: str, *, default: str) -> str:
    try:
        return (_SETTINGS / name).read_text()
    except OSError:  # a system without large pages
        return default


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    return library

"""Files that are either whole or not there, and their sizes for people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["size_text", "write_atomically"]


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write bytes to; it takes its name when all is written, and leaves nothing behind otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def size_text(count: float) -> str:
    """Bytes for people, in three digits: ``1.34 GB``, ``512 bytes``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            size = count / factor
            return f"{size:.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
    return f"{count:.0f} bytes"

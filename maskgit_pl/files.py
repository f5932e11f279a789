"""Files that are written whole or not at all, JSON from strangers, and sizes in bytes for people."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["parse_json", "read_json", "size_text", "write_atomically"]

MAX_JSON_BYTES = 1_000_000


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


def read_json(file: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON file that a stranger may have written.

    Args:
        file: The file. Its root must be a mapping.
        max_bytes: Size above which it is not read.

    Returns:
        Plain values. Numbers are finite.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a regular file, larger than ``max_bytes``, not UTF-8, not JSON, nested too deep, not a
            mapping, has a key twice, or holds NaN or infinity. The message is one line that names the file.
    """
    if file.exists() and not file.is_file():  # a FIFO would be waited for
        raise ValueError(f"{file} must be a regular file")
    size = file.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{file} must have at most {size_text(max_bytes)}, got {size_text(size)}")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """Returns the mapping that JSON of a stranger holds, such as a line of a file; see ``read_json``.

    Args:
        text: The JSON, of bounded length.
        where: File and line, for the message.

    Raises:
        ValueError: as ``read_json``. The message is one line that begins with ``where``.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_finite_float,
            parse_float=_finite_float,
        )
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deep") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{where} is not JSON that can be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a mapping, got a {type(content).__name__}")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice in one mapping")
    return content


def _finite_float(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {word[:20]}")
    return number


def size_text(count: float) -> str:
    """Bytes for people, in three digits: ``1.34 GB``, ``512 bytes``."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            size = count / factor
            return f"{size:.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
    return f"{count:.0f} bytes"

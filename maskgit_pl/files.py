"""Files that are written whole or not at all, locks of files and folders, JSON from strangers, sizes for people."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["locked", "parse_json", "read_json", "size_text", "write_atomically"]

MAX_JSON_BYTES = 1_000_000

log = logging.getLogger(__name__)

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_locks: set[int] = set()  # descriptors of the locks that this process holds


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


@contextmanager
def locked(target: Path, *, way_out: str, rank: int | None = None) -> Iterator[None]:
    """Holds a file or folder against other processes while it is written.

    The lock is ``flock`` on the file ``.NAME.lock`` beside the target, which is removed at the end. The kernel releases
    it when the process ends, however it ends, so that a lock of a killed job never blocks its restart. It holds between
    the nodes of a cluster on NFS, on GPFS, and on Lustre mounted with ``flock``. On a file system without locks a
    warning is logged. Where no lock file can be made, nothing is locked: the target cannot be replaced there either.
    What the lock file says (process, host, time) is only for the message.

    Args:
        target: The file or folder; it need not exist.
        way_out: What the user can do besides waiting, for the message.
        rank: Of processes that share the work on the target; each has a lock of its own. None if it is not shared.

    Raises:
        ValueError: if another process holds it.
    """
    name = target.name if rank is None else f"{target.name}.rank{rank}"
    path = target.absolute().with_name(f".{name}.lock")
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, target, way_out)
    if descriptor is not None:
        _locks.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _locks:  # False in a process that was forked meanwhile
            with suppress(OSError):
                path.unlink()  # before it is released: nobody else can hold it then
            _locks.remove(descriptor)
            os.close(descriptor)
            for folder in new_folders:
                with suppress(OSError):  # something was written to it
                    folder.rmdir()


def _take(path: Path, target: Path, way_out: str) -> int | None:
    """Opens a lock file and locks it; None where there can be none."""
    while (descriptor := _open_lock(path)) is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            holder = "".join(letter for letter in said if letter.isprintable()) or "another process"
            raise ValueError(f"{target} is in use by {holder}; wait until it ends, or {way_out}") from error
        except OSError:
            log.warning("%s: this file system has no locks; see to it that only one process writes to it", target)
            return descriptor
        if _is_at(path, descriptor):
            with suppress(OSError):  # a full disk, or the file of another user
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _own_name().encode())
            return descriptor
        os.close(descriptor)  # who held it has removed it meanwhile
    return None


def _open_lock(path: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # read only: it is another user's
        try:
            return os.open(path, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
    return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns whether an open lock file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own_name() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _leave_locks_to_parent() -> None:
    """Closes the locks in a forked process: data workers that outlive a killed run for a moment must not hold them."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks_to_parent)


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

"""Files and folders that are written whole or not at all, hashes, JSON from strangers, and sizes in bytes for people.

Used wherever something is kept on disk: a reader never finds half a file, or half a folder, under its name.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_writable",
    "open_regular",
    "parse_json",
    "read_json",
    "replace_folder",
    "sha256_of",
    "size_text",
    "sync",
    "write_atomically",
    "write_folder",
    "write_tensors",
    "write_text",
]

MAX_JSON_BYTES = 1_000_000
_BLOCK = 2**20  # bytes that are hashed at a time
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2)


def check_writable(name: str, path: Path, *, is_folder: bool = False) -> None:
    """Checks, before any work, that a file or folder can be written; nothing is left on disk.

    Args:
        name: What to call it in the error, such as ``--out``.
        path: The file or folder; neither it nor its folder needs to exist.
        is_folder: True for a folder.

    Raises:
        ValueError: if there is a folder in place of the file or the other way round, or the nearest folder that exists
            cannot be written to.
    """
    if path.exists() and path.is_dir() != is_folder:
        here, wanted = ("file", "folder") if is_folder else ("folder", "file")
        raise ValueError(f"{name} must be a {wanted}, got the {here} {path}")
    folder = path if is_folder else path.parent
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # permissions do not say it of every file system
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must lie in a folder that can be written to, got {path} ({existing}: {error.strerror})"
        ) from error


@contextmanager
def write_atomically(path: Path, *, partial_in: Path | None = None) -> Iterator[IO[bytes]]:
    """Opens a file to write bytes to, which takes its name when all of it is on disk.

    After an error nothing is left, and what was there under that name is as it was.

    Args:
        path: The file; replaced if it is there.
        partial_in: Folder of the same file system that holds the file until it is whole. None: that of ``path``.
    """
    partial = (partial_in or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"  # no other host's either
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text, whole or not at all; see ``write_atomically``."""
    with write_atomically(path) as file:
        file.write(text.encode())


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write to, which takes the place of ``folder`` when all of it is on disk.

    After an error nothing is left, and what was there under that name is as it was.

    Args:
        folder: Replaced if it is there. Folders above it are made.

    Yields:
        A folder beside it.
    """
    fresh = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        for path in fresh.rglob("*"):
            sync(path)
        replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Gives a folder the name of another one, which is removed. A kill leaves one of the two whole under that name.

    Where the file system cannot exchange two names (NFS cannot), a kill between two renames leaves neither under it:
    the new folder keeps its old name, and the old one lies in ``.NAME.old-PID``.

    Args:
        fresh: The new folder, whose files are on disk.
        folder: The name that it takes, on the same file system.

    Raises:
        OSError: if it cannot be renamed. What was there under that name is there again.
    """
    sync(fresh)
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if not folder.exists():
        fresh.rename(folder)
    elif _exchange(fresh, folder):
        old = fresh
    else:
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. False, and nothing has happened, where the system has no such call."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # of Linux; Python has no name for it
    if rename is None:
        return False
    failed: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return not failed


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all, and waits until it is on disk.

    safetensors leaves a file of mode 0600 whatever the umask is; this one has the permissions of any new file.

    Args:
        file: Replaced if it is there.
        tensors: Contiguous, on the CPU.
        metadata: Of the file's header.

    Raises:
        OSError: if the disk is full or the folder is not writable. Nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, file)
    except SafetensorError as error:  # whatever the system said
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(file.parent).free
        code = errno.ENOSPC if free < needed else errno.EIO
        raise OSError(code, f"{error}; it needs {size_text(needed)}, {size_text(free)} are free", str(file)) from error
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def sha256_of(file: str | Path | int) -> str:
    """Returns the sha256 of a file in hex, read a block at a time.

    Args:
        file: Path of a regular file, or the descriptor of an open one, whose position is neither used nor changed.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    descriptor = file if isinstance(file, int) else open_regular(file)
    try:
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(descriptor, _BLOCK, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()
    finally:
        if not isinstance(file, int):
            os.close(descriptor)


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
    """Parses JSON that a stranger may have written.

    Args:
        text: UTF-8.
        where: Name of the file, for the message.

    Raises:
        ValueError: as ``read_json``, for what the text says.
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

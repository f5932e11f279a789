"""Atomic writes of files, hashes, and checked reading of untrusted JSON. ``folders`` writes whole folders.

Used by everything that writes to disk: a file has its name only when all of it is on disk.
"""

from __future__ import annotations

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
    "OutputError",
    "check_writable",
    "follow_links",
    "open_regular",
    "parse_any_json",
    "parse_json",
    "read_json",
    "sha256_of",
    "size_text",
    "sync",
    "write_atomically",
    "write_tensors",
    "write_text",
]

MAX_JSON_BYTES = 1_000_000
_MAX_DEPTH = 64  # of JSON; ours have at most 21, and code that walks a tree needs 3 calls per level


class OutputError(OSError, ValueError):
    """A path has the name of something that is not replaced. An OSError too, for code that survives a failed write."""


def check_writable(name: str, path: Path, *, is_folder: bool = False) -> None:
    """Checks, before any work, that a file or folder can be written. Leaves nothing on disk.

    Args:
        name: Name of the setting for the error, such as ``--out``.
        path: File or folder to write later. Neither it nor the folders above it need to exist.
        is_folder: True for a folder.

    Raises:
        ValueError: if a folder has the name of the file or the other way round, a device or a pipe has the name, a link
            is broken, or the nearest existing folder is not writable.
    """
    path = follow_links(path, name, is_folder=is_folder)
    # The nearest folder that exists decides: the ones below it are made later.
    folder = path if is_folder else path.parent
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # permission bits are not reliable on all file systems
            pass
    except OSError as error:
        raise ValueError(f"{name} must be in a writable folder, got {path} ({existing}: {error.strerror})") from error


def follow_links(path: Path, name: str = "output", *, is_folder: bool = False) -> Path:
    """Returns the file or folder that is written for a path: links are followed, so that a link stays one.

    Raises:
        OutputError: if something of another kind is there, which a rename would replace even if it is a device, or a
            link leads to a folder that does not exist, such as one on a disk that is not mounted.
    """
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "device or pipe"
        raise OutputError(
            f"{name} must be a {'folder' if is_folder else 'file'}, got the {kind} {path}; give another path"
        )
    real = Path(os.path.realpath(path))
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))
    # A link to nothing is written if it is the path itself, and the folder of its target exists.
    if not nearest.exists() and (real.is_symlink() or not real.parent.is_dir()):
        raise OutputError(
            f"{name} must lead to a folder that exists, got {path}, and {nearest} is a link to {os.readlink(nearest)}; "
            "make that folder, or give another path"
        )
    return real


@contextmanager
def write_atomically(path: Path, *, partial_in: Path | None = None) -> Iterator[IO[bytes]]:
    """Opens a binary file that gets its name when all of it is on disk.

    1. Writes to a hidden partial file.
    2. Flushes it to the disk with ``fsync``.
    3. Renames it to ``path``, which is atomic.

    After an error, the partial file is removed and an older file at ``path`` is unchanged.

    Args:
        path: File to write; an existing one is replaced. A link stays, and its target is written.
        partial_in: Folder of the partial file on the file system of ``path``; the folder of ``path`` by default, and
            that of the target for a link.

    Yields:
        The stream to write to.

    Raises:
        OutputError: if ``path`` is a folder, a device, a pipe or a broken link.
    """
    if path.is_symlink():
        partial_in = None  # the target may be on another file system
    path = follow_links(path)
    partial = (partial_in or path.parent) / f".{path.name}.{uuid.uuid4().hex}.partial"  # unique over all hosts
    try:
        with open(partial, "wb") as file:  # 1.
            yield file
            file.flush()  # 2.
            os.fsync(file.fileno())
        os.replace(partial, path)  # 3.
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text atomically. See ``write_atomically``."""
    with write_atomically(path) as file:
        file.write(text.encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically.

    The file has the permissions of any new file. safetensors itself ignores the umask and uses mode 0600.

    Args:
        file: File to write; an existing one is replaced. A link stays, and its target is written.
        tensors: Contiguous tensors on the CPU by name.
        metadata: Metadata for the header of the file.

    Raises:
        OSError: if the disk is full or the folder is not writable. The partial file is removed.
        OutputError: if ``file`` is a folder, a device, a pipe or a broken link.
    """
    file = follow_links(file)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()  # the mode of a new file follows the umask
        mode = stat.S_IMODE(partial.stat().st_mode)
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, file)
    except SafetensorError as error:  # hides the errno of the system
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(file.parent).free
        code = errno.ENOSPC if free < needed else errno.EIO
        raise OSError(code, f"{error}; it needs {size_text(needed)}, {size_text(free)} are free", str(file)) from error
    finally:
        partial.unlink(missing_ok=True)


def open_regular(path: str | Path) -> int:
    """Opens a regular file for reading.

    Args:
        path: Regular file, or a link to one.

    Returns:
        The file descriptor, which the caller closes.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer. It has no effect on regular files. Windows lacks it,
    # and changes line ends without O_BINARY.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    number, kind = (errno.EISDIR, "a folder") if stat.S_ISDIR(mode) else (errno.EINVAL, "a FIFO, a socket or a device")
    raise OSError(number, f"must be a regular file, got {kind}", str(path))


def sha256_of(file: str | Path | int) -> str:
    """Returns the SHA-256 of a file in hex, with the memory of one block.

    Args:
        file: Path of a regular file, or the descriptor of an open one, which stays open.

    Raises:
        OSError: if the file cannot be read or is not a regular file.
    """
    descriptor = file if isinstance(file, int) else open_regular(file)
    with open(descriptor, "rb", buffering=0, closefd=not isinstance(file, int)) as stream:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads an untrusted JSON file.

    Args:
        file: File whose root must be a mapping.
        max_bytes: Largest size that is read.

    Returns:
        The mapping, with plain values and finite numbers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a regular file, larger than ``max_bytes``, not UTF-8, not JSON, nested over 64
            levels deep, not a mapping, has a key twice, or holds NaN or infinity. The message is one line that names
            the file.
    """
    if file.exists() and not file.is_file():  # reading a FIFO would block
        raise ValueError(f"{file} must be a regular file")
    size = file.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{file} must have at most {size_text(max_bytes)}, got {size_text(size)}")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """Parses untrusted JSON.

    Args:
        text: UTF-8 text.
        where: Name of the file for the message.

    Raises:
        ValueError: if the text is not UTF-8, not JSON, nested over 64 levels deep, not a mapping, has a key twice, or
            holds NaN or infinity.
    """
    content = parse_any_json(
        text, where, object_pairs_hook=_unique_keys, parse_constant=_finite_float, parse_float=_finite_float
    )
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a mapping, got a {type(content).__name__}")
    return content


def parse_any_json(text: bytes | str, where: str, **hooks: Any) -> Any:
    """Parses untrusted JSON of another program, which may have any root, a key twice, NaN and infinity.

    Args:
        text: UTF-8 text.
        where: Name of the file for the message.
        hooks: Options of ``json.loads``.

    Raises:
        ValueError: if the text is not UTF-8, not JSON, or nested over 64 levels deep. The message is one line.
    """
    too_deep = f"{where} must be nested at most {_MAX_DEPTH} levels deep"
    try:
        content = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    # JSONDecodeError and UnicodeDecodeError are ValueErrors too.
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {' '.join(str(error).split())[:200]}") from error
    # json.loads stops at a depth that depends on its caller, and code that walks the tree stops earlier.
    if _is_deeper(content, _MAX_DEPTH):
        raise ValueError(too_deep)
    return content


def _is_deeper(tree: Any, limit: int) -> bool:
    level: list[Any] = [[tree]]
    for _ in range(limit + 1):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key appears twice in one mapping")
    return content


def _finite_float(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {word[:20]}")
    return number


def size_text(count: float) -> str:
    """Returns a number of bytes with a unit and three digits, such as ``1.34 GB`` or ``512 bytes``."""
    # Decimal units, as disks are sold and as df -H prints them.
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            size = count / factor
            return f"{size:.0f} {unit}" if size >= 100 else f"{size:.3g} {unit}"
    return f"{count:.0f} bytes"

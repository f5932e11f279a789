"""Atomic writes of files, hashes, and checked reading of untrusted JSON, YAML and zip archives.

Used by everything that writes to disk: a file has its name only when all of it is on disk. ``folders`` writes
whole folders. The readers return plain values (numbers, strings, lists, mappings), which name no class and no other
file, and limit size and depth. The directory of a zip is limited before ``zipfile`` parses all of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import stat
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import yaml
from safetensors import SafetensorError

from maskgit_pl.text import shorten, size_text

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

NO_CODE = "recipes name registered objects, not classes"

_MAX_JSON_BYTES = 1_000_000
_MAX_JSON_DEPTH = 64  # ours have at most 21, and code that walks a tree needs 3 calls per level
_MAX_YAML_BYTES = 200_000  # PyYAML parses about 200 kB per second
_MAX_YAML_DEPTH = 16
_MAX_DIRECTORY_BYTES = 2**30  # of a zip; 10 million entries with names of 60 letters
_SIGNATURE = b"PK\1\2"  # of an entry of a zip. Source: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.12


class PathError(OSError, ValueError):
    """A path has something of another kind than is read or written. An OSError too, as of any file that cannot be."""


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Opens a binary file that gets its name when all of it is on disk.

    1. Writes to a hidden partial file beside it, and checks that all bytes are in it.
    2. Flushes it to the disk with ``fsync``.
    3. Renames it to ``path``, which is atomic.

    After an error, the partial file is removed and an older file at ``path`` is unchanged. A killed process
    leaves the partial file; see ``remove_partials``.

    Args:
        path: File to write; an existing one is replaced. A link stays, and its target is written.

    Yields:
        The stream to write to.
    """
    path = follow_links(path)
    with _replacing(path) as partial, open(partial, "wb") as file:  # 1.
        yield file
        file.flush()
        # np.save writes through a copy of the descriptor and does not report a failure of its last write.
        expected, written = file.tell(), os.fstat(file.fileno()).st_size
        if written < expected:
            raise OSError(errno.ENOSPC, f"only {written} of {expected} bytes could be written", str(path))
        sync_open(file.fileno())  # 2.


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text atomically. See ``write_atomically``."""
    with write_atomically(path) as file:
        file.write(text.encode())


def try_write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text atomically; a failed write, such as on a full disk, is a warning in the log."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically.

    The file has the permissions of any new file. safetensors itself ignores the umask and uses mode 0600.

    Args:
        file: File to write; an existing one is replaced. A link stays, and its target is written.
        tensors: Contiguous tensors on the CPU by name.
        metadata: Metadata for the header of the file.
    """
    file = follow_links(file)
    from safetensors.torch import save_file

    with _replacing(file) as partial:
        partial.touch()  # the mode of a new file follows the umask
        mode = stat.S_IMODE(partial.stat().st_mode)
        try:
            save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # hides the errno of the system, and has its text
            raise OSError(errno.EIO, str(error), str(file)) from error
        partial.chmod(mode)
        sync(partial)


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Removes the partial files of ``name``, or of all files, that killed processes have left in a folder.

    No other process may be writing these files.
    """
    pattern = rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{32}}\.partial"
    for path in folder.iterdir():
        if re.fullmatch(pattern, path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _name_in_errors(path: Path, hidden: Path | None = None) -> Iterator[None]:
    """Names a file in the errors of the system that name none, or the hidden file in its place."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, hidden, str(hidden)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a new path beside another one. The file that is written and synced there replaces that of ``path``."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # unique over all hosts
    try:
        with _name_in_errors(path, partial):
            yield partial
            os.replace(partial, path)  # 3.
    finally:
        partial.unlink(missing_ok=True)


def check_writable(name: str, path: Path, *, is_folder: bool = False) -> None:
    """Checks, before any work, that a file or folder can be written. Leaves nothing on disk.

    Args:
        name: Name of the setting for the error, such as ``--out``.
        path: File or folder to write later. Neither it nor the folders above it need to exist.
        is_folder: True for a folder.
    """
    path = follow_links(path, name, is_folder=is_folder)
    # The nearest folder that exists decides: the ones below it are made later.
    folder = path if is_folder else path.parent
    existing = next(ancestor for ancestor in (folder, *folder.parents) if ancestor.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):  # permission bits are not reliable on all file systems
            pass
    except OSError as error:
        raise ValueError(f"{name} must be in a writable folder, got {path} ({existing}: {error.strerror})") from error


def follow_links(path: Path, name: str = "output", *, is_folder: bool = False) -> Path:
    """Returns the file or folder that is written for a path: links are followed, so that a link stays one."""
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        kind = "folder" if path.is_dir() else "file" if path.is_file() else "device or pipe"
        raise PathError(
            f"{name} must be a {'folder' if is_folder else 'file'}, got the {kind} {path}; give another path"
        )
    real = Path(os.path.realpath(path))
    nearest = next(ancestor for ancestor in (path.absolute(), *path.absolute().parents) if os.path.lexists(ancestor))
    # A link to nothing is written if it is the path itself, and the folder of its target exists.
    if not nearest.exists() and (real.is_symlink() or not real.parent.is_dir()):
        raise PathError(
            f"{name} must lead to a folder that exists, got {path}, and {nearest} is a link to {os.readlink(nearest)}; "
            "make that folder, or give another path"
        )
    return real


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _name_in_errors(path):
            sync_open(descriptor)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int) -> None:
    """Waits until an open file or folder is on disk. Some file systems of FUSE and networks cannot: EINVAL, ENOTSUP."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def open_regular(path: str | Path) -> int:
    """Opens a regular file, or a link to one, for reading, and returns the descriptor, which the caller closes."""
    # Without O_NONBLOCK, opening a FIFO would wait for a writer. It has no effect on regular files. Windows
    # lacks it, and changes line ends without O_BINARY.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
    raise PathError(errno.EINVAL, f"must be a regular file, got {kind}", str(path))


def sha256_of(file: str | Path | int) -> str:
    """Returns the SHA-256 of a file in hex, with the memory of one block.

    Args:
        file: Path of a regular file, or the descriptor of an open one, which stays open.
    """
    descriptor = file if isinstance(file, int) else open_regular(file)
    with open(descriptor, "rb", buffering=0, closefd=not isinstance(file, int)) as stream:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json(file: Path, *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads an untrusted JSON file.

    Args:
        file: File whose root must be a mapping.
        max_bytes: Largest size that is read.

    Returns:
        The mapping, with plain values and finite numbers.
    """
    return parse_json(_read_bounded(file, max_bytes), str(file))


def _read_bounded(file: Path, max_bytes: int) -> bytes:
    with open(open_regular(file), "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{file} must have at most {size_text(max_bytes)}")
    return data


def read_text(file: Path, *, max_bytes: int = _MAX_YAML_BYTES) -> str:
    """Reads an untrusted file of UTF-8 text, without a byte order mark."""
    try:
        return _read_bounded(file, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text: {error}") from error


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """Parses untrusted JSON, UTF-8 text of the file ``where``; see ``read_json``."""
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
    """
    too_deep = f"{where} must be nested at most {_MAX_JSON_DEPTH} levels deep"
    try:
        content = json.loads(text, **hooks)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    # JSONDecodeError and UnicodeDecodeError are ValueErrors too.
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {' '.join(str(error).split())[:200]}") from error
    # json.loads stops at a depth that depends on its caller, and code that walks the tree stops earlier.
    if _is_deeper(content, _MAX_JSON_DEPTH):
        raise ValueError(too_deep)
    return content


def _is_deeper(tree: Any, limit: int) -> bool:
    """Returns True if a tree is nested more than ``limit`` levels deep. Walks it level by level, not by recursion."""
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


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML file as plain values."""
    text = read_text(file)
    try:
        tree = parse_yaml(text)
        if tree is not None and not isinstance(tree, dict):
            raise ValueError(f"it must be a mapping, got {shorten(tree)}")
        check_plain(tree)
    except ValueError as error:
        raise ValueError(f"recipe {file}: {error}") from error
    return tree or {}


def parse_yaml(text: str) -> Any:
    """Parses YAML; raises a ``ValueError`` of one line if the text is invalid."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{position}{getattr(error, 'problem', None) or ' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (ValueError, OverflowError) as error:  # of a number or a date
        raise ValueError(str(error)) from error


def check_plain(node: Any, path: str = "", depth: int = 0) -> None:
    """Checks that a tree is plain data.

    Args:
        node: Tree, or a part of it.
        path: Dotted key of the part, for messages.
        depth: Nesting depth of the part.
    """
    if depth > _MAX_YAML_DEPTH:
        raise ValueError(f"{path[:80]}: it is nested too deep")
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key in ("class_path", "init_args"):
                raise ValueError(f"{where} cannot be set: {NO_CODE}")
            check_plain(value, where, depth + 1)
    elif isinstance(node, list):
        for item in node:
            check_plain(item, path, depth + 1)
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{path} must be finite, got {node}")
    elif not isinstance(node, str | int | float | bool | None):
        raise ValueError(f"{path} must be a number, a word, a list or a mapping, got {shorten(node)}; quote it")


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader that rejects aliases (a few bytes can expand to gigabytes), tags and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML is untyped
        is_alias = isinstance(event, yaml.events.AliasEvent)
        if is_alias or event.tag is not None:  # a tag's constructor raises any error for another kind of value
            text = f"{'aliases' if is_alias else 'tags such as !!str'} are not allowed in recipes"
            raise yaml.constructor.ConstructorError(None, None, text, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  # PyYAML's
        # PyYAML would silently keep the last of two equal keys.
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            fault = "is not a string" if not isinstance(key, str) else "appears twice" if key in seen else None
            if fault is not None:
                text = f"the key {shorten(key)} {fault}"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _construct_number(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    """Reads a number as YAML 1.2 does: PyYAML would read 010 as 8, and 12:30 as 750."""
    if ":" in node.value:
        return node.value
    if node.tag.endswith(":float"):
        return loader.construct_yaml_float(node)
    text = node.value.replace("_", "")
    return int(text, 10 if text.lstrip("+-").isdigit() else 0)


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct_number)


_PlainLoader.add_implicit_resolver(  # floats of YAML 1.2: PyYAML would read 1e-3 as a string
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class TooLargeDirectoryError(zipfile.BadZipFile):
    """The directory of a zip has too many entries or bytes. The message continues "must have"."""


def open_zip(stream: IO[bytes], *, max_entries: int) -> zipfile.ZipFile:
    """Opens a zip for reading.

    ``zipfile`` needs some 600 bytes of memory for each entry, which takes as few as 46 bytes of the file. It
    ignores the number of entries that the file states.

    Args:
        stream: The file, which must stay open.
        max_entries: Maximum number of entries.
    """
    limited = _LimitedStream(stream, max_entries)
    archive = zipfile.ZipFile(cast("IO[bytes]", limited))
    limited.is_limited = False  # members may have any length
    return archive


class _LimitedStream:
    """A stream whose reads are limited in bytes and entries; ``zipfile`` reads the whole directory in one call."""

    def __init__(self, stream: IO[bytes], max_entries: int) -> None:
        self.is_limited, self._stream, self._max_entries = True, stream, max_entries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, size: int = -1) -> bytes:
        """Reads at most ``size`` bytes; all if it is negative."""
        if self.is_limited and size > _MAX_DIRECTORY_BYTES:
            raise TooLargeDirectoryError(
                f"a directory of at most {size_text(_MAX_DIRECTORY_BYTES)}, got one of {size_text(size)}"
            )
        data = self._stream.read(size)
        # At least the number of entries, since each begins with a signature.
        count = data.count(_SIGNATURE) if self.is_limited else 0
        if count > self._max_entries:
            raise TooLargeDirectoryError(f"at most {self._max_entries:,} entries, got {count:,}")
        return data

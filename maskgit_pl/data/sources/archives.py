"""Named files of a source: those of a folder, or those of a zip or tar. Used by ``image_folder``.

A name is the path inside the source, with ``/``. Names are never used to write files. Archives may be hostile: the
directory of a zip, the headers of a tar and the bytes that all members have together are limited before they are read.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.data.tar import DamagedTarError, read_members
from maskgit_pl.files import TooLargeDirectoryError, open_regular, open_zip
from maskgit_pl.text import printable, size_text

_HIDDEN = "hidden"
_NO_FILE = "that are links, devices, sparse, encrypted or compressed other than by deflate"
_MAX_WHOLE = 2**30  # bytes that any zip may hold
_MAX_RATIO = 100  # a larger one may hold this many times its own bytes
_MAX_DEPTH = 3  # of the folders that matter, SOURCE/train/CLASS; a long name may state thousands
_MAX_ENTRIES = 10**7  # of a zip: 6 GB of memory. ImageNet has 1.3 million images

# zipfile raises any of these on damaged bytes.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError, EOFError)


class _Member(NamedTuple):
    """A member of an archive."""

    name: str  # as stored
    size: int  # in bytes, as the archive states it
    place: int  # position of its bytes in a tar, number of its entry in the directory of a zip
    is_file: bool
    is_folder: bool


class Entries:
    """The files of a folder, a zip or a tar, by their names; the first bytes decide which.

    Links, and names with a part that begins with a dot or is ``__MACOSX``, are left out. If everything in an archive
    lies in one folder, its names begin inside that folder. Of several members with one name, the last one counts, as
    after unpacking.

    Args:
        path: The folder or the archive.

    Attributes:
        title: Its name without an ending, which names the class of images without classes.
        sizes: Length in bytes of each file.
        folders: Names of the folders; of an archive, down to three levels.
        left_out: Names of what is not a readable file, by kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self._places: dict[str, int] | None = None  # of the members of an archive
        self._read: Callable[[Path, int, int], bytes] = _read_bytes
        if path.is_dir():
            self.title = path.resolve().name
            waiting = [""]
            while waiting:
                waiting += self._scan(waiting.pop())
            return
        self.title = path.stem
        with open(open_regular(path), "rb") as file:
            is_zip = file.read(2) == b"PK"
        if is_zip:
            self._read = _read_zip
        self._take(_zip_members(path) if is_zip else _tar_members(path))

    def read(self, name: str, *, what: str = "image", limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Returns the bytes of a file; ``what`` it is begins the error."""
        title, size = f"{what} {printable(self.path / name)}", self.sizes.get(name)
        if size is None:
            raise UnreadableImageError(f"{title} cannot be read: No such file or directory")
        if size > limit:
            raise UnreadableImageError(f"{title} must have at most {size_text(limit)}, got {size_text(size)}")
        try:
            if self._places is None:
                return _read_bytes(self.path / name, 0, size)
            return self._read(self.path, self._places[name], size)
        except OSError as error:
            raise UnreadableImageError(f"{title} cannot be read: {error.strerror or error}") from error
        except (*_ZIP_ERRORS, zlib.error) as error:
            raise UnreadableImageError(f"{title} is damaged: {printable(error)}") from error

    def _scan(self, folder: str) -> Iterator[str]:
        """Takes the files of a folder, and yields the names of its sub-folders with a trailing ``/``."""
        with os.scandir(self.path / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = folder + entry.name
                if entry.name.startswith("."):
                    self.left_out[_HIDDEN].append(name)
                elif entry.is_dir(follow_symlinks=False):
                    self.folders.add(name)
                    yield f"{name}/"
                elif entry.is_file(follow_symlinks=False):
                    self.sizes[name] = entry.stat().st_size
                else:
                    self.left_out["that are links or devices"].append(name)

    def _take(self, members: Sequence[_Member]) -> None:
        """Takes the files and folders of an archive, and notes what is left out."""
        files: dict[str, _Member] = {}
        for member in members:
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            name = "/".join(parts)
            if any(part.startswith(".") or part == "__MACOSX" for part in parts):  # also ".."
                self.left_out[_HIDDEN].append(name)
                continue
            if member.is_file:
                files[name] = member
            elif not member.is_folder:
                self.left_out[_NO_FILE].append(name)
                continue
            above = parts if member.is_folder else parts[:-1]
            self.folders |= {"/".join(above[:depth]) for depth in range(1, min(len(above), _MAX_DEPTH) + 1)}
        tops, top = {name.partition("/")[0] for name in files.keys() | self.folders}, ""
        if len(tops) == 1 and tops <= self.folders:
            (self.title,) = tops
            top = f"{self.title}/"
        self._places = {name.removeprefix(top): member.place for name, member in files.items()}
        self.sizes = {name.removeprefix(top): member.size for name, member in files.items()}
        self.folders = {name.removeprefix(top) for name in self.folders if f"{name}/" != top}


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    with open(open_regular(path), "rb") as file:
        file.seek(offset)
        return file.read(size)


def _zip_members(path: Path) -> list[_Member]:
    """Returns the members of a zip that hold at most 1 GiB, or 100 times its length, together."""
    try:
        with open(path, "rb") as stream, open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
            members = [_zip_member(info, number) for number, info in enumerate(archive.infolist())]
    except TooLargeDirectoryError as error:
        raise ValueError(
            f"archive {printable(path)} must have {error}; extract it and name the folder, or make a tar of it"
        ) from error
    except _ZIP_ERRORS as error:
        raise ValueError(f"archive {printable(path)} must be a complete zip, got: {printable(error)}") from error
    size, limit = sum(member.size for member in members), max(_MAX_WHOLE, _MAX_RATIO * path.stat().st_size)
    if size > limit:
        raise ValueError(
            f"archive {printable(path)} must hold at most {size_text(limit)}, which is {_MAX_RATIO} times its length "
            f"or 1 GiB, got {size_text(size)}; unpack it, and name the folder"
        )
    return members


def _zip_member(info: zipfile.ZipInfo, number: int) -> _Member:
    is_link = stat.S_ISLNK(info.external_attr >> 16)  # 0 if the zip was not made on Unix
    # bzip2 and LZMA may take any memory.
    is_plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 0x1
    name = info.filename.replace("\\", "/")  # as some programs of Windows write it
    is_folder = name.endswith("/")
    return _Member(name, info.file_size, number, is_plain and not is_link and not is_folder, is_folder)


@lru_cache(maxsize=1)
def _open_zip(path: Path, _: int) -> zipfile.ZipFile:
    """Opens a zip once in each process, of the given time of change."""
    return zipfile.ZipFile(path)


def _read_zip(path: Path, number: int, size: int) -> bytes:
    archive = _open_zip(path, path.stat().st_mtime_ns)
    with archive.open(archive.infolist()[number]) as stream:  # gives at most the length in the directory
        data = stream.read(size)
        stream.read(1)  # compares the checksum, also of a member of no bytes
    if len(data) < size:
        raise EOFError(f"{len(data)} bytes in the zip for {size}")
    return data


def _tar_members(path: Path) -> list[_Member]:
    try:
        with open(path, "rb") as file:
            return [
                _Member(member.name, member.size, member.offset, member.kind == "file", member.kind == "folder")
                for member in read_members(file.fileno())
            ]
    except DamagedTarError as error:
        rule = "must be a folder, a zip or a tar of images"
        raise ValueError(f"source {printable(path)} {rule}, got: {error}") from error

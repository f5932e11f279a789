"""Named files of a source: those of a folder, or those of a zip or tar. Used by ``image_folder``.

A name is the path inside the source, with ``/``. Names are never used to write files. Archives may be hostile: the
directory of a zip, the headers of a tar and the bytes that all members have together are limited before they are read.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.data.tar import DamagedTarError, read_members
from maskgit_pl.errors import printable
from maskgit_pl.files import TooLargeDirectoryError, open_regular, open_zip, size_text

_HIDDEN = "hidden"
_UNSAFE = "with an absolute name, '..', a NUL character or more than 4096 characters"
_REPEATED = "of a name that a later entry has too"
_MAX_NAME = 4096
_MAX_WHOLE = 2**30  # bytes that any archive may hold
_MAX_RATIO = 100  # a larger archive may hold this many times its own bytes
_MAX_ENTRIES = 10**7  # of a zip: 6 GB of memory. ImageNet has 1.3 million images
_BLOCK = 2**20

_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_TAR_FAULTS = {"link": "links", "device": "devices"}
# zipfile raises any of these on damaged bytes.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError, EOFError)


class EntryError(UnreadableImageError):
    """A file of a source, an image or another one, cannot be read."""


class _Member(NamedTuple):
    """A member of an archive."""

    name: str  # as stored
    size: int  # in bytes, as the archive states it
    place: int  # position of its bytes in a tar, number of its entry in the directory of a zip
    fault: str = ""  # kind under which it is left out, such as "links"
    is_folder: bool = False


class Entries:
    """The files of a folder, a zip, a tar or a tar compressed with gzip, by their names; the first bytes decide which.

    In a folder, a symbolic link to a file of the folder is that file. Links to folders are not followed, so
    there are no loops.

    If everything in an archive lies in one folder, its names begin inside that folder. Absolute names, names with
    ``..``, links, ``__MACOSX`` and names that begin with a dot are left out. Of several members with one name, the last
    one counts, as after unpacking. A compressed tar is decompressed to a temporary file, which ends with this object.

    Args:
        path: The folder or the archive.

    Attributes:
        title: Its name without an ending, which names the class of images without classes.
        sizes: Length in bytes of each file.
        folders: Names of all folders.
        left_out: Names of what is not a readable file, by kind.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no archive, is damaged, or would expand to implausibly many bytes, or a link in
            the folder leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self._places: dict[str, int] = {}  # of the members of an archive
        self._archive: Path | None = None  # or its decompressed copy; None of a folder
        self._read: Callable[[Path, int, int], bytes] = _read_bytes
        if path.is_dir():
            self.title = path.resolve().name
            waiting = [""]
            while waiting:
                waiting += self._scan(waiting.pop())
            return
        ending = max((end for end in _ENDINGS if path.name.lower().endswith(end)), key=len, default=path.suffix)
        self.title = path.name[: len(path.name) - len(ending)]
        with open(open_regular(path), "rb") as file:
            first = file.read(2)
        self._archive = path
        if first == b"PK":
            self._read, members = _read_zip, _zip_members(path)
        else:
            if first == b"\x1f\x8b":
                # Without a name, so that also a killed process leaves nothing; worker processes can open it.
                plain = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the finalizer
                weakref.finalize(self, plain.close)
                self._archive = Path(f"/proc/{os.getpid()}/fd/{plain.fileno()}")
                _decompress(path, plain)
            members = _tar_members(path, self._archive)
        _check_expansion(path, sum(member.size for member in members))
        self._take(members)

    def read(self, name: str, *, what: str = "image", limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Returns the bytes of a file; ``what`` it is begins the error.

        Raises:
            EntryError: if there is no such file, it is longer than ``limit`` bytes, damaged, or cannot be read.
        """
        try:
            if name not in self.sizes:
                raise EntryError("cannot be read: No such file or directory")
            if self.sizes[name] > limit:
                raise EntryError(f"must have at most {size_text(limit)}, got {size_text(self.sizes[name])}")
            return self._read(self._archive or self.path / name, self._places.get(name, 0), self.sizes[name])
        except OSError as error:
            fault = f"cannot be read: {error.strerror or error}"
        except EntryError as error:
            fault = str(error)
        raise EntryError(f"{what} {printable(self.path / name)} {fault}")

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
                elif entry.is_dir():
                    self.left_out["symbolic links to folders, which are not followed"].append(name)
                elif not entry.is_file():
                    self.left_out["that are not regular files"].append(name)
                elif entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(self.path.resolve()):
                    raise ValueError(
                        f"source {printable(self.path)} must have no links that lead out of it, got {printable(name)}; "
                        "replace it by the file, or name the folder that has the files"
                    )
                else:
                    self.sizes[name] = entry.stat().st_size

    def _take(self, members: Sequence[_Member]) -> None:
        """Takes the files and folders of an archive, and notes what is left out."""
        files, hidden = dict[str, _Member](), dict[str, None]()
        for member in members:
            name = _clean_name(member.name)
            if name is None:
                self.left_out[_UNSAFE].append(member.name)
            elif not name:  # the folder "./" itself
                continue
            elif hidden_part := re.match(r"(?:.*?/)??(?:\.[^/]*|__MACOSX)(?=/|\Z)", name, re.DOTALL):
                hidden[hidden_part[0]] = None
            elif member.fault:
                self.left_out[member.fault].append(name)
            elif member.is_folder:
                self.folders |= {name, *_parents(name)}
            else:
                if name in files:
                    self.left_out[_REPEATED].append(name)
                files[name] = member
        if hidden:
            self.left_out[_HIDDEN] = list(hidden)
        self.folders |= {parent for name in files for parent in _parents(name)}
        tops, top = {name.partition("/")[0] for name in files.keys() | self.folders}, ""
        if len(tops) == 1 and tops <= self.folders:
            (self.title,) = tops
            top = f"{self.title}/"
        self._places = {name.removeprefix(top): member.place for name, member in files.items()}
        self.sizes = {name.removeprefix(top): member.size for name, member in files.items()}
        self.folders = {name.removeprefix(top) for name in self.folders if f"{name}/" != top}


def _check_expansion(path: Path, size: int) -> None:
    """Checks that the members of an archive have at most 1 GiB, or 100 times the length of the archive, together."""
    limit = max(_MAX_WHOLE, _MAX_RATIO * path.stat().st_size)
    if size > limit:
        raise ValueError(
            f"archive {printable(path)} must hold at most {size_text(limit)}, which is {_MAX_RATIO} times its length "
            f"or 1 GiB, got {size_text(size)} or more; unpack it, and name the folder"
        )


def _clean_name(name: str) -> str | None:
    """Returns a name without empty parts and ``.``; None if it leads out of the archive."""
    parts = name.split("/")
    if name.startswith("/") or "\0" in name or name[1:3] in (":/", ":\\") or len(name) > _MAX_NAME or ".." in parts:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    with open(open_regular(path), "rb") as file:
        file.seek(offset)
        return file.read(size)


def _zip_members(path: Path) -> list[_Member]:
    try:
        with open(path, "rb") as stream, open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
            return [_zip_member(info, number) for number, info in enumerate(archive.infolist())]
    except TooLargeDirectoryError as error:
        raise ValueError(
            f"archive {printable(path)} must have {error}; extract it and name the folder, or make a tar of it"
        ) from error
    except _ZIP_ERRORS as error:
        raise ValueError(f"archive {printable(path)} must be a complete zip, got: {printable(error)}") from error


def _zip_member(info: zipfile.ZipInfo, offset: int) -> _Member:
    fault = "links" if stat.S_ISLNK(info.external_attr >> 16) else ""  # 0 if the zip was not made on Unix
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # bzip2 and LZMA may take any memory
        fault = "with a compression other than deflate"
    if info.flag_bits & 0x1:
        fault = "encrypted"
    name = info.filename.replace("\\", "/")  # as some programs of Windows write it
    return _Member(name, info.file_size, offset, fault, is_folder=name.endswith("/"))


@lru_cache(maxsize=1)
def _open_zip(path: Path, _: int) -> zipfile.ZipFile:
    """Opens a zip once in each process, of the given time of change."""
    return zipfile.ZipFile(path)


def _read_zip(path: Path, number: int, size: int) -> bytes:
    try:
        archive = _open_zip(path, path.stat().st_mtime_ns)
        with archive.open(archive.infolist()[number]) as stream:  # gives at most the length in the directory
            data = stream.read(size)
            stream.read(1)  # compares the checksum, also of a member of no bytes
    except (*_ZIP_ERRORS, zlib.error) as error:
        raise EntryError(f"is damaged: {printable(error)}") from error
    if len(data) < size:
        raise EntryError(f"is damaged: {len(data)} bytes in the zip for {size}")
    return data


def _tar_members(path: Path, tar: Path) -> list[_Member]:
    try:
        with open(tar, "rb") as file:
            return [
                _Member(
                    member.name, member.size, member.offset, _TAR_FAULTS.get(member.kind, ""), member.kind == "folder"
                )
                for member in read_members(file.fileno())
            ]
    except DamagedTarError as error:
        rule = "must be a folder, a zip, a tar or a .tar.gz of images"
        raise ValueError(f"source {printable(path)} {rule}, got: {error}") from error


def _decompress(path: Path, file: IO[bytes]) -> None:
    """Decompresses a gzip file into an open file, up to the limit of an archive."""
    try:
        with gzip.open(path) as stream:
            while block := stream.read(_BLOCK):
                _check_expansion(path, file.tell() + len(block))
                file.write(block)
        file.flush()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"archive {printable(path)} must be a complete gzip file, got: {error}") from error

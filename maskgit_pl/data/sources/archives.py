"""Named files inside a source: those of a folder, or those of a zip or tar, read in place. Used by ``image_folder``.

A name is the path inside the source, with ``/``. Names are never used to write files, and archives are never unpacked
to disk: an entry is read from its place in the archive. Archives may be hostile: lengths are checked before memory is
allocated, and expansion is limited.

Source: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.7: local file header; RFC 1952: gzip.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.tar import DamagedTarError, DescriptorBytes, TarBytes, read_members
from maskgit_pl.errors import printable
from maskgit_pl.files import TooLargeDirectoryError, open_regular, open_zip, size_text

__all__ = ["Entries", "EntryError", "LeftOut", "open_entries"]

LeftOut = defaultdict[str, list[str]]  # names of files that are not samples, by kind

_HIDDEN = "hidden"
_UNSAFE = "with an absolute name, '..', a NUL character or more than 4096 characters"
_REPEATED = "of a name that a later entry has too"
_MAX_NAME = 4096
_MAX_WHOLE = 2**30  # bytes that any archive may hold
_MAX_RATIO = 100  # a larger archive may hold this many times its own bytes

_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_LOCAL_HEADER = struct.Struct("<4s22sHH")  # signature, fields that the directory repeats, lengths of name and extra
_MAX_ENTRIES = 10**7  # of a zip: 6 GB of memory. ImageNet has 1.3 million images
_ENCRYPTED = 0x1  # flag of a member of a zip
# zipfile raises any of these on a damaged central directory.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError, EOFError)
_AT_ONCE = 2**28  # bytes of images of a .tar.gz in memory, for which it is read once
_BLOCK = 2**20
_STEP_BACK = 2**16  # bytes; the reader of headers goes back less than this


class EntryError(ValueError):
    """An entry of an archive cannot be read. The message is a predicate: ``is damaged: ...``."""


class Entries(ABC):
    """Files of a source by their names.

    Args:
        path: The folder or the archive.
        title: Its name without an ending, which names the class of images without classes.

    Attributes:
        sizes: Length in bytes of each file.
        folders: Names of all folders.
        left_out: Names of what is not a readable file, by kind.
    """

    def __init__(self, path: Path, title: str) -> None:
        self.path, self.title = path, title
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self.left_out: LeftOut = defaultdict(list)

    def expect(self, names: Iterable[str]) -> None:  # noqa: B027  # only a compressed archive needs to know
        """Tells which files will be read next, and in which order."""

    def read(self, name: str, *, limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Returns the bytes of a file.

        Raises:
            OSError: if there is no such file, or it cannot be read.
            EntryError: if it is longer than ``limit`` bytes, or damaged.
        """
        if name not in self.sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if self.sizes[name] > limit:
            raise EntryError(f"must have at most {size_text(limit)}, got {size_text(self.sizes[name])}")
        return self._read(name)

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """Returns the bytes of a file of at most 256 MiB."""


def open_entries(path: Path) -> Entries:
    """Opens a folder, a zip, a tar or a tar compressed with gzip; the first bytes decide which.

    Args:
        path: The folder or the archive.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no archive, is damaged or encrypted, or would expand to implausibly many bytes, or a link
            in the folder leads out of it.
    """
    if path.is_dir():
        return _FolderEntries(path)
    if not path.exists():
        raise FileNotFoundError(
            f"source {printable(path)} does not exist; name a folder or an archive ({', '.join(_ENDINGS)}) of images"
        )
    try:
        with open(open_regular(path), "rb") as file:
            first = file.read(2)
    except OSError as error:
        raise ValueError(f"source {printable(path)} cannot be read: {error.strerror}") from error
    kind = {b"PK": _ZipEntries, b"\x1f\x8b": _GzipTarEntries}.get(first, _TarEntries)
    return kind(path)


class _FolderEntries(Entries):
    """The files of a folder and of its sub-folders.

    A symbolic link to a file of the folder is that file. Links to folders are not followed, so there are no loops.
    Names that begin with a dot are left out.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, path.resolve().name)
        waiting = [""]
        while waiting:
            waiting += self._scan(waiting.pop())

    def _scan(self, folder: str) -> Iterator[str]:
        """Takes the files of a folder, and yields the names of its sub-folders with a trailing ``/``."""
        with os.scandir(self.path / folder) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
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

    def _read(self, name: str) -> bytes:
        with open(open_regular(self.path / name), "rb") as file:
            return file.read(self.sizes[name])


class _ArchiveMember(NamedTuple):
    """A member of an archive.

    Args:
        name: Name as stored.
        size: Length in bytes, as the archive states it.
        offset: Position in the archive: of its bytes in a tar, of its local header in a zip.
        fault: Kind under which it is left out, such as ``"links"``; empty for a file or folder.
        is_folder: True for a folder.
        packed: Length of the compressed bytes in a zip, without the header.
        checksum: CRC-32 in a zip.
        is_deflated: True for a compressed member of a zip.
    """

    name: str
    size: int
    offset: int
    fault: str = ""
    is_folder: bool = False
    packed: int = 0
    checksum: int = 0
    is_deflated: bool = False


class _ArchiveEntries(Entries):
    """The files of an archive.

    If everything in the archive lies in one folder, its names begin inside that folder. Absolute names, names with
    ``..``, links, hidden names and ``__MACOSX`` are left out. Of several members with one name, the last one counts, as
    it would after unpacking.

    Args:
        path: The archive.

    Raises:
        ValueError: if it is damaged, or the members together are implausibly large for the archive.
    """

    def __init__(self, path: Path) -> None:
        lowered = path.name.lower()
        ending = max((ending for ending in _ENDINGS if lowered.endswith(ending)), key=len, default=path.suffix)
        super().__init__(path, path.name[: len(path.name) - len(ending)])
        members = self._list_members()
        _check_expansion(path, sum(member.size for member in members))
        files, folders = self._named_members(members)
        top = _single_folder([*files, *(f"{folder}/" for folder in folders)])
        self.title = top.rstrip("/") or self.title
        self.members = {name[len(top) :]: member for name, member in files.items()}
        self.sizes = {name: member.size for name, member in self.members.items()}
        parents = {parent for name in files for parent in _parents(name)}
        self.folders = {name[len(top) :] for name in folders | parents if len(name) > len(top)}

    @abstractmethod
    def _list_members(self) -> list[_ArchiveMember]:
        """Returns the members in their order."""

    def _read_at(self, size: int, offset: int) -> bytes:
        """Returns bytes of the archive."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _named_members(self, members: Iterable[_ArchiveMember]) -> tuple[dict[str, _ArchiveMember], set[str]]:
        """Returns the files by their cleaned names and the names of folders, and notes what is left out."""
        files, folders, hidden = dict[str, _ArchiveMember](), set[str](), dict[str, None]()
        for member in members:
            name = _clean_name(member.name)
            if name is None:
                self.left_out[_UNSAFE].append(member.name)
            elif not name:  # the folder "./" itself
                continue
            elif found := re.match(r"(?:.*?/)??(?:\.[^/]*|__MACOSX)(?=/|\Z)", name, re.DOTALL):
                hidden[found[0]] = None
            elif member.fault:
                self.left_out[member.fault].append(name)
            elif member.is_folder:
                folders |= {name, *_parents(name)}
            else:
                if name in files:
                    self.left_out[_REPEATED].append(name)
                files[name] = member
        if hidden:
            self.left_out[_HIDDEN] = list(hidden)
        return files, folders


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
    if name.startswith("/") or "\0" in name or name[1:3] in (":/", ":\\") or len(name) > _MAX_NAME:
        return None
    parts = name.split("/")
    if ".." in parts:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def _single_folder(names: Sequence[str]) -> str:
    """Returns the folder in which all names lie, with a trailing ``/``; empty if there is none."""
    tops = {name.partition("/")[:2] for name in names}
    return "".join(tops.pop()) if len(tops) == 1 and all("/" in name for name in names) else ""


class _ZipEntries(_ArchiveEntries):
    """The files of a zip; see ``_ArchiveEntries``."""

    def _list_members(self) -> list[_ArchiveMember]:
        shown, length = printable(self.path), self.path.stat().st_size
        try:
            with open(self.path, "rb") as stream, open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
                found = archive.infolist()
        except TooLargeDirectoryError as error:
            raise ValueError(
                f"archive {shown} must have {error}; extract it and name the folder, or make a tar of it"
            ) from error
        except _ZIP_ERRORS as error:
            raise ValueError(f"archive {shown} must be a complete zip, got: {printable(error)}") from error
        for info in found:
            name = printable(info.filename)
            if info.flag_bits & _ENCRYPTED:
                raise ValueError(
                    f"archive {shown} must not be encrypted, got the encrypted file {name}; decrypt it first"
                )
            if info.header_offset < 0 or info.header_offset + info.compress_size > length:
                raise ValueError(f"archive {shown} must be a complete zip, got {name} beyond its end")
        return [_zip_member(info) for info in found]

    def _read(self, name: str) -> bytes:
        member = self.members[name]
        # Deflate adds a few bytes to what it cannot compress. More would be read into memory for nothing.
        if member.packed > member.size + (member.size // 1000 + 65536 if member.is_deflated else 0):
            raise EntryError(f"is damaged: {size_text(member.packed)} in the zip for {size_text(member.size)}")
        # The central directory states all values; the local header only gives the lengths of its own fields.
        header = self._read_at(_LOCAL_HEADER.size, member.offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise EntryError("is damaged: its header in the zip is missing")
        _, _, name_length, extra = _LOCAL_HEADER.unpack(header)
        data = self._read_at(member.packed, member.offset + _LOCAL_HEADER.size + name_length + extra)
        if member.is_deflated:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
            except zlib.error as error:
                raise EntryError(f"is damaged: {error}") from error
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise EntryError("is damaged: its length or its checksum in the zip is wrong")
        return data


def _zip_member(info: zipfile.ZipInfo) -> _ArchiveMember:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the zip was not made on Unix
    fault = "links" if stat.S_ISLNK(kind) else ""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = "with a compression other than deflate"
    return _ArchiveMember(
        name=info.filename.replace("\\", "/"),  # as some programs of Windows write it
        size=info.file_size,
        offset=info.header_offset,
        fault=fault,
        is_folder=info.filename.endswith(("/", "\\")),
        packed=info.compress_size,
        checksum=info.CRC,
        is_deflated=info.compress_type == zipfile.ZIP_DEFLATED,
    )


class _TarEntries(_ArchiveEntries):
    """The files of a tar; see ``_ArchiveEntries``."""

    def _list_members(self) -> list[_ArchiveMember]:
        with open(self.path, "rb") as file:
            return self._tar_members(DescriptorBytes(file.fileno()))

    def _tar_members(self, data: TarBytes) -> list[_ArchiveMember]:
        faults = {"link": "links", "device": "devices", "sparse file": "sparse files"}
        try:
            return [
                _ArchiveMember(
                    name=member.name,
                    size=member.size,
                    offset=member.offset,
                    fault=faults.get(member.kind, ""),
                    is_folder=member.kind == "folder",
                )
                for member in read_members(data)
            ]
        except DamagedTarError as error:
            raise ValueError(
                f"source {printable(self.path)} must be a folder, a zip, a tar or a .tar.gz, got: {error}"
            ) from error

    def _read(self, name: str) -> bytes:
        return self._read_at(self.members[name].size, self.members[name].offset)


class _GzipTarEntries(_TarEntries):
    """The files of a tar that is compressed with gzip; see ``_ArchiveEntries``.

    It has no random access: it is read from its beginning once for each 256 MiB of expected images.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._expected: deque[str] = deque()
        self._loaded: dict[str, bytes] = {}

    def expect(self, names: Iterable[str]) -> None:
        self._expected, self._loaded = deque(names), {}

    def _list_members(self) -> list[_ArchiveMember]:
        try:
            # Decompressed once with its checksum; the number of bytes is limited.
            length = 0
            with gzip.open(self.path) as stream:
                while block := stream.read(_BLOCK):
                    length += len(block)
                    _check_expansion(self.path, length)
            with open(self.path, "rb") as raw:
                return self._tar_members(_GzipBytes(raw, length=length))
        except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
            raise ValueError(f"archive {printable(self.path)} must be a complete gzip file, got: {error}") from error

    def _read(self, name: str) -> bytes:
        if name not in self._loaded:
            window, size = [name], 0
            while self._expected and size < _AT_ONCE:
                window.append(self._expected.popleft())
                size += self.sizes.get(window[-1], 0)
            members = {name: self.members[name] for name in window if self.sizes.get(name, _AT_ONCE) < _AT_ONCE}
            with open(self.path, "rb") as raw:
                data = _GzipBytes(raw, length=0)
                in_order = sorted(members.items(), key=lambda item: item[1].offset)
                self._loaded = {name: data.read_at(member.size, member.offset) for name, member in in_order}
        return self._loaded.pop(name)


class _GzipBytes:
    """The decompressed bytes of a gzip file, for reads at positions that ascend but for steps of less than 64 KiB.

    Args:
        raw: The open file.
        length: Number of decompressed bytes.
    """

    def __init__(self, raw: Any, *, length: int) -> None:
        self.length = length
        self._stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)
        # The last bytes that were read serve the steps back; the stream would begin again at its first byte.
        self._kept, self._end = b"", 0

    def read_at(self, size: int, offset: int) -> bytes:
        """Returns up to ``size`` bytes at a position."""
        start = self._end - len(self._kept)
        if not start <= offset <= self._end:
            self._stream.seek(offset)
            self._kept, self._end, start = b"", offset, offset
        missing = offset + size - self._end
        data = self._kept[offset - start : offset - start + size]
        if missing > 0:
            more = self._stream.read(missing)
            data += more
            self._kept = (self._kept + more)[-_STEP_BACK:]
            self._end += len(more)
        return data

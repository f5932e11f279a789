"""Zip and tar archives as named files, read in place. Used by ``image_folder``.

Archives may be hostile: lengths are checked before memory is allocated, and expansion is limited.

Source: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.7: local file header; RFC 1952: gzip.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.sources.entries import (
    ArchiveEntries,
    ArchiveMember,
    Entries,
    EntryError,
    FolderEntries,
    check_expansion,
)
from maskgit_pl.data.tar import DamagedTarError, DescriptorBytes, TarBytes, read_members
from maskgit_pl.files import open_regular, size_text
from maskgit_pl.text import printable
from maskgit_pl.zip_directory import TooLargeDirectoryError, open_zip

__all__ = ["open_entries"]

_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_LOCAL_HEADER = struct.Struct("<4s22sHH")  # signature, fields that the directory repeats, lengths of name and extra
_MAX_ENTRIES = 10**7  # of a zip: 6 GB of memory. ImageNet has 1.3 million images
_ENCRYPTED = 0x1  # flag of a member of a zip
# zipfile raises any of these on a damaged central directory.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, OverflowError, EOFError)
_GZIP_ERRORS = (OSError, EOFError, zlib.error)  # gzip.BadGzipFile is an OSError
_AT_ONCE = 2**28  # bytes of images of a .tar.gz in memory, for which it is read once
_BLOCK = 2**20
_STEP_BACK = 2**16  # bytes; the reader of headers goes back less than this


def open_entries(path: Path) -> Entries:
    """Opens a folder, a zip, a tar or a tar compressed with gzip; the first bytes decide which.

    Args:
        path: The folder or the archive.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is no archive, is damaged or encrypted, or would expand to implausibly many bytes.
    """
    if path.is_dir():
        return FolderEntries(path)
    if not path.exists():
        raise FileNotFoundError(
            f"source {printable(path)} does not exist; name a folder or an archive ({', '.join(_ENDINGS)}) of images"
        )
    lowered = path.name.lower()
    ending = max((ending for ending in _ENDINGS if lowered.endswith(ending)), key=len, default=path.suffix)
    title = path.name.removesuffix(path.name[len(path.name) - len(ending) :]) if ending else path.name
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise ValueError(f"source {printable(path)} cannot be read: {error.strerror}") from error
    try:
        first = os.pread(descriptor, 4, 0)
        if first.startswith(b"PK"):
            return _ZipEntries(path, title, _zip_members(path))
        if first.startswith(b"\x1f\x8b"):
            return _GzipTarEntries(path, title, _gzip_tar_members(path))
        return _TarEntries(path, title, _tar_members(path, DescriptorBytes(descriptor)))
    finally:
        os.close(descriptor)


class _ZipEntries(ArchiveEntries):
    """The files of a zip; see ``ArchiveEntries``."""

    def read_member(self, member: ArchiveMember) -> bytes:
        # Deflate adds a few bytes to what it cannot compress. More would be read into memory for nothing.
        if member.packed > member.size + (member.size // 1000 + 65536 if member.is_deflated else 0):
            raise EntryError(f"is damaged: {size_text(member.packed)} in the zip for {size_text(member.size)}")
        # The central directory states all values; the local header only gives the lengths of its own fields.
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            header = os.pread(descriptor, _LOCAL_HEADER.size, member.offset)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
                raise EntryError("is damaged: its header in the zip is missing")
            _, _, name, extra = _LOCAL_HEADER.unpack(header)
            packed = os.pread(descriptor, member.packed, member.offset + _LOCAL_HEADER.size + name + extra)
        finally:
            os.close(descriptor)
        data = _inflate(packed, member.size) if member.is_deflated else packed
        if len(data) != member.size or zlib.crc32(data) != member.checksum:
            raise EntryError("is damaged: its length or its checksum in the zip is wrong")
        return data


def _inflate(packed: bytes, size: int) -> bytes:
    """Decompresses at most ``size + 1`` bytes."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
    except zlib.error as error:
        raise EntryError(f"is damaged: {error}") from error


def _zip_members(path: Path) -> list[ArchiveMember]:
    shown = printable(path)
    try:
        with open(path, "rb") as stream, open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
            found = archive.infolist()
    except TooLargeDirectoryError as error:
        raise ValueError(
            f"archive {shown} must have {error}; extract it and name the folder, or make a tar of it"
        ) from error
    except _ZIP_ERRORS as error:
        raise ValueError(f"archive {shown} must be a complete zip, got: {printable(error)}") from error
    length = path.stat().st_size
    for info in found:
        name = printable(info.filename)
        if info.flag_bits & _ENCRYPTED:
            raise ValueError(f"archive {shown} must not be encrypted, got the encrypted file {name}; decrypt it first")
        if info.header_offset < 0 or info.header_offset + info.compress_size > length:
            raise ValueError(f"archive {shown} must be a complete zip, got {name} beyond its end")
    return [_zip_member(info) for info in found]


def _zip_member(info: zipfile.ZipInfo) -> ArchiveMember:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 if the zip was not made on Unix
    fault = "links" if stat.S_ISLNK(kind) else ""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        fault = "with a compression other than deflate"
    return ArchiveMember(
        name=info.filename.replace("\\", "/"),  # as some programs of Windows write it
        size=info.file_size,
        offset=info.header_offset,
        fault=fault,
        is_folder=info.filename.endswith(("/", "\\")),
        packed=info.compress_size,
        checksum=info.CRC,
        is_deflated=info.compress_type == zipfile.ZIP_DEFLATED,
    )


class _TarEntries(ArchiveEntries):
    """The files of a tar; see ``ArchiveEntries``."""

    def read_member(self, member: ArchiveMember) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, member.size, member.offset)
        finally:
            os.close(descriptor)


def _tar_members(path: Path, data: TarBytes) -> list[ArchiveMember]:
    faults = {"link": "links", "device": "devices", "sparse file": "sparse files"}
    try:
        return [
            ArchiveMember(
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
            f"source {printable(path)} must be a folder, a zip, a tar or a .tar.gz, got: {error}"
        ) from error


class _GzipTarEntries(ArchiveEntries):
    """The files of a tar that is compressed with gzip; see ``ArchiveEntries``.

    It has no random access: it is read from its beginning once for each 256 MiB of images.
    """

    def readers(self, names: Iterable[str], *, limit: int = MAX_IMAGE_BYTES) -> Iterator[Callable[[], bytes]]:
        for window in self._windows(names, limit):
            loaded = self._load(window, limit)
            yield from (partial(self._take, loaded, name, limit) for name in window)

    def _windows(self, names: Iterable[str], limit: int) -> Iterator[list[str]]:
        """Yields successive names whose files have about 256 MiB together."""
        window, size = list[str](), 0
        for name in names:
            window.append(name)
            size += min(limit, self.sizes.get(name, 0))
            if size >= _AT_ONCE:
                yield window
                window, size = [], 0
        if window:
            yield window

    def _load(self, names: Iterable[str], limit: int) -> dict[str, bytes]:
        members = {name: self.members[name] for name in names if self.sizes.get(name, limit + 1) <= limit}
        in_order = sorted(members.items(), key=lambda item: item[1].offset)
        with open(self.path, "rb") as raw:
            data = _GzipBytes(raw, length=0)
            return {name: data.read_at(member.size, member.offset) for name, member in in_order}

    def _take(self, loaded: Mapping[str, bytes], name: str, limit: int) -> bytes:
        self.member(name, limit=limit)
        return loaded[name]


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


def _gzip_tar_members(path: Path) -> list[ArchiveMember]:
    try:
        length = _expanded_length(path)
        with open(path, "rb") as raw:
            return _tar_members(path, _GzipBytes(raw, length=length))
    except _GZIP_ERRORS as error:
        raise ValueError(f"archive {printable(path)} must be a complete gzip file, got: {error}") from error


def _expanded_length(path: Path) -> int:
    """Decompresses a gzip file, with its checksum, and returns the number of bytes; stops if they are too many."""
    length = 0
    with gzip.open(path) as stream:
        while block := stream.read(_BLOCK):
            length += len(block)
            check_expansion(path, length)
    return length

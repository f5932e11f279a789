"""Reader of the member headers of an uncompressed tar, safe with damaged and hostile files.

``tarfile`` stops silently at a damaged header or a missing end, reads extended headers of any declared length into
memory and takes 20 us per member. This reader raises an error, limits what it reads and takes a fifth of the time. It
supports the formats that writers of shards use: ustar, older tars, GNU long names and pax headers. It never extracts or
decompresses anything. ``scan`` reads all headers, ``manifest`` those at the start and end of a shard.

Source: POSIX.1-2001, ``pax``: ustar and pax formats; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np

from maskgit_pl.errors import printable

__all__ = [
    "BLOCK",
    "DamagedTarError",
    "DescriptorBytes",
    "Member",
    "TarBytes",
    "member_label",
    "parse_header",
    "read_members",
]

BLOCK = 512
Kind = Literal["file", "folder", "link", "device", "sparse file"]

_WINDOW_BYTES = 128 * BLOCK  # read ahead: 64 KiB
_MAX_EXTENDED_BYTES = 2**20  # of a long name or a pax header; a path has at most 4,096
# The first bytes of compressed files, to name the format in the error.
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Type flags of ustar; flags that are not listed are treated as devices.
_KINDS: Mapping[bytes, Kind] = {
    b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link",
    b"3": "device", b"4": "device", b"6": "device",
}  # fmt: skip


class DamagedTarError(ValueError):
    """The file is not a complete, uncompressed tar. The message gives the position of the damage."""


class Member(NamedTuple):
    """A member of a tar.

    Args:
        name: Name as stored.
        kind: Type of the member.
        size: Length of its payload in bytes.
        offset: Position of its payload in the file.
    """

    name: str
    kind: Kind
    size: int
    offset: int


class TarBytes(Protocol):
    """The bytes of a tar, which are read at positions that ascend but for steps of less than 64 KiB.

    Args:
        length: Number of bytes.
    """

    length: int

    def read_at(self, size: int, offset: int) -> bytes:
        """Returns ``size`` bytes at an offset, fewer at the end."""


class DescriptorBytes:
    """The bytes of an open file.

    Args:
        descriptor: Descriptor of the file; its position is not used.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.length = os.fstat(descriptor).st_size

    def read_at(self, size: int, offset: int) -> bytes:
        """Returns ``size`` bytes at an offset, fewer at the end."""
        return os.pread(self.descriptor, size, offset)


def read_members(file: TarBytes) -> Iterator[Member]:
    """Yields every member of a tar in order, reading only the headers.

    1. Read the header at the current offset; zeros end the tar.
    2. If it is an extended header (GNU long name, pax), keep its values for the next member, and continue after it.
    3. Else apply these values and yield the member, if its payload lies within the file.
    4. Continue at the next block after the payload.
    5. After the last member, check that only zeros follow.

    Args:
        file: Bytes of the tar.

    Raises:
        DamagedTarError: if the file is compressed or empty, a header is damaged, or the file is truncated.
    """
    window = _Window(file)
    offset = 0
    long_name, extended = "", dict[bytes, bytes]()
    while (header := window.block(offset)) is not None:  # 1.
        flag, size, name = header[156:157], _size(header), long_name or _name(header)
        # 2. L and K: GNU long name and long link; x: pax header; g: global pax header, which is not used.
        if flag in b"LKxg":
            if size > _MAX_EXTENDED_BYTES:
                raise DamagedTarError(
                    f"extended header at byte {offset} must have at most {_MAX_EXTENDED_BYTES} bytes, got {size}"
                )
            window.require(offset, size, name=name)
            data = file.read_at(size, offset + BLOCK)
            if flag == b"L":
                long_name = _text(data)
            elif flag == b"x":
                extended = _pax_records(data, offset)
            offset += BLOCK + _pad_to_block(size)
            continue
        if flag == b"S":  # GNU's sparse format: the header does not give the length in the file
            raise DamagedTarError(
                f"sparse member {printable(name)} at byte {offset}; create the tar without sparse files"
            )
        # 3. Values of a pax header replace those of the member's header.
        if extended:
            name = _text(extended[b"path"]) if b"path" in extended else name
            size = int(extended.get(b"size", size))
        member = _member(name, flag, size, offset + BLOCK, extended)
        if member.size:
            window.require(offset, member.size, name=name)
        yield member
        offset += BLOCK + _pad_to_block(member.size)  # 4.
        long_name, extended = "", {}
    window.require_end(offset)  # 5.


def parse_header(block: bytes) -> tuple[str, int] | None:
    """Returns the name and the payload length in a member header of 512 bytes; None if the bytes are not a header."""
    if len(block) != BLOCK or not _is_header(block, sum(block)):
        return None
    return _name(block), _size(block)


def member_label(shard: str, block: bytes, offset: int) -> str:
    """Returns ``SHARD:MEMBER`` in printable characters; ``SHARD:byte OFFSET`` if there is no header.

    Args:
        shard: Name of the tar.
        block: Header of the member: the block before its payload.
        offset: Position of the payload.
    """
    header = parse_header(block)
    return f"{shard}:byte {offset}" if header is None else f"{shard}:{printable(header[0])}"


class _Window:
    """A window of 64 KiB on a file, with the byte sum of each block.

    The checksum of a header is a sum of 512 bytes; NumPy computes the sums of a whole window in one call, which is much
    faster than one Python ``sum`` per header.
    """

    def __init__(self, file: TarBytes) -> None:
        self.file, self.length = file, file.length
        self.start, self.data, self.sums = 0, b"", list[int]()
        if not self.length:
            raise DamagedTarError("empty file")

    def block(self, offset: int) -> bytes | None:
        """Returns the header at an offset, or None for the zeros that end a tar."""
        if offset + BLOCK > self.length:
            where = "the end of the archive is missing" if offset >= self.length else "in a member header"
            raise DamagedTarError(f"truncated at byte {self.length}, {where}")
        place = offset - self.start
        if not 0 <= place <= len(self.data) - BLOCK:
            self._read(offset)
            place = 0
        # The window begins at a header and offsets advance by whole blocks, so ``place`` is a multiple of BLOCK.
        block, total = self.data[place : place + BLOCK], self.sums[place // BLOCK]
        if total == 0:
            return None
        if not _is_header(block, total):
            raise DamagedTarError(_not_a_header(offset, block))
        return block

    def require(self, offset: int, size: int, *, name: str) -> None:
        """Checks that the payload after the header at an offset lies within the file."""
        available = self.length - offset - BLOCK
        if size > available:
            stated = f"{size} bytes declared, the file ends after {available}"
            raise DamagedTarError(f"truncated in member {printable(name)} at byte {offset}: {stated}")

    def require_end(self, offset: int) -> None:
        """Checks that only zeros follow the last member, at least two blocks."""
        if self.length - offset < 2 * BLOCK:
            raise DamagedTarError(f"truncated at byte {self.length}, the end of the archive is missing")
        zeros = bytes(2**20)
        for start in range(offset, self.length, len(zeros)):
            data = self.file.read_at(len(zeros), start)
            if data != zeros[: len(data)]:
                what = "zeros instead of a member" if offset == 0 else "a damaged member header"
                raise DamagedTarError(f"{what} at byte {offset}, followed by other bytes")

    def _read(self, offset: int) -> None:
        data = self.file.read_at(_WINDOW_BYTES, offset)
        whole = len(data) - len(data) % BLOCK
        if not whole:
            raise DamagedTarError(f"truncated at byte {offset} while it was read")
        # (blocks, 512) uint8 -> one sum per block
        blocks = np.frombuffer(data, np.uint8, count=whole).reshape(-1, BLOCK)
        self.start, self.data, self.sums = offset, data[:whole], blocks.sum(1, dtype=np.uint32).tolist()


def _not_a_header(offset: int, block: bytes) -> str:
    if offset:
        return f"damaged member header at byte {offset}"
    packed = next((kind for magic, kind in _MAGIC.items() if block.startswith(magic)), None)
    if packed:
        return f"compressed ({packed}), decompress it"
    return f"not a tar, or its first header is damaged; it begins with {block[:8]!r}"


def _is_header(block: bytes, total: int) -> bool:
    """Returns whether a block has the right checksum: the sum of all bytes, with its own field as eight spaces.

    Args:
        block: The 512 bytes.
        total: Their sum.
    """
    field = block[148:156]
    try:
        return _number(field) == total - sum(field) + 8 * ord(" ")
    except ValueError:
        return False


def _size(header: bytes) -> int:
    try:
        return _number(header[124:136])
    except ValueError as error:
        raise DamagedTarError(f"member {printable(_name(header))}: its length is not a number") from error


def _number(field: bytes) -> int:
    """Reads a number of a header: octal digits or, if the first bit is set, GNU's base 256 (for 8 GiB and more)."""
    if field[0] & 0x80:
        number = int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big")
        if field[0] & 0x40:
            raise ValueError("negative")
        return number
    number = int(field.strip(b" \0") or b"0", 8)
    if number < 0:
        raise ValueError("negative")
    return number


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # Only ustar has a prefix; GNU's magic is "ustar " and its headers have times in this place.
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _member(name: str, flag: bytes, size: int, offset: int, extended: Mapping[bytes, bytes]) -> Member:
    kind = _KINDS.get(flag)
    if kind != "file":
        # Folders, links and devices have no payload, even if the header states a size; unknown types may have one.
        return Member(name, kind or "device", 0 if kind else size, offset)
    if name[-1:] == "/":  # in tars older than ustar
        return Member(name, "folder", size, offset)
    is_sparse = any(b"GNU.sparse" in key for key in extended)
    return Member(name, "sparse file" if is_sparse else "file", size, offset)


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    r"""Returns the records of a pax header, ``LENGTH KEY=VALUE\n`` each.

    LENGTH is decimal and counts the whole record, itself included.
    """
    records, place = {}, 0
    try:
        while place < len(data):
            space = data.index(b" ", place, place + 20)  # no length has more than 20 digits
            end = place + int(data[place:space])
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
            if end <= space or data[end - 1 : end] != b"\n" or not equals:
                raise ValueError
            if key == b"size" and not (value.isdigit() and len(value) <= 20):
                raise ValueError
            records[key] = value
            place = end
    except ValueError as error:
        raise DamagedTarError(f"damaged pax header at byte {offset}") from error
    return records


def _pad_to_block(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

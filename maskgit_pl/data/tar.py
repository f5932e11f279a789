"""Reader of the member headers of an uncompressed tar, safe with damaged and hostile files.

``tarfile`` stops silently at a damaged header or a missing end, reads extended headers of any declared length
into memory and takes five times as long per member. This reader raises an error and limits what it reads. It
supports the formats that writers of shards use: ustar, older tars, GNU long names and pax headers.

Source: POSIX.1-2001, ``pax``: ustar and pax formats; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple
from zlib import adler32

from maskgit_pl.text import printable

BLOCK = 512
Kind = Literal["file", "folder", "link", "device"]

_MAX_EXTENDED_BYTES = 2**20  # of a long name or a pax header; a path has at most 4,096
_KINDS: Mapping[bytes, Kind] = {b"0": "file", b"\0": "file", b"7": "file", b"5": "folder", b"1": "link", b"2": "link"}


class DamagedTarError(ValueError):
    """The file is not a complete, uncompressed tar. The message gives the position of the damage."""


class Member(NamedTuple):
    """A member of a tar: its name as stored, and the length and the position of its payload in bytes."""

    name: str
    kind: Kind
    size: int
    offset: int


def read_members(descriptor: int) -> Iterator[Member]:
    """Yields every member of a tar in order, reading only the headers.

    1. Read the header at the current offset; zeros end the tar.
    2. If it is an extended header (GNU long name, pax), keep its values for the next member, and continue after it.
    3. Else apply these values and yield the member, if its payload lies within the file.
    4. Continue at the next block after the payload.
    5. After the last member, check that only zeros follow.

    Args:
        descriptor: Descriptor of the open file; its position is not used.
    """
    length = os.fstat(descriptor).st_size
    if not length:
        raise DamagedTarError("empty file")
    offset, long_name, pax = 0, "", dict[bytes, bytes]()
    while (header := _read_header(descriptor, offset)) is not None:  # 1.
        flag, start = header[156:157], offset + BLOCK
        is_extended = flag in b"LKxg"  # GNU long name, GNU long link, pax header, global pax header
        member = _member(header, start) if is_extended else _member(header, start, long_name, pax)
        if is_extended and member.size > _MAX_EXTENDED_BYTES:
            raise DamagedTarError(
                f"extended header at byte {offset} must have at most {_MAX_EXTENDED_BYTES} bytes, got {member.size}"
            )
        if member.size > length - start:
            stated = f"{member.size} bytes declared, the file ends after {length - start}"
            raise DamagedTarError(f"truncated in member {printable(member.name)} at byte {offset}: {stated}")
        if flag == b"L":  # 2.
            long_name = _text(os.pread(descriptor, member.size, start))
        elif flag == b"x":
            pax = _pax_records(os.pread(descriptor, member.size, start), offset)
        elif not is_extended:  # 3.
            yield member
            long_name, pax = "", {}
        offset = start + -(-member.size // BLOCK) * BLOCK  # 4.
    _check_end(descriptor, offset, length)  # 5.


def parse_header(block: bytes) -> tuple[str, int] | None:
    """Returns the name and the payload length in a member header of 512 bytes; None if the bytes are not a header."""
    return (_name(block), _size(block)) if len(block) == BLOCK and _has_checksum(block) else None


def member_label(shard: str, block: bytes, offset: int) -> str:
    """Returns ``SHARD:MEMBER`` for the header before a payload, printable; ``SHARD:byte OFFSET`` if it is no header."""
    header = parse_header(block)
    return f"{shard}:byte {offset}" if header is None else f"{shard}:{printable(header[0])}"


def _read_header(descriptor: int, offset: int) -> bytes | None:
    """Returns the header at an offset, or None for the zeros that end a tar."""
    block = os.pread(descriptor, BLOCK, offset)
    if len(block) < BLOCK and offset:
        where = "in a member header" if block else "the end of the archive is missing"
        raise DamagedTarError(f"truncated at byte {os.fstat(descriptor).st_size}, {where}")
    if len(block) == BLOCK and (_has_checksum(block) or not any(block)):
        return block if any(block) else None
    if offset:
        raise DamagedTarError(f"damaged member header at byte {offset}")
    raise DamagedTarError(f"not an uncompressed tar, or its first header is damaged; it begins with {block[:8]!r}")


def _check_end(descriptor: int, offset: int, length: int) -> None:
    """Checks that only zeros follow the last member, at least two blocks."""
    if length - offset < 2 * BLOCK:
        raise DamagedTarError(f"truncated at byte {length}, the end of the archive is missing")
    for start in range(offset, length, 2**20):
        if any(os.pread(descriptor, 2**20, start)):
            raise DamagedTarError(f"damaged member header at byte {offset}: zeros, followed by other bytes")


def _has_checksum(header: bytes) -> bool:
    """Returns whether a header has the right checksum: the sum of all bytes, with its own field as eight spaces.

    Adler-32 has this sum plus 1, modulo 65521, in its lower half, twenty times as fast as a sum in Python.
    """
    field = header[148:156]
    try:
        stated = _number(field) + sum(field) - 8 * ord(" ")
        return (stated + 1) % 65521 == adler32(header) & 0xFFFF
    except ValueError:
        return False


def _member(header: bytes, start: int, long_name: str = "", pax: Mapping[bytes, bytes] = {}) -> Member:
    """Returns the member of a header, whose payload begins at ``start``.

    ``long_name`` is the GNU long name before the header; the values of the pax header before it replace its own.
    """
    flag, size, name = header[156:157], _size(header), long_name or _name(header)
    if pax:
        name = _text(pax[b"path"]) if b"path" in pax else name
        size = int(pax.get(b"size", size))
    kind = _KINDS.get(flag, "device")
    if flag in b"123456":  # links, devices and folders have no payload, even if the header states a size
        size = 0
    elif kind == "file" and name.endswith("/"):  # in tars older than ustar
        kind = "folder"
    return Member(name, kind, size, start)


def _size(header: bytes) -> int:
    try:
        return _number(header[124:136])
    except ValueError as error:
        raise DamagedTarError(f"member {printable(_name(header))}: its length is not a number") from error


def _number(field: bytes) -> int:
    """Reads a number of a header: octal digits or, if the first bit is set, GNU's base 256 (for 8 GiB and more)."""
    if field[0] == 0x80:  # 0xFF would be a negative number
        return int.from_bytes(field[1:], "big")
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


def _pax_records(data: bytes, offset: int) -> dict[bytes, bytes]:
    r"""Returns the records of a pax header, ``LENGTH KEY=VALUE\n`` each.

    LENGTH is decimal and counts the whole record, itself included.
    """
    records, start = {}, 0
    try:
        while start < len(data):
            space = data.index(b" ", start, start + 20)  # no length has more than 20 digits
            end = start + int(data[start:space])
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
            is_record = end > space and data[end - 1 : end] == b"\n" and equals
            if not is_record or (key == b"size" and not (value.isdigit() and len(value) <= 20)):
                raise ValueError
            records[key] = value
            start = end
    except ValueError as error:
        raise DamagedTarError(f"damaged pax header at byte {offset}") from error
    return records

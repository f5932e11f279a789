"""The size of the pages of a parquet file, so that one which expands a thousandfold is rejected before it is read.

The footer states sizes too, but they may be wrong, so the page headers are read here. A page header is a Thrift struct
in the compact protocol. Its field 2 is the decompressed length of the page's content, field 3 its length in the file.
Used by ``parquet``.

Source: apache/parquet-format, ``parquet.thrift``; apache/thrift, ``thrift-compact-protocol.md``.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

from maskgit_pl.files import open_regular, size_text

__all__ = ["check_parquet"]

_MAX_FOOTER_BYTES = 2**25
_MAX_PAGE_BYTES = 2**29  # decompressed; writers end a page after about 1 MB
_WINDOW = 2**14  # bytes that are read for a header; its statistics have at most 8 kB
# Type codes of the compact protocol; the two booleans have no bytes of their own.
_BOOLEANS, _INTEGERS, _BINARY, _STRUCT = (1, 2), (4, 5, 6), 8, 12
_LENGTHS = {3: 1, 7: 8}  # bytes of a byte and a double
_MAX_DEPTH = 4  # of structs in a header


def check_parquet(path: str | Path) -> tuple[int, int]:
    """Checks that a parquet file can be read within bounded memory.

    Args:
        path: The file.

    Returns:
        The number of rows, and the decompressed bytes of the largest page.

    Raises:
        OSError: if it cannot be opened or is not a regular file.
        ValueError: if it is not a parquet file, its footer has more than 32 MiB, a page more than 512 MiB, or a page
            header is damaged. ``ArrowInvalid`` is one.
    """
    from pyarrow import parquet

    with open(open_regular(path), "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 8))
        # A file ends with the length of its footer (4 bytes) and the magic bytes; pyarrow reads any footer.
        footer = int.from_bytes(file.read(4), "little")
        if file.read(4) == b"PAR1" and footer > _MAX_FOOTER_BYTES:
            limit = size_text(_MAX_FOOTER_BYTES)
            raise ValueError(f"its footer must have at most {limit}, got {size_text(footer)}")
        file.seek(0)
        metadata = parquet.read_metadata(file)
        largest = 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                # There may be no dictionary page.
                starts = (column.dictionary_page_offset, column.data_page_offset)
                start = min((offset for offset in starts if offset), default=0)
                end = start + column.total_compressed_size
                if not 0 <= start <= end <= length:
                    raise ValueError(f"its pages must lie within its {length} bytes, got {start} to {end}")
                largest = max(largest, _largest_page(file, start, end))
    if largest > _MAX_PAGE_BYTES:
        limit = size_text(_MAX_PAGE_BYTES)
        raise ValueError(f"its pages must have at most {limit}, got {size_text(largest)}")
    return metadata.num_rows, largest


def _largest_page(file: IO[bytes], start: int, end: int) -> int:
    """Returns the decompressed bytes of the largest page; pages follow each other: header, content, header ..."""
    place, largest = start, 0
    while place < end:
        file.seek(place)
        header = io.BytesIO(file.read(min(_WINDOW, end - place)))
        try:
            fields = _read_struct(header, _MAX_DEPTH)
            expanded, stored = fields[2], fields[3]
        except (IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"damaged page header at byte {place}") from error
        place += header.tell() + stored
        if expanded < 0 or stored < 0 or place > end:
            raise ValueError(f"damaged page of {stored} bytes before byte {place}")
        largest = max(largest, expanded)
    return largest


def _read_struct(header: io.BytesIO, depth: int) -> dict[int, int]:
    """Reads a struct of Thrift's compact protocol.

    Args:
        header: Bytes of the header, at the beginning of the struct.
        depth: Allowed depth of nested structs.

    Returns:
        The integer fields by their numbers; the others are skipped.

    Raises:
        IndexError: if the bytes end within the struct.
        KeyError: if it has a list, a map or too long a number, which page headers do not have.
    """
    fields, number = dict[int, int](), 0
    while (head := header.read(1)[0]) != 0:
        # Low 4 bits: type; high 4 bits: difference from the last field number, 0 if the number follows.
        kind = head & 0x0F
        number = number + (head >> 4) if head >> 4 else _read_integer(header)
        if kind in _INTEGERS:
            fields[number] = _read_integer(header)
        elif kind == _STRUCT and depth:
            _read_struct(header, depth - 1)
        elif kind == _BINARY:
            header.seek(_read_varint(header), os.SEEK_CUR)
        elif kind not in _BOOLEANS:
            header.seek(_LENGTHS[kind], os.SEEK_CUR)
    return fields


def _read_integer(header: io.BytesIO) -> int:
    value = _read_varint(header)
    return value >> 1 ^ -(value & 1)  # zigzag: the lowest bit is the sign


def _read_varint(header: io.BytesIO) -> int:
    # 7 bits per byte, lowest first; the top bit says that more follow
    value = 0
    for shift in range(0, 64, 7):
        byte = header.read(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise KeyError("a varint has at most 10 bytes")

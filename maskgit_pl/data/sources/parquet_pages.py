"""Page headers of a parquet file: rejects a page that expands a thousandfold before pyarrow decompresses it.

The footer states sizes too, but they may be wrong. A page header is a Thrift struct in the compact protocol. Its field
2 is the decompressed length of the page's content, field 3 its length in the file. Used by ``parquet``.

Source: apache/parquet-format, ``parquet.thrift``; apache/thrift, ``thrift-compact-protocol.md``.
"""

from __future__ import annotations

import os

__all__ = ["largest_page"]

_WINDOW = 2**14  # bytes that are read for a header; its statistics have at most 8 kB
# Type codes of the compact protocol; the two booleans have no bytes of their own.
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12
_MAX_DEPTH = 4  # of structs in a header


def largest_page(descriptor: int, start: int, length: int) -> int:
    """Returns the decompressed size in bytes of the largest page of a column chunk.

    Args:
        descriptor: Descriptor of the open file.
        start: Offset of the chunk's first page.
        length: Length of the chunk in the file, in bytes.

    Raises:
        ValueError: if the chunk is not within the file, a header is damaged or a page is longer than the chunk.
    """
    size = os.fstat(descriptor).st_size
    if not 0 <= start <= start + length <= size:
        raise ValueError(f"pages at bytes {start} to {start + length} must be within the file of {size} bytes")
    place, end, largest = start, start + length, 0
    # The pages follow each other: header, content, header, content ...
    while place < end:
        reader = _Reader(os.pread(descriptor, min(_WINDOW, end - place), place))
        try:
            fields = reader.read_struct(_MAX_DEPTH)
            expanded, stored = fields[2], fields[3]
        except (IndexError, KeyError) as error:
            raise ValueError(f"damaged page header at byte {place}") from error
        place += reader.place + stored
        if expanded < 0 or stored < 0 or place > end:
            raise ValueError(f"damaged page of {stored} bytes before byte {place}")
        largest = max(largest, expanded)
    return largest


class _Reader:
    """A reader of Thrift's compact protocol from the bytes of a header."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def read_struct(self, depth: int) -> dict[int, int]:
        """Returns the integer fields of a struct by their numbers, and skips the others.

        Args:
            depth: Allowed depth of nested structs.
        """
        fields, number = dict[int, int](), 0
        while (head := self._byte()) != 0:
            # Low 4 bits: type; high 4 bits: difference from the last field number, 0 if the number follows.
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else _decode_zigzag(self._varint())
            if kind in _INTEGERS:
                fields[number] = _decode_zigzag(self._varint())
            else:
                self._skip(kind, depth)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        if kind == _STRUCT and depth:
            self.read_struct(depth - 1)
        elif kind in (_BYTE, _DOUBLE, _BINARY):
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint()
            self.place += length
        elif kind not in _BOOLEANS:
            raise KeyError(kind)  # page headers have no lists or maps

    def _varint(self) -> int:
        # 7 bits per byte, lowest first; the top bit says that more follow
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise KeyError("a varint has at most 10 bytes")

    def _byte(self) -> int:
        byte = self.data[self.place]
        self.place += 1
        return byte


def _decode_zigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)

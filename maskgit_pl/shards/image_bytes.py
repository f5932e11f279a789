"""The bytes of an image file before anything is decoded: its kind, its parts, and whether it is whole.

A stranger may have written the file: bytes, chunks of a PNG, segments and scans of a JPEG are counted here, so that
none takes minutes or gigabytes to open. Used by ``images``, which decodes, and by what only looks at files.
"""

from __future__ import annotations

import re
import stat
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from maskgit_pl.files import size_text
from maskgit_pl.text import printable

__all__ = [
    "JPEG_MAGIC",
    "MAX_IMAGE_BYTES",
    "MAX_PIXELS",
    "PNG_MAGIC",
    "Reason",
    "UnreadableImageError",
    "check_jpeg",
    "check_png",
    "check_size",
    "check_whole",
    "image_error",
    "is_plain_png",
    "kind_of_fault",
    "may_be_rotated",
    "png_chunks",
    "read_image_file",
]

MAX_PIXELS = 64 * 10**6
MAX_IMAGE_BYTES = 256 * 2**20  # no photo within the pixel limit needs more
MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each costs time for all pixels
_MAX_CHUNKS = 100_000  # of a PNG; a file of the largest size has 32,768 of 8 kB ...
_MAX_OTHER_CHUNKS = 256  # ... and these, that hold no pixels; libpng may print a line for each
_PIXEL_CHUNKS = (b"IDAT", b"fcTL", b"fdAT")
_MAX_SEGMENTS = 2_000  # of a JPEG before its pixels, which hold at most ...
_MAX_METADATA = 32 * 2**20  # ... so many bytes: profiles, EXIF, depth maps of phones
_MAX_FILLER = 1_000  # bytes between those segments
_MAX_MARKERS = 20_000  # of a JPEG, with those between its scans
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG, with a segment after it; and its end
_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the segments that state the size and the coding
Reason = Literal["empty", "not an image", "animated", "too large", "damaged"]


class UnreadableImageError(ValueError):
    """The bytes are not an image that we read.

    Args:
        text: What to tell a person.
        reason: The kind of fault, for counting.
    """

    def __init__(self, text: str, *, reason: Reason = "damaged") -> None:
        super().__init__(text)
        self.reason: Reason = reason


def read_image_file(path: str | Path, *, name: str) -> bytes:
    """Reads an image file, after a look at its kind, its length and its first bytes.

    Args:
        path: The file.
        name: What to call it in an error.

    Returns:
        The whole file's bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableImageError: if it is no regular file, empty, larger than 256 MiB, or begins as no JPEG, PNG or WebP.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # a FIFO would be waited for
        raise UnreadableImageError(f"image {name} must be a regular file", reason="not an image")
    if status.st_size > MAX_IMAGE_BYTES:
        most, size = size_text(MAX_IMAGE_BYTES), size_text(status.st_size)
        raise UnreadableImageError(f"image {name} must have at most {most}, got {size}", reason="too large")
    with open(path, "rb") as file:
        first = file.read(12)  # the magic bytes
        if kind_of_fault(first) != "damaged":
            raise image_error(first, name)
        file.seek(0)
        return file.read(status.st_size)


def check_whole(data: bytes, *, name: str) -> None:
    """Checks that an image is not cut off, without decoding it.

    PNG is checked by its chunks and their checksums, JPEG by its end marker, WebP by the length that it states.

    Args:
        data: The bytes of a file whose header ``parse_image_header`` can read.
        name: What to call the image in an error.

    Raises:
        UnreadableImageError: if a part is missing or, in PNG, damaged.
    """
    if data.startswith(PNG_MAGIC):
        whole = False
        for chunk in png_chunks(data):
            if chunk.end + 4 > len(data):
                break
            if chunk.name[:1].isupper() and not chunk.is_intact(data):
                part = printable(chunk.name.decode("latin1"))
                raise UnreadableImageError(f"image {name} is damaged in its {part} chunk")
            whole = chunk.name == b"IEND"
    elif data.startswith(JPEG_MAGIC):
        whole = any(marker.code == _END_OF_IMAGE for marker in _jpeg_markers(data))
    else:
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not whole:
        raise UnreadableImageError(f"image {name} is cut off after {len(data)} bytes")


def check_size(height: int, width: int, name: str) -> None:
    """Checks that an image has at most 64 million pixels.

    Raises:
        UnreadableImageError: if it has more.
    """
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"image {name} must have at most {MAX_PIXELS} pixels, got {width} x {height}", reason="too large"
        )


def kind_of_fault(data: bytes) -> Reason:
    """Returns what is wrong with bytes that cannot be opened, by the first 12 of them."""
    if not data:
        return "empty"
    ours = data.startswith((JPEG_MAGIC, PNG_MAGIC)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    return "damaged" if ours else "not an image"


def image_error(data: bytes, name: str, why: str = "") -> UnreadableImageError:
    """Returns the error of bytes that cannot be opened, by the first 12 of them."""
    reason = kind_of_fault(data)
    if reason == "empty":
        text = f"image {name} is empty"
    elif reason == "not an image":
        text = f"image {name} must be a JPEG, PNG or WebP file, got one that begins with {data[:8]!r}"
    else:
        text = f"image {name} is damaged: {why}"
    return UnreadableImageError(text, reason=reason)


class _Chunk(NamedTuple):
    """A part of a PNG: its name, and where its content begins and ends; a checksum follows."""

    name: bytes
    start: int
    end: int

    def is_intact(self, data: bytes) -> bool:
        """Returns whether the checksum is right."""
        stated = int.from_bytes(data[self.end : self.end + 4], "big")
        return zlib.crc32(memoryview(data)[self.start - 4 : self.end]) == stated


def png_chunks(data: bytes) -> Iterator[_Chunk]:
    """Yields the chunks of a PNG whose names and lengths are there, up to the one that ends it."""
    place = len(PNG_MAGIC)
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        yield _Chunk(name, place + 8, place + 8 + length)
        if name == b"IEND":
            return
        place += 12 + length


def check_png(data: bytes, name: str) -> frozenset[bytes]:
    """Refuses a PNG of so many chunks that it takes minutes to read them.

    Returns:
        Names of its chunks.
    """
    chunks = [chunk.name for chunk in islice(png_chunks(data), _MAX_CHUNKS + 1)]
    others = len(chunks) - sum(map(chunks.count, _PIXEL_CHUNKS))
    if len(chunks) > _MAX_CHUNKS or others > _MAX_OTHER_CHUNKS:
        limits = f"{_MAX_CHUNKS} PNG chunks and {_MAX_OTHER_CHUNKS} without pixels"
        raise UnreadableImageError(f"image {name} must have at most {limits}, got more", reason="too large")
    return frozenset(chunks)


def is_plain_png(data: bytes, chunks: frozenset[bytes], channels: int) -> bool:
    """Returns whether a PNG is 8-bit grey or RGB, within the pixel limit, not transparent, animated or turned."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        return False
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    odd = not chunks.isdisjoint((b"tRNS", b"acTL", b"eXIf")) or b"tiff:Orientation" in data
    fits = 0 < width * height <= MAX_PIXELS
    return depth == 8 and fits and not odd and (colour == 0 or (colour == 2 and channels == 3))


class _Marker(NamedTuple):
    """A marker of a JPEG: its code, where it begins, and where the segment after it ends."""

    code: int
    start: int
    end: int


def _jpeg_markers(data: bytes) -> Iterator[_Marker]:
    """Yields the markers of a JPEG that have a segment, as libjpeg finds them, and the one that ends the image."""
    place = 2
    for _ in range(_MAX_MARKERS):
        if (found := _MARKER.search(data, place)) is None:
            return
        code, place = data[found.end() - 1], found.end()
        if code != _END_OF_IMAGE:
            place += int.from_bytes(data[place : place + 2], "big")
        yield _Marker(code, found.start(), place)
        if code == _END_OF_IMAGE:
            return


def _jpeg_head(data: bytes) -> list[_Marker]:
    """Returns the markers of a JPEG up to the first that begins pixels."""
    head = []
    for marker in islice(_jpeg_markers(data), _MAX_SEGMENTS):
        head.append(marker)
        if marker.code == _SCAN:
            break
    return head


def check_jpeg(data: bytes, name: str) -> None:
    """Refuses a JPEG that would take minutes to open or to decode.

    Raises:
        UnreadableImageError: if there are no pixels behind a bounded number of segments, or more than 100 scans.
    """
    head = _jpeg_head(data)
    if not head or head[-1].code != _SCAN:
        raise UnreadableImageError(f"image {name} is damaged: no pixels after {len(head)} segments")
    before = head[-1].start
    if before > _MAX_METADATA:
        most = size_text(_MAX_METADATA)
        raise UnreadableImageError(
            f"image {name} must have at most {most} before its pixels, got {size_text(before)}", reason="too large"
        )
    if before - 2 - sum(marker.end - marker.start for marker in head[:-1]) > _MAX_FILLER:
        raise UnreadableImageError(f"image {name} is damaged: over {_MAX_FILLER} bytes between its segments")
    # as many scans at most: these bytes may also stand in a segment; where one scan is all, libjpeg allows no other
    if _has_more_scans(data, head) and data.count(b"\xff\xda") > MAX_SCANS:
        codes = [marker.code for marker in _jpeg_markers(data)]
        if codes.count(_SCAN) > MAX_SCANS or codes[-1] != _END_OF_IMAGE:
            raise UnreadableImageError(
                f"image {name} must have at most {MAX_SCANS} JPEG scans, got more", reason="too large"
            )


def _has_more_scans(data: bytes, head: list[_Marker]) -> bool:
    """Returns whether the first scan of a JPEG leaves something to others: bits, coefficients or colours."""
    frames = [marker for marker in head if marker.code in _FRAMES]
    if len(frames) != 1 or frames[0].code > 0xC1:  # not baseline
        return True
    scan, frame = head[-1].start + 4, frames[0].start + 9  # where the numbers of colours stand
    return data[scan : scan + 1] != data[frame : frame + 1]


def may_be_rotated(jpeg: bytes) -> bool:
    """Returns whether a JPEG has a segment of EXIF or XMP before its pixels."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker in (_APP1, _SCAN):
            return marker == _APP1
        place += 1 if marker == 0xFF else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")  # 0xFF may fill
    return False

"""Checks of an image file's bytes before decoding: its format, its parts, and whether it is complete.

Files may be hostile. Bytes, PNG chunks, JPEG segments and JPEG scans are counted and limited here, so that no file
takes minutes or gigabytes to open. Pillow gets only those chunks of a PNG on which pixels and orientation depend, after
a check of their sizes and checksums. Profiles, texts and animations never reach it, so that they cost nothing and
cannot fail. Used by ``images``, which decodes, and by the code that reads only headers.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from maskgit_pl.errors import printable
from maskgit_pl.files import size_text

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngImageFile

__all__ = [
    "JPEG_MAGIC",
    "MAX_IMAGE_BYTES",
    "MAX_PIXELS",
    "PNG_MAGIC",
    "Reason",
    "UnreadableImageError",
    "check_complete",
    "check_jpeg",
    "check_size",
    "check_webp",
    "image_error",
    "kind_of_fault",
    "may_be_rotated",
    "open_png",
    "open_png_header",
    "read_image_file",
]

Reason = Literal["empty", "not an image", "animated", "too large", "damaged"]

MAX_PIXELS = 64 * 10**6
MAX_IMAGE_BYTES = 256 * 2**20  # no photo within the pixel limit needs more

JPEG_MAGIC = b"\xff\xd8\xff"
_MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each takes time for all pixels
_MAX_SEGMENTS = 2_000  # of a JPEG before its pixels
_MAX_METADATA = 32 * 2**20  # bytes of these segments: profiles, EXIF, depth maps of phones
_MAX_FILLER = 1_000  # bytes between these segments
_MAX_MARKERS = 20_000  # of a JPEG, including the markers between its scans
# Markers of a JPEG that have a segment, and the end marker; not 0xFF00 (a data byte) and restart markers.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the segments that state the size and the coding

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000  # of a PNG; a file of the largest size has 32,768 of 8 kB
_MAX_OTHER_CHUNKS = 256  # chunks without pixels; libpng may print a line for each
_PIXEL_CHUNKS = (b"IDAT", b"fcTL", b"fdAT")
_MAX_RATIO = 1032  # of deflate: a block of 258 equal bytes takes 2 bits
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by the colour type
_XMP = b"XML:com.adobe.xmp\0"  # beginning of the iTXt chunk that may hold an orientation
_END = b"\0\0\0\0IEND\xaeB`\x82"


class UnreadableImageError(ValueError):
    """The bytes are not an image that can be read.

    Args:
        text: The error message.
        reason: Kind of the fault, for statistics.
    """

    def __init__(self, text: str, *, reason: Reason = "damaged") -> None:
        super().__init__(text)
        self.reason: Reason = reason


def read_image_file(path: str | Path, *, name: str) -> bytes:
    """Reads an image file, after a check of its type, its length and its first bytes.

    Args:
        path: The file.
        name: The image's name in error messages.

    Returns:
        All bytes of the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        UnreadableImageError: if it is not a regular file, is empty, is larger than 256 MiB, or does not begin like a
            JPEG, PNG or WebP.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO would block
        raise UnreadableImageError(f"image {name} must be a regular file", reason="not an image")
    if status.st_size > MAX_IMAGE_BYTES:
        limit, size = size_text(MAX_IMAGE_BYTES), size_text(status.st_size)
        raise UnreadableImageError(f"image {name} must have at most {limit}, got {size}", reason="too large")
    with open(path, "rb") as file:
        first = file.read(12)  # the magic bytes
        if kind_of_fault(first) != "damaged":
            raise image_error(first, name)
        file.seek(0)
        return file.read(status.st_size)


def check_complete(data: bytes, *, name: str) -> None:
    """Checks that an image is not truncated, without decoding it.

    PNG is checked by its chunks and their checksums, JPEG by its end marker, WebP by the length in its header.

    Args:
        data: All bytes of a file whose header ``parse_image_header`` accepts.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if a part is missing or, in PNG, damaged.
    """
    if data.startswith(PNG_MAGIC):
        whole = False
        for chunk in _png_chunks(data):
            if chunk.is_critical:
                _check_chunk(chunk, data, name=name)
            whole = chunk.name == b"IEND"
    elif data.startswith(JPEG_MAGIC):
        whole = any(marker.code == _END_OF_IMAGE for marker in _jpeg_markers(data))
    else:
        # RIFF: the length of what follows the first 8 bytes
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not whole:
        raise _truncated_error(data, name)


def check_size(height: int, width: int, name: str) -> None:
    """Checks that an image has at most 64 million pixels.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if it has more.
    """
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"image {name} must have at most {MAX_PIXELS} pixels, got {width} x {height}", reason="too large"
        )


def kind_of_fault(data: bytes) -> Reason:
    """Returns the kind of fault of an image that cannot be opened, from its first 12 bytes."""
    if not data:
        return "empty"
    known = data.startswith((JPEG_MAGIC, PNG_MAGIC)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    return "damaged" if known else "not an image"


def image_error(data: bytes, name: str, why: str = "") -> UnreadableImageError:
    """Returns the error for an image that cannot be opened.

    Args:
        data: At least its first 12 bytes, or all if it is shorter.
        name: The image's name in error messages.
        why: The decoder's reason, for files that begin like an image.
    """
    reason = kind_of_fault(data)
    if reason == "empty":
        text = f"image {name} is empty"
    elif reason == "not an image":
        text = f"image {name} must be a JPEG, PNG or WebP file, got one that begins with {data[:8]!r}"
    else:
        text = f"image {name} is damaged: {why}"
    return UnreadableImageError(text, reason=reason)


def _truncated_error(data: bytes, name: str) -> UnreadableImageError:
    return UnreadableImageError(f"image {name} is truncated after {len(data)} bytes")


def check_jpeg(data: bytes, name: str) -> None:
    """Checks that a JPEG does not take minutes to open or to decode.

    1. Its pixels begin after at most 2,000 segments, 32 MiB of segments and 1,000 bytes between segments.
    2. It has at most 100 scans. Counting the bytes of a scan marker is fast and gives an upper limit, since they may
       also occur inside a segment. The markers are walked only if this limit is above 100.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if a limit is exceeded.
    """
    # 1.
    head = _jpeg_head(data)
    if not head or head[-1].code != _SCAN:
        raise UnreadableImageError(f"image {name} is damaged: no pixels after {len(head)} segments")
    before = head[-1].start
    if before > _MAX_METADATA:
        limit = size_text(_MAX_METADATA)
        raise UnreadableImageError(
            f"image {name} must have at most {limit} before its pixels, got {size_text(before)}", reason="too large"
        )
    if before - 2 - sum(marker.end - marker.start for marker in head[:-1]) > _MAX_FILLER:
        raise UnreadableImageError(f"image {name} is damaged: over {_MAX_FILLER} bytes between its segments")
    # 2. If the first scan is complete, libjpeg rejects a second one itself.
    if _has_more_scans(data, head) and data.count(b"\xff\xda") > _MAX_SCANS:
        codes = [marker.code for marker in _jpeg_markers(data)]
        if codes.count(_SCAN) > _MAX_SCANS or codes[-1] != _END_OF_IMAGE:
            raise UnreadableImageError(
                f"image {name} must have at most {_MAX_SCANS} JPEG scans, got more", reason="too large"
            )


def may_be_rotated(jpeg: bytes) -> bool:
    """Returns whether a JPEG has an EXIF or XMP segment before its pixels, which may give an orientation."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker in (_APP1, _SCAN):
            return marker == _APP1
        place += 1 if marker == 0xFF else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")  # 0xFF bytes may pad
    return False


def _has_more_scans(data: bytes, head: list[_Marker]) -> bool:
    """Returns whether the first scan of a JPEG leaves bits, coefficients or colours to further scans.

    Args:
        data: All bytes of the file.
        head: Its markers up to the first start of scan.
    """
    frames = [marker for marker in head if marker.code in _FRAMES]
    if len(frames) != 1 or frames[0].code > 0xC1:  # not baseline or extended sequential
        return True
    scan, frame = head[-1].start + 4, frames[0].start + 9  # positions of the number of colour components
    return data[scan : scan + 1] != data[frame : frame + 1]


def _jpeg_head(data: bytes) -> list[_Marker]:
    """Returns the markers of a JPEG up to the first start of scan, after which pixels follow."""
    head = []
    for marker in islice(_jpeg_markers(data), _MAX_SEGMENTS):
        head.append(marker)
        if marker.code == _SCAN:
            break
    return head


def _jpeg_markers(data: bytes) -> Iterator[_Marker]:
    """Yields the markers of a JPEG that have a segment, found as libjpeg finds them, and the end marker."""
    place = 2  # after the start marker
    for _ in range(_MAX_MARKERS):
        if (found := _MARKER.search(data, place)) is None:
            return
        code, place = data[found.end() - 1], found.end()
        if code != _END_OF_IMAGE:
            place += int.from_bytes(data[place : place + 2], "big")  # length of the segment, these 2 bytes included
        yield _Marker(code, found.start(), place)
        if code == _END_OF_IMAGE:
            return


class _Marker(NamedTuple):
    """A marker of a JPEG: its code, its position, and the end of its segment."""

    code: int
    start: int
    end: int


def check_webp(data: bytes, name: str) -> None:
    """Checks that a WebP has at most 64 million pixels, since its decoder reserves memory when it opens the file.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if its first part states a larger image.

    Source:
        RFC 9649, sections 2.5 to 2.7.
    """
    kind, start = data[12:16], 20  # the parts have a name and a length, 4 bytes each
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[start + at : start + at + 3], "little") for at in (4, 7))
    elif kind == b"VP8L":
        sides = int.from_bytes(data[start + 1 : start + 5], "little")
        width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    else:  # "VP8 ", or damaged
        width, height = (int.from_bytes(data[start + at : start + at + 2], "little") & 0x3FFF for at in (6, 8))
    check_size(height, width, name)


def open_png_header(data: bytes, name: str) -> PngImageFile:
    """Opens a PNG without its pixels, for its size, mode and orientation.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if it is damaged before its pixels, animated, or has more than 100,000 chunks, 256 chunks
            without pixels, or 64 million pixels.
        Exception: an error of Pillow, if it rejects a chunk.
    """
    chunks = _list_chunks(data, name)
    _read_png_header(data, name)
    return _open(_head(chunks, data, name))


def open_png(data: bytes, name: str) -> PngImageFile:
    """Opens a PNG whose pixels Pillow decodes when they are read.

    1. Check the number of chunks, the size and, for animations, the number of frames.
    2. Check that no critical chunk before the end mark is damaged or truncated; Pillow does not notice all damage.
    3. Check that the compressed bytes can be enough for all pixels, before Pillow takes memory for them.
    4. Give Pillow the header, palette, transparent colour, orientation and pixels.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if a check fails.
        Exception: an error of Pillow, if it rejects a chunk.
    """
    chunks = _list_chunks(data, name)  # 1.
    header = _read_png_header(data, name)
    head = _head(chunks, data, name)
    for chunk in chunks:  # 2.
        if chunk.is_critical and chunk.name != b"IEND":
            _check_chunk(chunk, data, name=name)
    pixels = [chunk for chunk in chunks if chunk.name == b"IDAT"]
    compressed = sum(chunk.end - chunk.start for chunk in pixels)
    bits = header.width * header.height * header.depth * _SAMPLES.get(header.colour, 1)
    if bits // 8 > _MAX_RATIO * compressed:  # 3.
        size = f"{header.width} x {header.height}"
        raise UnreadableImageError(f"image {name} is truncated: {compressed} bytes cannot hold {size} pixels")
    return _open([*head, *(_whole(chunk, data) for chunk in pixels)])  # 4.


class _PngHeader(NamedTuple):
    """The first chunk of a PNG.

    Args:
        width: Width in pixels.
        height: Height in pixels.
        depth: Bits per sample: 1, 2, 4, 8 or 16.
        colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
    """

    width: int
    height: int
    depth: int
    colour: int


def _read_png_header(data: bytes, name: str) -> _PngHeader:
    """Returns the header of a PNG, after a check of the number of pixels."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise image_error(data, name, "its header cannot be read")
    header = _PngHeader(*struct.unpack_from(">IIBB", data, 16))
    check_size(header.height, header.width, name)
    return header


class _Chunk(NamedTuple):
    """A chunk of a PNG: its name, and the start and end of its content. A checksum of 4 bytes follows the content."""

    name: bytes
    start: int
    end: int

    @property
    def is_critical(self) -> bool:
        """Returns True if pixels depend on the chunk: its name begins with an upper-case letter."""
        return self.name[:1].isupper()

    def is_intact(self, data: bytes) -> bool:
        """Returns whether the checksum, CRC-32 of name and content, is right."""
        stated = int.from_bytes(data[self.end : self.end + 4], "big")
        return zlib.crc32(memoryview(data)[self.start - 4 : self.end]) == stated


def _list_chunks(data: bytes, name: str) -> list[_Chunk]:
    """Returns the chunks of a PNG, after a check that they are not so many that reading them takes minutes."""
    chunks = list(islice(_png_chunks(data), _MAX_CHUNKS + 1))
    others = sum(chunk.name not in _PIXEL_CHUNKS for chunk in chunks)
    if len(chunks) > _MAX_CHUNKS or others > _MAX_OTHER_CHUNKS:
        limits = f"{_MAX_CHUNKS} PNG chunks and {_MAX_OTHER_CHUNKS} without pixels"
        raise UnreadableImageError(f"image {name} must have at most {limits}, got more", reason="too large")
    return chunks


def _png_chunks(data: bytes) -> Iterator[_Chunk]:
    """Yields the chunks of a PNG up to ``IEND`` or the end of the bytes; the last may be truncated."""
    place = len(PNG_MAGIC)
    # Each chunk: length (4 bytes), name (4), content, checksum (4).
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        yield _Chunk(name, place + 8, place + 8 + length)
        if name == b"IEND":
            return
        place += 12 + length


def _check_chunk(chunk: _Chunk, data: bytes, *, name: str) -> None:
    """Checks that a chunk of a PNG is complete and has the right checksum."""
    if chunk.end + 4 > len(data):  # 4 bytes of checksum
        raise _truncated_error(data, name)
    if not chunk.is_intact(data):
        part = printable(chunk.name.decode("latin1"))
        raise UnreadableImageError(f"image {name} is damaged in its {part} chunk")


def _head(chunks: list[_Chunk], data: bytes, name: str) -> list[bytes]:
    """Returns the chunks before the pixels on which pixels and orientation depend; each kind counts once.

    Raises:
        UnreadableImageError: if the header or the palette is damaged or missing, or an animation has several frames.
    """
    kept: dict[bytes, bytes] = {}
    for chunk in chunks:
        if chunk.name in kept:
            continue
        if chunk.name in (b"IHDR", b"PLTE"):
            _check_chunk(chunk, data, name=name)
            kept[chunk.name] = _whole(chunk, data)
        elif chunk.name == b"tRNS":
            # Pillow compares the transparent colour of grey and RGB with pixels of 8 bits.
            if data[24] == 8 or data[25] == 3:
                kept[chunk.name] = _whole(chunk, data)
        elif _may_rotate(chunk, data) and chunk.is_intact(data):
            kept[chunk.name] = _whole(chunk, data)
        elif chunk.name == b"acTL":
            _check_still(data[chunk.start : chunk.end], name)
    if data[25] == 3 and b"PLTE" not in kept:  # Pillow would show black
        raise UnreadableImageError(f"image {name} is damaged: its palette is missing")
    return list(kept.values())


def _may_rotate(chunk: _Chunk, data: bytes) -> bool:
    return chunk.name == b"eXIf" or (chunk.name == b"iTXt" and data.startswith(_XMP, chunk.start))


def _check_still(animation: bytes, name: str) -> None:
    """Checks the number of frames in an ``acTL`` chunk. A number that the format forbids means a still image."""
    frames = int.from_bytes(animation[:4], "big")
    if 1 < frames <= 2**31:
        raise UnreadableImageError(f"image {name} must be a still image, got {frames} frames", reason="animated")


def _whole(chunk: _Chunk, data: bytes) -> bytes:
    return data[chunk.start - 8 : chunk.end + 4]


def _open(chunks: list[bytes]) -> PngImageFile:
    from PIL.PngImagePlugin import PngImageFile

    return PngImageFile(io.BytesIO(b"".join([PNG_MAGIC, *chunks, _END])))

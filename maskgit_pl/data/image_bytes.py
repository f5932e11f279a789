"""Opening of image files that may be hostile: checks of format, parts and completeness before any pixel is decoded.

Bytes, PNG chunks, JPEG segments and JPEG scans are counted and limited here, so that no file takes minutes or gigabytes
to open. Pillow gets only those chunks of a PNG on which pixels and orientation depend, after a check of their sizes and
checksums. Profiles, texts and animations never reach it, so that they cost nothing and cannot fail. Used by ``images``,
which decodes, and by the code that reads only headers.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from maskgit_pl.errors import printable
from maskgit_pl.files import size_text

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "JPEG_MAGIC",
    "MAX_IMAGE_BYTES",
    "MAX_PIXELS",
    "PIL_ERRORS",
    "Reason",
    "UnreadableImageError",
    "check_complete",
    "check_jpeg",
    "check_size",
    "first_line",
    "open_image",
    "pil_errors",
    "read_image_file",
    "silent_warnings",
]

Reason = Literal["empty", "not an image", "animated", "too large", "damaged"]

MAX_PIXELS = 64 * 10**6
MAX_IMAGE_BYTES = 256 * 2**20  # no photo within the pixel limit needs more
PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
"""The errors that Pillow raises on damaged or hostile files."""

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

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000  # of a PNG; a file of the largest size has 32,768 of 8 kB
_MAX_OTHER_CHUNKS = 256  # chunks without pixels; libpng may print a line for each
_PIXEL_CHUNKS = (b"IDAT", b"fcTL", b"fdAT")
_MAX_RATIO = 1032  # of deflate: a block of 258 equal bytes takes 2 bits
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by the colour type
_XMP = b"XML:com.adobe.xmp\0"  # beginning of the iTXt chunk that may hold an orientation
_END = b"\0\0\0\0IEND\xaeB`\x82"

_filters_lock = threading.Lock()  # the list of warning filters belongs to the process
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(
        before=_filters_lock.acquire, after_in_parent=_filters_lock.release, after_in_child=_filters_lock.release
    )


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
        first = file.read(12)
        _check_format(first, name)
        return first + file.read(status.st_size - len(first))


def open_image(data: bytes, name: str, *, header_only: bool = False) -> Image.Image:
    """Opens a still image with Pillow, which decodes the pixels when they are read.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.
        header_only: True leaves the pixels of a PNG out.

    Raises:
        UnreadableImageError: if it is not a JPEG, PNG or WebP, is animated, damaged before its pixels or, in PNG,
            within them, or has more than 64 million pixels or too many parts.
    """
    _check_format(data, name)
    if data.startswith(_PNG_MAGIC):
        with pil_errors(name):
            return _open_png(data, name, header_only=header_only)
    if data.startswith(JPEG_MAGIC):
        check_jpeg(data, name)
    else:
        _check_webp(data, name)
    from PIL import Image, UnidentifiedImageError

    try:
        with silent_warnings():
            image = Image.open(io.BytesIO(data), formats=("JPEG", "WEBP"))
        frames = int(getattr(image, "n_frames", 1))
    except Image.DecompressionBombError as error:
        text = f"image {name} must have at most {MAX_PIXELS} pixels, got more"
        raise UnreadableImageError(text, reason="too large") from error
    except PIL_ERRORS as error:
        why = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UnreadableImageError(f"image {name} is damaged: {why}") from error
    check_size(image.height, image.width, name)
    if image.format != "MPO":  # the first picture of an MPO is the photo
        _check_still(frames, name)
    return image


def check_complete(data: bytes, *, name: str) -> None:
    """Checks that an image is not truncated, without decoding it.

    PNG is checked by its chunks and their checksums, JPEG by its end marker, WebP by the length in its header.

    Args:
        data: All bytes of a file whose header ``parse_image_header`` accepts.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if a part is missing or, in PNG, damaged.
    """
    if data.startswith(_PNG_MAGIC):
        whole = False
        for chunk in _png_chunks(data):
            if chunk.is_critical:
                chunk.check(data, name)
            whole = chunk.name == b"IEND"
    elif data.startswith(JPEG_MAGIC):
        whole = any(marker.code == _END_OF_IMAGE for marker in _jpeg_markers(data))
    else:
        # RIFF: the length of what follows the first 8 bytes
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not whole:
        raise _truncated_error(data, name)


def check_size(height: int, width: int, name: str) -> None:
    """Raises an ``UnreadableImageError`` if an image has more than 64 million pixels."""
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"image {name} must have at most {MAX_PIXELS} pixels, got {width} x {height}", reason="too large"
        )


@contextmanager
def pil_errors(name: str) -> Iterator[None]:
    """Turns errors of Pillow into ``UnreadableImageError``."""
    try:
        yield
    except UnreadableImageError:
        raise
    except PIL_ERRORS as error:
        raise UnreadableImageError(f"image {name} cannot be decoded: {first_line(error)}") from error


@contextmanager
def silent_warnings() -> Iterator[None]:
    """Drops warnings, in every thread. Pillow warns of odd metadata, which does no harm."""
    with _filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    """Returns the first line of another package's error, at most 200 characters."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def _check_format(data: bytes, name: str) -> None:
    """Checks the first 12 bytes of a file."""
    if not data:
        raise UnreadableImageError(f"image {name} is empty", reason="empty")
    if not (data.startswith((JPEG_MAGIC, _PNG_MAGIC)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise UnreadableImageError(
            f"image {name} must be a JPEG, PNG or WebP file, got one that begins with {data[:8]!r}",
            reason="not an image",
        )


def _check_still(frames: int, name: str) -> None:
    if frames > 1:
        raise UnreadableImageError(f"image {name} must be a still image, got {frames} frames", reason="animated")


def _truncated_error(data: bytes, name: str) -> UnreadableImageError:
    return UnreadableImageError(f"image {name} is truncated after {len(data)} bytes")


def check_jpeg(data: bytes, name: str) -> bool:
    """Checks that a JPEG does not take minutes to open or to decode.

    1. Its pixels begin after at most 2,000 segments, 32 MiB of segments and 1,000 bytes between segments.
    2. It has at most 100 scans. Counting the bytes of a scan marker is fast and gives an upper limit, since they may
       also occur inside a segment. The markers are walked only if this limit is above 100.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.

    Returns:
        True if it has an EXIF or XMP segment before its pixels, which may give an orientation.

    Raises:
        UnreadableImageError: if a limit is exceeded.
    """
    # 1.
    head: list[_Marker] = []
    for marker in islice(_jpeg_markers(data), _MAX_SEGMENTS):
        head.append(marker)
        if marker.code == _SCAN:
            break
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
    # 2. If a sequential frame's first scan has all colour components, libjpeg rejects a second scan itself.
    frames = [marker for marker in head if marker.code in _FRAMES]
    scan, frame = head[-1].start + 4, frames[0].start + 9 if frames else 0  # positions of the number of components
    is_whole = len(frames) == 1 and frames[0].code <= 0xC1 and data[scan : scan + 1] == data[frame : frame + 1]
    if not is_whole and data.count(b"\xff\xda") > _MAX_SCANS:
        codes = [marker.code for marker in _jpeg_markers(data)]
        if codes.count(_SCAN) > _MAX_SCANS or codes[-1] != _END_OF_IMAGE:
            raise UnreadableImageError(
                f"image {name} must have at most {_MAX_SCANS} JPEG scans, got more", reason="too large"
            )
    return any(marker.code == _APP1 for marker in head)


class _Marker(NamedTuple):
    """A marker of a JPEG: its code, its position, and the end of its segment."""

    code: int
    start: int
    end: int


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


def _check_webp(data: bytes, name: str) -> None:
    """Checks the number of pixels of a WebP, since its decoder reserves memory when it opens the file.

    Source: RFC 9649, sections 2.5 to 2.7.
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


def _open_png(data: bytes, name: str, *, header_only: bool) -> Image.Image:
    """Opens a PNG with Pillow.

    1. Check the number of chunks and the size.
    2. Keep the chunks before the pixels on which pixels and orientation depend.
    3. Check that no critical chunk before the end mark is damaged or truncated; Pillow does not notice all damage.
    4. Check that the compressed bytes can be enough for all pixels, before Pillow takes memory for them.
    """
    # 1.
    chunks = list(islice(_png_chunks(data), _MAX_CHUNKS + 1))
    if len(chunks) > _MAX_CHUNKS or sum(chunk.name not in _PIXEL_CHUNKS for chunk in chunks) > _MAX_OTHER_CHUNKS:
        limits = f"{_MAX_CHUNKS} PNG chunks and {_MAX_OTHER_CHUNKS} without pixels"
        raise UnreadableImageError(f"image {name} must have at most {limits}, got more", reason="too large")
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise UnreadableImageError(f"image {name} is damaged: its header cannot be read")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    check_size(height, width, name)
    kept = _png_head(chunks, data, name)  # 2.
    if not header_only:
        for chunk in chunks:  # 3.
            if chunk.is_critical and chunk.name != b"IEND":
                chunk.check(data, name)
        pixels = [chunk for chunk in chunks if chunk.name == b"IDAT"]
        compressed = sum(chunk.end - chunk.start for chunk in pixels)  # 4.
        if width * height * depth * _SAMPLES.get(colour, 1) // 8 > _MAX_RATIO * compressed:
            size = f"{width} x {height}"
            raise UnreadableImageError(f"image {name} is truncated: {compressed} bytes cannot hold {size} pixels")
        kept += pixels
    from PIL.PngImagePlugin import PngImageFile

    content = (data[chunk.start - 8 : chunk.end + 4] for chunk in kept)
    return PngImageFile(io.BytesIO(b"".join([_PNG_MAGIC, *content, _END])))


def _png_head(chunks: list[_Chunk], data: bytes, name: str) -> list[_Chunk]:
    """Returns the chunks before the pixels on which pixels and orientation depend; each kind counts once."""
    # Colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
    depth, colour = data[24:26]
    kept: dict[bytes, _Chunk] = {}
    for chunk in chunks:
        if chunk.name in (b"IHDR", b"PLTE") and chunk.name not in kept:
            chunk.check(data, name)
            kept[chunk.name] = chunk
        elif chunk.name == b"tRNS" and (depth == 8 or colour == 3):
            # Pillow compares the transparent colour of grey and RGB with pixels of 8 bits.
            kept.setdefault(chunk.name, chunk)
        elif chunk.may_rotate(data) and chunk.is_intact(data):
            kept.setdefault(chunk.name, chunk)
        elif chunk.name == b"acTL":
            frames = int.from_bytes(data[chunk.start : chunk.end][:4], "big")
            _check_still(frames if frames <= 2**31 else 1, name)  # a number that the format forbids: a still image
    if colour == 3 and b"PLTE" not in kept:  # Pillow would show black
        raise UnreadableImageError(f"image {name} is damaged: its palette is missing")
    return list(kept.values())


class _Chunk(NamedTuple):
    """A chunk of a PNG: its name, and the start and end of its content. A checksum of 4 bytes follows the content."""

    name: bytes
    start: int
    end: int

    @property
    def is_critical(self) -> bool:
        """Returns True if pixels depend on the chunk: its name begins with an upper-case letter."""
        return self.name[:1].isupper()

    def may_rotate(self, data: bytes) -> bool:
        """Returns whether the chunk may hold an orientation."""
        return self.name == b"eXIf" or (self.name == b"iTXt" and data.startswith(_XMP, self.start))

    def is_intact(self, data: bytes) -> bool:
        """Returns whether the checksum, CRC-32 of name and content, is right."""
        stated = int.from_bytes(data[self.end : self.end + 4], "big")
        return zlib.crc32(memoryview(data)[self.start - 4 : self.end]) == stated

    def check(self, data: bytes, name: str) -> None:
        """Raises an ``UnreadableImageError`` if the chunk is truncated or has a wrong checksum."""
        if self.end + 4 > len(data):
            raise _truncated_error(data, name)
        if not self.is_intact(data):
            part = printable(self.name.decode("latin1"))
            raise UnreadableImageError(f"image {name} is damaged in its {part} chunk")


def _png_chunks(data: bytes) -> Iterator[_Chunk]:
    """Yields the chunks of a PNG up to ``IEND`` or the end of the bytes; the last may be truncated."""
    place = len(_PNG_MAGIC)
    # Each chunk: length (4 bytes), name (4), content, checksum (4).
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        yield _Chunk(name, place + 8, place + 8 + length)
        if name == b"IEND":
            return
        place += 12 + length

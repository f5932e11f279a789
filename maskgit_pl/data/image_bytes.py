"""Opening of image files that may be hostile: checks of format, parts and completeness before any pixel is decoded.

Bytes, PNG chunks and JPEG scans are counted and limited here, so that no file takes minutes or gigabytes to
open. Pillow gets only those chunks of a PNG and segments of a JPEG on which pixels and EXIF orientation depend.
Profiles, texts and animations never reach it, so that they cost nothing and cannot fail. Used by ``images``,
which decodes, and by the code that reads only headers.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from maskgit_pl.text import printable, size_text

if TYPE_CHECKING:
    from PIL import Image

Reason = Literal["empty", "not an image", "animated", "too large", "damaged"]

MAX_PIXELS = 64 * 10**6
MAX_IMAGE_BYTES = 256 * 2**20  # no photo within the pixel limit needs more
PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
"""The errors that Pillow raises on damaged or hostile files."""

JPEG_MAGIC = b"\xff\xd8\xff"
# Pillow and libjpeg do not limit these. 0.2 MB hold 880 scans of 64 million pixels, which take 9 s; Pillow takes more
# than 90 s for 4,000 EXIF segments of 65 kB, and 7.8 GB for 240 MB of empty segments.
_MAX_SCANS = 100  # of a JPEG; a progressive one has about 10, and each takes time for all pixels
_MAX_SEGMENTS = 100  # of a JPEG before its pixels, on which they depend; about 10 are usual
_MAX_MARKERS = 20_000  # of a JPEG, including the markers between its scans
# Markers of a JPEG that have a segment, and the end marker; not 0xFF00 (a data byte) and restart markers.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the segments that state the size and the coding
# Also tables (DHT, DAC, DQT), the restart interval, and the colour space of JFIF and Adobe.
_PIXEL_SEGMENTS = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE, _SCAN}
_EXIF = b"Exif\0\0"  # beginning of the APP1 segment that may hold an orientation

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Of a PNG; a file of the largest size has 32,768 of 8 kB. Pillow takes 45 s and 2.3 GB for 240 MB of empty chunks.
_MAX_CHUNKS = 100_000
_END = b"\0\0\0\0IEND\xaeB`\x82"

# Pillow warns of odd metadata, which does no harm.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImageError(ValueError):
    """The bytes are not an image that can be read; ``reason`` is the kind of the fault, for statistics."""

    def __init__(self, text: str, *, reason: Reason = "damaged") -> None:
        super().__init__(text)
        self.reason: Reason = reason


class _Part(NamedTuple):
    """A part of a file."""

    kind: Any  # name of a PNG chunk, or code of a JPEG marker
    start: int  # position of the content of a chunk, or of a marker
    end: int  # position after the content of a chunk, which a checksum of 4 bytes follows, or after a segment


def read_image_file(path: str | Path, *, name: str) -> bytes:
    """Returns the bytes of an image file, after a check of its type and its length."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO would block
        raise UnreadableImageError(f"image {name} must be a regular file", reason="not an image")
    if status.st_size > MAX_IMAGE_BYTES:
        limit, size = size_text(MAX_IMAGE_BYTES), size_text(status.st_size)
        raise UnreadableImageError(f"image {name} must have at most {limit}, got {size}", reason="too large")
    return Path(path).read_bytes()


def open_image(data: bytes, name: str, *, header_only: bool = False) -> Image.Image:
    """Opens a still image, all bytes of its file, with Pillow, which decodes the pixels when they are read.

    ``header_only`` leaves the pixels out.
    """
    if not data:
        raise UnreadableImageError(f"image {name} is empty", reason="empty")
    if not (data.startswith((JPEG_MAGIC, _PNG_MAGIC)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise UnreadableImageError(
            f"image {name} must be a JPEG, PNG or WebP file, got one that begins with {data[:8]!r}",
            reason="not an image",
        )
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    image: Image.Image
    with pil_errors(name):
        if data.startswith(_PNG_MAGIC):
            return PngImagePlugin.PngImageFile(io.BytesIO(_read_png(data, name, header_only=header_only)))
        if data.startswith(JPEG_MAGIC):
            head, start = read_jpeg_head(data, name)
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(head if header_only else head + data[start:]))
        else:
            # The decoder reserves memory for the stated size, and touches none of it before the pixels are read.
            image = webp = WebPImagePlugin.WebPImageFile(io.BytesIO(data))
            _check_still(webp.n_frames, name)
    check_size(image.height, image.width, name)
    return image


def check_complete(data: bytes, *, name: str) -> None:
    """Checks that an image whose header ``parse_image_header`` accepts is not truncated, without decoding it.

    PNG is checked by its chunks and their checksums, JPEG by its end marker, WebP by the length in its header.
    """
    if data.startswith(_PNG_MAGIC):
        chunks = list(_png_chunks(data))
        for chunk in chunks:
            if chunk.kind[:1].isupper():
                _check_chunk(chunk, data, name)
        whole = bool(chunks) and chunks[-1].kind == b"IEND"
    elif data.startswith(JPEG_MAGIC):
        whole = any(marker.kind == _END_OF_IMAGE for marker in _jpeg_markers(data))
    else:
        # RIFF: the length of what follows the first 8 bytes
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not whole:
        raise UnreadableImageError(f"image {name} is truncated after {len(data)} bytes")


def check_size(height: int, width: int, name: str) -> None:
    """Raises an ``UnreadableImageError`` if an image has more than 64 million pixels."""
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"image {name} must have at most {MAX_PIXELS} pixels, got {width} x {height}", reason="too large"
        )


@contextmanager
def pil_errors(name: str) -> Iterator[None]:
    """Turns errors of Pillow into ``UnreadableImageError``."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except UnreadableImageError:
        raise
    except DecompressionBombError as error:  # of a WebP, from Pillow 13 on
        raise UnreadableImageError(
            f"image {name} must have at most {MAX_PIXELS} pixels, got more", reason="too large"
        ) from error
    except PIL_ERRORS as error:
        raise UnreadableImageError(f"image {name} cannot be decoded: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Returns the first line of another package's error, at most 200 characters."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])


def _check_still(frames: int, name: str) -> None:
    if frames > 1:
        raise UnreadableImageError(f"image {name} must be a still image, got {frames} frames", reason="animated")


def read_jpeg_head(data: bytes, name: str) -> tuple[bytes, int]:
    """Returns a JPEG up to the pixels, without other segments than those on which pixels and orientation depend.

    1. Keep at most 100 segments up to the first scan.
    2. Check that there are at most 100 scans. Counting the bytes of a scan marker is fast and gives an upper limit,
       since they may also occur inside a segment or after the image, as in a photo with a video. The markers are walked
       only if this limit is above 100.

    Returns:
        These bytes, and the position after the header of the first scan in ``data``, all bytes of the file.
    """
    kept: list[_Part] = []
    for marker in _jpeg_markers(data):  # 1.
        has_exif = marker.kind == _APP1 and data.startswith(_EXIF, marker.start + 4)
        if has_exif or marker.kind in _PIXEL_SEGMENTS:
            kept.append(marker)
        if marker.kind == _SCAN or len(kept) > _MAX_SEGMENTS:
            break
    if not kept or kept[-1].kind != _SCAN:
        raise UnreadableImageError(f"image {name} is damaged: its pixels were not found")
    if data.count(b"\xff\xda") > _MAX_SCANS:  # 2.
        codes = [marker.kind for marker in _jpeg_markers(data)]
        if codes.count(_SCAN) > _MAX_SCANS or codes[-1] != _END_OF_IMAGE:
            text = f"image {name} must have at most {_MAX_SCANS} JPEG scans, got more"
            raise UnreadableImageError(text, reason="too large")
    return b"".join([JPEG_MAGIC[:2], *(data[marker.start : marker.end] for marker in kept)]), kept[-1].end


def _jpeg_markers(data: bytes) -> Iterator[_Part]:
    """Yields the markers of a JPEG that have a segment, found as libjpeg finds them, and the end marker."""
    position = 2  # after the start marker
    for _ in range(_MAX_MARKERS):
        if (match := _MARKER.search(data, position)) is None:
            return
        code, position = data[match.end() - 1], match.end()
        if code != _END_OF_IMAGE:  # the length of the segment includes its own 2 bytes
            position += int.from_bytes(data[position : position + 2], "big")
        yield _Part(code, match.start(), position)
        if code == _END_OF_IMAGE:
            return


def _read_png(data: bytes, name: str, *, header_only: bool) -> bytes:
    """Returns a PNG without other chunks than those on which pixels and orientation depend."""
    chunks = list(islice(_png_chunks(data), _MAX_CHUNKS + 1))
    if len(chunks) > _MAX_CHUNKS:
        text = f"image {name} must have at most {_MAX_CHUNKS} PNG chunks, got more"
        raise UnreadableImageError(text, reason="too large")
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise UnreadableImageError(f"image {name} is damaged: its header cannot be read")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    check_size(height, width, name)
    kept: dict[bytes, _Part] = {}  # without pixels; the first chunk of each kind counts
    pixels: list[_Part] = []
    for chunk in chunks:
        if chunk.kind == b"IDAT":
            pixels.append(chunk)
        elif chunk.kind == b"acTL":
            _check_still(int.from_bytes(data[chunk.start : chunk.end][:4], "big"), name)
        # Pillow compares the transparent colour of grey and RGB with pixels of 8 bits.
        elif chunk.kind in (b"IHDR", b"PLTE", b"eXIf") or (chunk.kind == b"tRNS" and (depth == 8 or colour == 3)):
            kept.setdefault(chunk.kind, chunk)
    if colour == 3 and b"PLTE" not in kept:  # Pillow would show black
        raise UnreadableImageError(f"image {name} is damaged: its palette is missing")
    used = [*kept.values(), *([] if header_only else pixels)]
    for chunk in used:  # Pillow does not notice all damage
        _check_chunk(chunk, data, name)
    return b"".join([_PNG_MAGIC, *(data[chunk.start - 8 : chunk.end + 4] for chunk in used), _END])


def _png_chunks(data: bytes) -> Iterator[_Part]:
    """Yields the chunks of a PNG up to ``IEND`` or the end of the bytes; the last may be truncated."""
    position = len(_PNG_MAGIC)
    # Each chunk: length (4 bytes), name (4), content, checksum (4).
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        yield _Part(name, position + 8, position + 8 + length)
        if name == b"IEND":
            return
        position += 12 + length


def _check_chunk(chunk: _Part, data: bytes, name: str) -> None:
    """Raises an ``UnreadableImageError`` if a chunk is truncated, or its CRC-32 of name and content is wrong."""
    if chunk.end + 4 > len(data):
        raise UnreadableImageError(f"image {name} is truncated after {len(data)} bytes")
    checksum = int.from_bytes(data[chunk.end : chunk.end + 4], "big")
    if zlib.crc32(memoryview(data)[chunk.start - 4 : chunk.end]) != checksum:
        part = printable(chunk.kind.decode("latin1"))
        raise UnreadableImageError(f"image {name} is damaged in its {part} chunk")

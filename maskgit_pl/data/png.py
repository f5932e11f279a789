"""PNG for ``images``: what Pillow gets of a file that may be hostile.

Pillow decodes the pixels. It gets only the chunks on which pixels and orientation depend, after their sizes and
checksums were checked here. Profiles, texts and animations never reach it, so that they cost nothing and cannot fail.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, NamedTuple

from maskgit_pl.data.image_bytes import (
    PNG_MAGIC,
    Chunk,
    UnreadableImageError,
    check_chunk,
    check_png,
    check_size,
    image_error,
)

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngImageFile

__all__ = ["PngHeader", "open_png", "open_png_header", "read_png_header"]

_MAX_RATIO = 1032  # of deflate: a block of 258 equal bytes takes 2 bits
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by the colour type
_XMP = b"XML:com.adobe.xmp\0"  # beginning of the iTXt chunk that may hold an orientation
_END = b"\0\0\0\0IEND\xaeB`\x82"


class PngHeader(NamedTuple):
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


def read_png_header(data: bytes, name: str) -> PngHeader:
    """Returns the header of a PNG.

    Raises:
        UnreadableImageError: if it is missing, or the image has more than 64 million pixels.
    """
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise image_error(data, name, "its header cannot be read")
    header = PngHeader(*struct.unpack_from(">IIBB", data, 16))
    check_size(header.height, header.width, name)
    return header


def open_png_header(data: bytes, name: str) -> PngImageFile:
    """Opens a PNG without its pixels, for its size, mode and orientation.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: if it is damaged before its pixels, animated, or exceeds a limit of ``check_png`` or
            ``check_size``.
        Exception: one of ``PIL_ERRORS``, if Pillow rejects a chunk.
    """
    chunks = check_png(data, name)
    read_png_header(data, name)
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
        Exception: one of ``PIL_ERRORS``, if Pillow rejects a chunk.
    """
    chunks = check_png(data, name)  # 1.
    header = read_png_header(data, name)
    head = _head(chunks, data, name)
    for chunk in chunks:  # 2.
        if chunk.is_critical and chunk.name != b"IEND":
            check_chunk(chunk, data, name=name)
    pixels = [chunk for chunk in chunks if chunk.name == b"IDAT"]
    compressed = sum(chunk.end - chunk.start for chunk in pixels)
    bits = header.width * header.height * header.depth * _SAMPLES.get(header.colour, 1)
    if bits // 8 > _MAX_RATIO * compressed:  # 3.
        size = f"{header.width} x {header.height}"
        raise UnreadableImageError(f"image {name} is truncated: {compressed} bytes cannot hold {size} pixels")
    return _open([*head, *(_whole(chunk, data) for chunk in pixels)])  # 4.


def _head(chunks: list[Chunk], data: bytes, name: str) -> list[bytes]:
    """Returns the chunks before the pixels on which pixels and orientation depend; each kind counts once.

    Raises:
        UnreadableImageError: if the header or the palette is damaged or missing, or an animation has several frames.
    """
    kept: dict[bytes, bytes] = {}
    for chunk in chunks:
        if chunk.name in kept:
            continue
        if chunk.name in (b"IHDR", b"PLTE"):
            check_chunk(chunk, data, name=name)
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


def _may_rotate(chunk: Chunk, data: bytes) -> bool:
    return chunk.name == b"eXIf" or (chunk.name == b"iTXt" and data.startswith(_XMP, chunk.start))


def _check_still(animation: bytes, name: str) -> None:
    """Checks the number of frames in an ``acTL`` chunk. A number that the format forbids means a still image."""
    frames = int.from_bytes(animation[:4], "big")
    if 1 < frames <= 2**31:
        raise UnreadableImageError(f"image {name} must be a still image, got {frames} frames", reason="animated")


def _whole(chunk: Chunk, data: bytes) -> bytes:
    return data[chunk.start - 8 : chunk.end + 4]


def _open(chunks: list[bytes]) -> PngImageFile:
    from PIL.PngImagePlugin import PngImageFile

    return PngImageFile(io.BytesIO(b"".join([PNG_MAGIC, *chunks, _END])))

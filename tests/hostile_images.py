"""Makes image files that are small on disk but take much memory or time to decode."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2, **chunks: bytes) -> bytes:
    """Builds a PNG whose header and pixels may disagree."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return PNG + b"".join(
        chunk(name.encode(), content)
        for name, content in {"IHDR": header, **chunks, "IDAT": pixels, "IEND": b""}.items()
    )


def chunk(name: bytes, content: bytes) -> bytes:
    """Builds a chunk of a PNG with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def zeros(count: int) -> bytes:
    """Compresses ``count`` zero bytes piece by piece."""
    packer = zlib.compressobj(1)
    pieces = [packer.compress(bytes(min(2**20, count - done))) for done in range(0, count, 2**20)]
    return b"".join(pieces) + packer.flush()


def saved(kind: str, *, frames: int = 1, size: tuple[int, int] = (8, 8), **options) -> bytes:
    """Returns the file that Pillow writes."""
    first, *others = [Image.new("RGB", size, (number % 256, 9, 9)) for number in range(frames)]
    return save(first, kind, **({"save_all": True, "append_images": others} if others else {}), **options)


def save(image: Image.Image, kind: str, **options) -> bytes:
    """Returns the file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    """Builds a segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", 2 + len(content)) + content


def many_scans(side: int, scans: int) -> bytes:
    """Builds a valid grey progressive JPEG with one scan per bit of each coefficient, up to ``scans`` scans.

    Every code word is one bit: the only DC symbol is "no difference", the only AC symbol "32,767 blocks of zeros".
    """
    blocks = (-(-side // 8)) ** 2
    header = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1]) * 64)
    header += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + bytes((1, 0x11, 0)))
    one_code = bytes((1, *[0] * 15))
    header += segment(0xC4, b"\x00" + one_code + b"\x00") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    out = [header, segment(0xDA, bytes((1, 1, 0x00, 0, 0, 0x00))), bytes(-(-blocks // 8))]
    runs = -(-blocks // 32767)
    bits = ("0" + "1" * 14) * (runs - 1) + "0" * 15  # the last run may be longer than the rest
    data = bytes(int(bits[place : place + 8].ljust(8, "1"), 2) for place in range(0, len(bits), 8))
    data = data.replace(b"\xff", b"\xff\x00")
    made = 1
    for low in range(13, -1, -1):
        for place in range(1, 64):
            if made < scans:
                approximation = (0 if low == 13 else low + 1) << 4 | low
                out += [segment(0xDA, bytes((1, 1, 0x00, place, place, approximation))), data]
                made += 1
    return b"".join(out) + b"\xff\xd9"


def large_jpeg() -> bytes:
    """Builds a JPEG whose header declares 65,000 x 65,000 pixels."""
    data = bytearray(saved("JPEG", progressive=True))
    place = data.index(b"\xff\xc2") + 5
    data[place : place + 4] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def large_webp() -> bytes:
    """Builds a WebP whose header declares 16,383 x 16,383 pixels: 14 bits each, 10 bytes into the VP8 chunk."""
    data = bytearray(saved("WEBP"))
    place = data.index(b"VP8 ") + 14
    data[place : place + 4] = struct.pack("<HH", 16383, 16383)
    return bytes(data)


def many_chunks(name: bytes, count: int) -> bytes:
    """Builds a PNG with ``count`` empty chunks before its pixels."""
    data = png(8, 8, zeros(200))
    return data[:33] + chunk(name, b"") * count + data[33:]


def many_segments(marker: int, content: bytes, count: int) -> bytes:
    """Builds a JPEG with ``count`` segments before its pixels."""
    return b"\xff\xd8" + segment(marker, content) * count + saved("JPEG")[2:]


# File name -> maker, reason in the report, part of the message. All are refused before a pixel is decoded.
REFUSED: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty.jpg": (lambda: b"", "empty", "is empty"),
    "page.jpg": (lambda: b"<html>404 Not Found</html>", "not an image", "one that begins with b'<html>40'"),
    "still.gif": (lambda: saved("GIF"), "not an image", "must be a JPEG, PNG or WebP file"),
    "photo.bmp": (lambda: saved("BMP"), "not an image", "must be a JPEG, PNG or WebP file"),
    "animated.png": (lambda: saved("PNG", frames=300), "animated", "must be a still image, got 300 frames"),
    "animated.webp": (lambda: saved("WEBP", frames=300), "animated", "must be a still image, got"),
    "large.jpg": (large_jpeg, "too large", "must have at most 64000000 pixels, got"),
    "large.png": (
        lambda: png(9000, 9000, zeros(9000 * 9001), colour=0), "too large", "64000000 pixels, got 9000 x 9000"
    ),
    "large.webp": (large_webp, "too large", "must have at most 64000000 pixels, got "),
    "scans.jpg": (lambda: many_scans(4000, 800), "too large", "must have at most 100 JPEG scans"),
    "segments.jpg": (lambda: many_segments(0xEF, b"", 10**5), "damaged", "its pixels were not found"),
    "tables.jpg": (lambda: many_segments(0xDB, bytes(65), 101), "damaged", "its pixels were not found"),
    "chunks.png": (lambda: many_chunks(b"IDAT", 120_000), "too large", "must have at most 100000 PNG chunks"),
    "signature.png": (lambda: PNG, "damaged", "its header cannot be read"),
}  # fmt: skip


def write_refused(folder: Path, name: str) -> Path:
    """Writes a file of the table."""
    path = folder / name
    path.write_bytes(REFUSED[name][0]())
    return path


def sparse(folder: Path) -> Path:
    """Makes a sparse file of 2 GB that begins like a PNG."""
    path = folder / "sparse.png"
    path.write_bytes(saved("PNG"))
    os.truncate(path, 2 * 10**9)
    return path


def fifo(folder: Path) -> Path:
    """Makes a FIFO, which blocks a process that opens it."""
    os.mkfifo(folder / "fifo.png")
    return folder / "fifo.png"


def endless(folder: Path) -> Path:
    """Makes a link to /dev/zero, which never ends."""
    (folder / "endless.png").symlink_to("/dev/zero")
    return folder / "endless.png"


# Refused before they are read.
SPECIAL = {
    sparse: "must have at most 268 MB, got 2 GB",
    fifo: "must be a regular file",
    endless: "must be a regular file",
}

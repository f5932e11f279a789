"""Bytes of an image file -> uint8 tensor of the size and channels asked for.

The header is read before any pixel is allocated. Grey and colour JPEG go through simplejpeg: PIL's pixels in half the
time, and what libjpeg only warns of (flipped or zeroed bytes) is an error, where PIL and torchvision return garbage.
Plain 8-bit PNG goes through torchvision, 2.5 times faster than PIL on 28 x 28; palettes, alpha, CMYK, 16 bit and WebP
go through PIL, which converts them rightly. Resampling is bicubic (a = -0.5) and antialiased, from full resolution:
decoding at a fraction of the size would make the pixels depend on how the size divides.

A stranger may have written the file: pixels, bytes, scans of a JPEG and parts of a file are counted before anything is
decoded.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from maskgit_pl.files import size_text
from maskgit_pl.text import printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

__all__ = [
    "Crop",
    "ImageHeader",
    "Reason",
    "UnreadableImageError",
    "check_whole",
    "decode_image",
    "encode_png",
    "fit_square",
    "from_pil",
    "load_square",
    "load_square_into",
    "read_image_file",
    "read_image_header",
]

Crop = Literal["center", "random"]
FORMATS = ("JPEG", "PNG", "WEBP")
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
_CHANNELS = {"1": 1, "L": 1, "I;16": 1, "I": 1, "LA": 4, "PA": 4, "RGBA": 4}  # every other mode becomes RGB
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG, with a segment after it; and its end
_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the segments that state the size and the coding
_ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2 to 8 turned or mirrored; from 5 on height and width change places
_MOST_SCRATCH = 2**24  # bytes; larger images get memory of their own
_of_thread = threading.local()
# What PIL raises on files that are damaged or hostile.
_PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
_SOURCE_LINE = re.compile(r"^.*\.cpp:\d+, ")  # how torchvision's errors begin
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


@dataclass(frozen=True)
class ImageHeader:
    """What an image says of itself: format, size in pixels as shown (after EXIF rotation), channels 1, 3 or 4."""

    format: str
    height: int
    width: int
    channels: int


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
        if _kind_of_fault(first) != "damaged":
            raise _refusal(first, name)
        file.seek(0)
        return file.read(status.st_size)


def read_image_header(data: bytes, *, name: str) -> ImageHeader:
    """Read format, size and channels without decoding a pixel.

    Args:
        data: The whole file's bytes.
        name: What to call the image in an error, such as ``train-000000.tar:00000012.png``.

    Raises:
        UnreadableImageError: Not a still JPEG, PNG or WebP of at most 64 million pixels.
    """
    image = _open(data, name)
    width, height = image.size
    if _orientation(image) >= 5:
        width, height = height, width
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    return ImageHeader(kind, height, width, _CHANNELS.get(image.mode, 3))


def check_whole(data: bytes, *, name: str) -> None:
    """Checks that an image is not cut off, without decoding it.

    PNG is checked by its chunks and their checksums, JPEG by its end marker, WebP by the length that it states.

    Args:
        data: The bytes of a file whose header ``read_image_header`` can read.
        name: What to call the image in an error.

    Raises:
        UnreadableImageError: if a part is missing or, in PNG, damaged.
    """
    if data.startswith(_PNG):
        whole = False
        for chunk in _png_chunks(data):
            if chunk.end + 4 > len(data):
                break
            if chunk.name[:1].isupper() and not chunk.is_intact(data):
                part = printable(chunk.name.decode("latin1"))
                raise UnreadableImageError(f"image {name} is damaged in its {part} chunk")
            whole = chunk.name == b"IEND"
    elif data.startswith(_JPEG):
        whole = any(marker.code == _END_OF_IMAGE for marker in _jpeg_markers(data))
    else:
        whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if not whole:
        raise UnreadableImageError(f"image {name} is cut off after {len(data)} bytes")


def decode_image(data: bytes, *, channels: int, name: str) -> Tensor:
    """Decode an image, upright.

    Args:
        data: The whole file's bytes.
        channels: 1 for grey (luma of ITU-R 601), 3 for RGB. Alpha is laid over white.
        name: What to call the image in an error.

    Returns:
        (channels, H, W) uint8, mostly channels-last in memory.

    Raises:
        UnreadableImageError: As ``read_image_header``, or the pixels cannot be decoded. Damage is found in JPEG where its
            code words break and in PNG by its checksums; WebP has none.
    """
    if channels not in (1, 3):
        raise ValueError(f"in_channels: 1 (grey) or 3 (RGB) is needed, got {channels}")
    chunks = _check_png(data, name) if data.startswith(_PNG) else frozenset()
    if _is_plain_png(data, chunks, channels):
        return _decode_png(data, channels, name)
    if _plain_jpeg_size(data, name) is not None:
        return _decode_jpeg(data, channels, name)
    image = _open(data, name)
    if b"tRNS" in chunks and data[25] in (0, 2):
        return _decode_colour_key(data, image, channels, name)
    return from_pil(image, channels=channels, name=name)


def load_square(data: bytes, *, image_size: int, channels: int, crop: tuple[float, float] | None, name: str) -> Tensor:
    """Decode, crop to a square and resize.

    Args:
        data: The whole file's bytes.
        image_size: Side of the result in pixels.
        channels: 1 or 3.
        crop: As of ``load_square_into``.
        name: What to call the image in an error.

    Returns:
        (channels, image_size, image_size) uint8, channels-last in memory.

    Raises:
        UnreadableImageError: As ``decode_image``.
    """
    import torch

    square = torch.empty((image_size, image_size, channels), dtype=torch.uint8).permute(2, 0, 1)
    load_square_into(square, data, crop=crop, name=name)
    return square


def load_square_into(out: Tensor, data: bytes, *, crop: tuple[float, float] | None, name: str) -> None:
    """Decode, crop to a square and resize into memory that is there, such as a row of a batch.

    Args:
        out: (1 or 3, side, side) uint8, where the result goes; quickest if it lies channels-last.
        data: The whole file's bytes.
        crop: Where the crop lies along (height, width), each in [0, 1); None for the centre.
        name: What to call the image in an error.

    Raises:
        UnreadableImageError: As ``decode_image``; ``out`` is as it was.
    """
    channels, side = out.shape[0], out.shape[-1]
    size = _plain_jpeg_size(data, name)
    if size is None:
        image = decode_image(data, channels=channels, name=name)
    else:
        image = _decode_jpeg(data, channels, name, buffer=_scratch(3 * size[0] * size[1]))
    out.copy_(fit_square(image, image_size=side, crop=crop))


def fit_square(image: Tensor, *, image_size: int, crop: tuple[float, float] | None) -> Tensor:
    """Cut the largest square out of an image and resize it; an image that fits is returned as it is.

    Cropping first is the usual "resize the short side, then crop" without resizing what is thrown away.

    Args:
        image: (C, H, W) uint8.
        image_size: Side of the result.
        crop: Place of the square along (height, width), each in [0, 1); None for the centre.

    Returns:
        (C, image_size, image_size) uint8.
    """
    height, width = image.shape[-2:]
    side = min(height, width)
    if crop is None:
        top, left = (height - side) // 2, (width - side) // 2
    else:
        top, left = int(crop[0] * (height - side + 1)), int(crop[1] * (width - side + 1))
    square = image[:, top : top + side, left : left + side]
    return square if side == image_size else _resize(square, image_size)


def from_pil(image: Image.Image, *, channels: int, name: str) -> Tensor:
    """Returns a PIL picture's pixels, upright; 16-bit grey scaled, alpha laid over white.

    Args:
        image: Of any mode.
        channels: 1 for grey (luma of ITU-R 601), 3 for RGB.
        name: What to call the picture in an error.

    Returns:
        (channels, H, W) uint8.

    Raises:
        UnreadableImageError: if it has more than 64 million pixels, or its file cannot be decoded.
    """
    import torch

    _check_size(image.height, image.width, name)
    try:
        image.load()  # EXIF may lie behind a PNG's pixels
        converted = _to_eight_bits(_upright(image)).convert("L" if channels == 1 else "RGB")
    except _PIL_ERRORS as error:
        raise _undecodable(name, error) from error
    pixels = _as_array(converted)  # (H, W) or (H, W, 3)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def check_crop(crop: str) -> None:
    """Refuse a crop that there is not.

    Raises:
        ValueError: Names the choices.
    """
    if crop not in get_args(Crop):
        raise ValueError(f"crop: one of {', '.join(get_args(Crop))} is needed, got {crop!r}")


def encode_png(image: Tensor) -> bytes:
    """(1 or 3, H, W) uint8 -> PNG bytes, the same for the same pixels."""
    from torchvision.io import encode_png as encode

    data: bytes = encode(image).numpy().tobytes()
    return data


def _resize(square: Tensor, side: int) -> Tensor:
    """Channels-last, as it was decoded: resampling planes apart takes twice as long."""
    import torch

    batch = square[None].contiguous(memory_format=torch.channels_last)
    size = (side, side)
    resized: Tensor = torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]
    return resized


class _Chunk(NamedTuple):
    """A part of a PNG: its name, and where its content begins and ends; a checksum follows."""

    name: bytes
    start: int
    end: int

    def is_intact(self, data: bytes) -> bool:
        """True if the checksum is right."""
        stated = int.from_bytes(data[self.end : self.end + 4], "big")
        return zlib.crc32(memoryview(data)[self.start - 4 : self.end]) == stated


def _png_chunks(data: bytes) -> Iterator[_Chunk]:
    """The chunks of a PNG whose names and lengths are there, up to the one that ends it."""
    place = len(_PNG)
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        yield _Chunk(name, place + 8, place + 8 + length)
        if name == b"IEND":
            return
        place += 12 + length


def _check_png(data: bytes, name: str) -> frozenset[bytes]:
    """Refuses a PNG of so many chunks that it takes minutes to read them.

    Returns:
        Names of its chunks.
    """
    chunks = [chunk.name for chunk in islice(_png_chunks(data), _MAX_CHUNKS + 1)]
    others = len(chunks) - sum(map(chunks.count, _PIXEL_CHUNKS))
    if len(chunks) > _MAX_CHUNKS or others > _MAX_OTHER_CHUNKS:
        limits = f"{_MAX_CHUNKS} PNG chunks and {_MAX_OTHER_CHUNKS} without pixels"
        raise UnreadableImageError(f"image {name} must have at most {limits}, got more", reason="too large")
    return frozenset(chunks)


def _is_plain_png(data: bytes, chunks: frozenset[bytes], channels: int) -> bool:
    """An 8-bit grey or RGB PNG within the pixel limit, with no transparency, animation or rotation, by its chunks."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        return False
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    odd = not chunks.isdisjoint((b"tRNS", b"acTL", b"eXIf")) or b"tiff:Orientation" in data
    fits = 0 < width * height <= MAX_PIXELS
    return depth == 8 and fits and not odd and (colour == 0 or (colour == 2 and channels == 3))


def _decode_png(data: bytes, channels: int, name: str) -> Tensor:
    from torchvision.io import ImageReadMode

    return _decode_by_libpng(data, ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB, name)


def _decode_colour_key(data: bytes, opened: Image.Image, channels: int, name: str) -> Tensor:
    """A grey or RGB PNG of which one value is transparent; PIL compares that value at another depth than the file's."""
    import numpy as np
    from PIL import Image
    from torchvision.io import ImageReadMode

    pixels = _decode_by_libpng(data, ImageReadMode.UNCHANGED, name).numpy()  # (1 or 3, H, W) uint8 or uint16
    depth, top = data[24], 2 ** data[24] - 1
    key = next(data[chunk.start : chunk.end] for chunk in _png_chunks(data) if chunk.name == b"tRNS")
    if len(key) != 2 * len(pixels):
        raise UnreadableImageError(f"image {name} is damaged: its transparent colour has {len(key)} bytes")
    values = (np.frombuffer(key, ">u2") & top) * (255 // top or 1)  # (1 or 3,); libpng scales what is below 8 bits
    clear = (pixels == values[:, None, None]).all(axis=0)
    eight_bits = (pixels >> 8 if depth == 16 else pixels).astype(np.uint8)
    eight_bits[:, clear] = 255
    planes = [Image.fromarray(plane) for plane in eight_bits]
    picture = planes[0] if len(planes) == 1 else Image.merge("RGB", planes)
    try:
        opened.load()  # EXIF may lie behind the pixels
    except _PIL_ERRORS as error:
        raise _undecodable(name, error) from error
    return from_pil(_transposed(picture, _orientation(opened)), channels=channels, name=name)


def _decode_by_libpng(data: bytes, mode: Any, name: str) -> Tensor:
    import torch
    from torchvision.io import decode_png as decode

    try:
        # bytearray: torch refuses to share memory that it may not write to
        pixels: Tensor = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except RuntimeError as error:
        raise _undecodable(name, error) from error
    return pixels


def _plain_jpeg_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Height and width, as stored, of a grey or colour JPEG; None for anything else. Takes 2 microseconds.

    Raises:
        UnreadableImageError: It is too large.
    """
    if data[:3] != _JPEG:
        return None
    _check_jpeg(data, name)
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # damaged, or a layout that is rare: PIL says
        return None
    _check_size(height, width, name)
    return (height, width) if colours in ("Gray", "RGB", "YCbCr") else None


def _scratch(size: int) -> npt.NDArray[np.uint8] | None:
    """Memory of this thread to decode into; new memory for each image costs a fifth of the time, in page faults."""
    import numpy as np

    if size > _MOST_SCRATCH:
        return None
    buffer: npt.NDArray[np.uint8] | None = getattr(_of_thread, "buffer", None)
    if buffer is None or buffer.size < size:
        _of_thread.buffer = buffer = np.empty(size, np.uint8)
    return buffer


class _Marker(NamedTuple):
    """A marker of a JPEG: its code, where it begins, and where the segment after it ends."""

    code: int
    start: int
    end: int


def _jpeg_markers(data: bytes) -> Iterator[_Marker]:
    """The markers of a JPEG that have a segment, as libjpeg finds them, and the one that ends the image."""
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
    """The markers of a JPEG up to the first that begins pixels."""
    head = []
    for marker in islice(_jpeg_markers(data), _MAX_SEGMENTS):
        head.append(marker)
        if marker.code == _SCAN:
            break
    return head


def _check_jpeg(data: bytes, name: str) -> None:
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


def _may_be_turned(jpeg: bytes) -> bool:
    """Whether a JPEG has a segment of EXIF or XMP before its pixels."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker in (_APP1, _SCAN):
            return marker == _APP1
        place += 1 if marker == 0xFF else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")  # 0xFF may fill
    return False


def _decode_jpeg(data: bytes, channels: int, name: str, *, buffer: npt.NDArray[np.uint8] | None = None) -> Tensor:
    """(channels, H, W) uint8; in ``buffer``, unless that is None or the image is turned or becomes grey."""
    import simplejpeg
    import torch
    from PIL import Image

    try:
        # (H, W, 3) uint8; strict by default: what libjpeg warns of is an error
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        raise _undecodable(name, error) from error
    if _may_be_turned(data):
        pixels = _turned(pixels, _orientation(_open(data, name)))
    if channels == 1:
        pixels = _as_array(Image.fromarray(pixels).convert("L"))[..., None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _check_size(height: int, width: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"image {name} must have at most {MAX_PIXELS} pixels, got {width} x {height}", reason="too large"
        )


def _open(data: bytes, name: str) -> Image.Image:
    """PIL's lazy open: reads the header alone."""
    if _kind_of_fault(data) != "damaged":
        raise _refusal(data, name)
    if data.startswith(_PNG):
        _check_png(data, name)
    elif data.startswith(_JPEG):
        _check_jpeg(data, name)
    from PIL import Image, UnidentifiedImageError

    bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = int(getattr(image, "n_frames", 1))
    except bombs as error:
        got = re.sub(r"\D*(\d+).*", r"\1", str(error))  # "Image size (N pixels) exceeds ..."
        text = f"image {name} must have at most {MAX_PIXELS} pixels, got {got}"
        raise UnreadableImageError(text, reason="too large") from error
    except _PIL_ERRORS as error:
        why = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else _first_words(error)
        raise _refusal(data, name, why) from error
    width, height = image.size
    _check_size(height, width, name)
    if frames > 1 and image.format != "MPO":  # a JPEG with further pictures behind it; the first is the photo
        raise UnreadableImageError(f"image {name} must be a still image, got {frames} frames", reason="animated")
    return image


def _refusal(data: bytes, name: str, why: str = "") -> UnreadableImageError:
    """The error of bytes that are no image of ours, by the first of them."""
    reason = _kind_of_fault(data)
    if reason == "empty":
        text = f"image {name} is empty"
    elif reason == "not an image":
        text = f"image {name} must be a JPEG, PNG or WebP file, got one that begins with {data[:8]!r}"
    else:
        text = f"image {name} is damaged: {why}"
    return UnreadableImageError(text, reason=reason)


def _undecodable(name: str, error: Exception) -> UnreadableImageError:
    return UnreadableImageError(f"image {name} cannot be decoded: {_first_words(error)}")


def _first_words(error: Exception) -> str:
    """Returns the text of another package's error in one line, without its place in C++."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return printable(_SOURCE_LINE.sub("", first)[:200])


def _kind_of_fault(data: bytes) -> Reason:
    """Says what is wrong with bytes that cannot be opened, by the first 12 of them."""
    if not data:
        return "empty"
    ours = data.startswith((_JPEG, _PNG)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    return "damaged" if ours else "not an image"


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8, found without decoding; 1 where EXIF is missing or spoilt."""
    if image.format == "PNG" and not {"exif", "xmp"} & image.info.keys():
        return 1  # getexif would decode the pixels to look behind them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION, 1)
    except _PIL_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    return _transposed(image, _orientation(image))


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    if orientation == 1:
        return pixels
    turned: npt.NDArray[np.uint8] = _as_array(_transposed(Image.fromarray(pixels), orientation))
    return turned


def _transposed(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    undoing = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == 1 else image.transpose(undoing[orientation])


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled (PIL alone would clip it), transparency laid over white; other modes as they are."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = _as_array(image)
        grey = (values.astype("uint32") >> 8).clip(max=255).astype("uint8")
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over)
    return image


def _as_array(image: Image.Image) -> Any:
    import numpy as np

    return np.array(image)

"""Bytes of an image file -> uint8 tensor of the size and channels asked for.

The header is read before any pixel is allocated. Grey and colour JPEG go through simplejpeg: PIL's pixels in half the
time, and what libjpeg only warns of (flipped or zeroed bytes) is an error, where PIL and torchvision return garbage.
Plain 8-bit PNG goes through torchvision, 2.5 times faster than PIL on 28 x 28; palettes, alpha, CMYK, 16 bit and WebP
go through PIL, which converts them rightly. Resampling is bicubic (a = -0.5) and antialiased, from full resolution:
decoding at a fraction of the size would make the pixels depend on how the size divides.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

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
    "decode_image",
    "encode_png",
    "fit_square",
    "from_pil",
    "load_square",
    "load_square_into",
    "read_header",
]

Crop = Literal["center", "random"]
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64 * 10**6
_CHANNELS = {"1": 1, "L": 1, "I;16": 1, "I": 1, "LA": 4, "PA": 4, "RGBA": 4}  # every other mode becomes RGB
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2 to 8 turned or mirrored; from 5 on height and width change places
_MOST_SCRATCH = 2**24  # bytes; larger images get memory of their own
_of_thread = threading.local()
# What PIL raises on files that are damaged or hostile.
_PIL_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
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


def read_header(data: bytes, *, name: str) -> ImageHeader:
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


def decode_image(data: bytes, *, channels: int, name: str) -> Tensor:
    """Decode an image, upright.

    Args:
        data: The whole file's bytes.
        channels: 1 for grey (luma of ITU-R 601), 3 for RGB. Alpha is laid over white.
        name: What to call the image in an error.

    Returns:
        (channels, H, W) uint8, mostly channels-last in memory.

    Raises:
        UnreadableImageError: As ``read_header``, or the pixels cannot be decoded. Damage is found in JPEG where its
            code words break and in PNG by its checksums; WebP has none.
    """
    if channels not in (1, 3):
        raise ValueError(f"in_channels: 1 (grey) or 3 (RGB) is needed, got {channels}")
    if _is_plain_png(data, channels):
        return _decode_png(data, channels, name)
    if _plain_jpeg_size(data, name) is not None:
        return _decode_jpeg(data, channels, name)
    return _decode_with_pil(_open(data, name), channels, name)


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


def from_pil(image: Image.Image, *, channels: int) -> Tensor:
    """A PIL picture's pixels, upright; 16-bit grey scaled, alpha laid over white.

    Args:
        image: Of any mode.
        channels: 1 for grey (luma of ITU-R 601), 3 for RGB.

    Returns:
        (channels, H, W) uint8.
    """
    import torch

    image.load()  # EXIF may lie behind a PNG's pixels
    converted = _to_eight_bits(_upright(image)).convert("L" if channels == 1 else "RGB")
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


def _is_plain_png(data: bytes, channels: int) -> bool:
    """An 8-bit grey or RGB PNG within the pixel limit, with no transparency, animation or rotation, by its chunks."""
    if data[:8] != _PNG or len(data) < 33 or data[12:16] != b"IHDR":
        return False
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    odd = any(chunk in data for chunk in (b"tRNS", b"acTL", b"eXIf", b"tiff:Orientation"))
    fits = 0 < width * height <= MAX_PIXELS
    return depth == 8 and fits and not odd and (colour == 0 or (colour == 2 and channels == 3))


def _decode_png(data: bytes, channels: int, name: str) -> Tensor:
    import torch
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_png as decode

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        # bytearray: torch refuses to share memory that it may not write to
        pixels: Tensor = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except RuntimeError as error:
        raise UnreadableImageError(f"image {name}: cannot be decoded ({error})") from error
    return pixels


def _plain_jpeg_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Height and width, as stored, of a grey or colour JPEG; None for anything else. Takes 2 microseconds.

    Raises:
        UnreadableImageError: It is too large.
    """
    if data[:3] != _JPEG:
        return None
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


def _may_be_turned(jpeg: bytes) -> bool:
    """Whether a JPEG has a segment of EXIF or XMP before its pixels."""
    place = 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker in (0xE1, 0xDA):  # APP1, start of the pixels
            return marker == 0xE1
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
        raise UnreadableImageError(f"image {name}: cannot be decoded ({error})") from error
    if _may_be_turned(data):
        pixels = _turned(pixels, _orientation(_open(data, name)))
    if channels == 1:
        pixels = _as_array(Image.fromarray(pixels).convert("L"))[..., None]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _check_size(height: int, width: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"image {name}: at most {MAX_PIXELS} pixels are read, got {width} x {height}", reason="too large"
        )


def _open(data: bytes, name: str) -> Image.Image:
    """PIL's lazy open: reads the header alone."""
    from PIL import Image, UnidentifiedImageError

    bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = int(getattr(image, "n_frames", 1))
    except bombs as error:
        text = f"image {name}: at most {MAX_PIXELS} pixels are read ({error})"
        raise UnreadableImageError(text, reason="too large") from error
    except _PIL_ERRORS as error:
        kinds = f"a JPEG, PNG or WebP of at most {MAX_PIXELS // 10**6} Mpx"
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise UnreadableImageError(
            f"image {name}: {kinds} is needed, got {data[:8]!r}...{why}", reason=_kind_of_fault(data)
        ) from error
    width, height = image.size
    _check_size(height, width, name)
    if frames > 1 and image.format != "MPO":  # a JPEG with further pictures behind it; the first is the photo
        raise UnreadableImageError(f"image {name}: a still image is needed, got {frames} frames", reason="animated")
    return image


def _kind_of_fault(data: bytes) -> Reason:
    """Of bytes that PIL does not open."""
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


def _decode_with_pil(image: Image.Image, channels: int, name: str) -> Tensor:
    try:
        return from_pil(image, channels=channels)
    except _PIL_ERRORS as error:
        raise UnreadableImageError(f"image {name}: cannot be decoded ({error})") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled (PIL alone would clip it), transparency laid over white; other modes as they are."""
    from PIL import Image

    if image.mode.startswith("I"):
        return Image.fromarray((_as_array(image).astype("uint32") >> 8).clip(max=255).astype("uint8"))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over)
    return image


def _as_array(image: Image.Image) -> Any:
    import numpy as np

    return np.array(image)

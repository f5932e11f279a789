"""Decoding of images: the bytes of a file become a uint8 tensor of a given size and number of channels.

* Files may be hostile: ``image_bytes`` limits their parts before any pixel is allocated.
* Grey and colour JPEG: simplejpeg gives the pixels of PIL in half the time. It also raises an error where
  libjpeg only warns (flipped or zeroed bytes), while PIL returns garbage.
* PNG, WebP and CMYK JPEG: PIL. Of 16 bits, the upper byte is kept. Transparent images are composited over white.
* Resampling is bicubic (a = -0.5) and antialiased, from full resolution: at a fraction of its size, a JPEG's
  pixels would depend on the ratio of the sizes.

Used by the data modules, by ``tokenize`` and by commands that read images.
"""

from __future__ import annotations

import io
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image
from PIL.Image import Transpose

from maskgit_pl.checks import ImageSize, height_width
from maskgit_pl.data.image_bytes import (
    JPEG_MAGIC,
    PIL_ERRORS,
    UnreadableImageError,
    check_size,
    first_line,
    open_image,
    pil_errors,
    read_jpeg_head,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor


_ORIENTATION = 0x0112  # EXIF tag: 1 upright, 2 to 8 rotated or mirrored; 5 to 8 swap height and width
_GREY = ("1", "L", "LA", "I;16", "I")  # modes of PIL; every other one becomes RGB
_MODES = {1: "L", 3: "RGB"}  # of PIL, by the channels of the result
_MAX_SCRATCH_BYTES = 2**24  # of the reused buffer; larger images get new memory

_thread_local = threading.local()


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image."""

    format: str  # JPEG, PNG or WEBP
    height: int  # in pixels as displayed, after the EXIF orientation
    width: int
    channels: int  # 1 (grey) or 3 (colour); alpha is not counted


def parse_image_header(data: bytes, *, name: str) -> ImageHeader:
    """Reads format, size and channels of an image, all bytes of its file, without decoding pixels."""
    image = open_image(data, name, header_only=True)
    width, height = image.size
    if _find_orientation(image) >= 5:
        width, height = height, width
    return ImageHeader(str(image.format), height, width, 1 if image.mode in _GREY else 3)


def decode_image(
    data: bytes, *, channels: int, name: str, background: str = "white", reuse_memory: bool = False
) -> Tensor:
    """Decodes an image and applies its EXIF orientation.

    Args:
        data: All bytes of the file.
        channels: 1 for grey (luma of ITU-R 601), 3 for RGB.
        name: The image's name in error messages.
        background: Colour below transparent pixels.
        reuse_memory: True may return a view of memory that the next call in this thread overwrites.
            Allocating new memory for each image would take a fifth of the decoding time.

    Returns:
        (channels, H, W) uint8, in most cases channels-last in memory.
    """
    colours = ""
    if data.startswith(JPEG_MAGIC):
        head, _ = read_jpeg_head(data, name)
        with suppress(ValueError):  # damaged, or a rare layout: PIL decides
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("Gray", "RGB", "YCbCr"):
        return from_pil(open_image(data, name), channels=channels, name=name, background=background)
    check_size(height, width, name)
    try:
        # (H, W, 3) uint8; strict by default: libjpeg's warnings are errors
        buffer = _scratch(3 * height * width) if reuse_memory else None
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        raise UnreadableImageError(f"image {name} cannot be decoded: {first_line(error)}") from error
    orientation = _find_orientation(open_image(head, name, header_only=True)) if b"\xff\xe1" in head else 1
    if orientation == 1 and channels == 3:
        return _to_tensor(pixels)
    return from_pil(_apply_orientation(Image.fromarray(pixels), orientation), channels=channels, name=name)


def from_pil(image: Image.Image, *, channels: int, name: str, background: str = "white") -> Tensor:
    """Converts a PIL image to a tensor: orientation applied, 16-bit grey scaled to 8.

    Args:
        image: Image of any mode.
        channels: Channels of the result; see ``decode_image``.
        name: The image's name in error messages.
        background: Colour below transparent pixels.

    Returns:
        (channels, H, W) uint8, channels-last in memory.
    """
    check_size(image.height, image.width, name)
    with pil_errors(name):
        image.load()  # EXIF may follow a PNG's pixels
        upright = _apply_orientation(image, _find_orientation(image))
        converted = _flatten(upright, background)
        if converted.mode != _MODES[channels]:
            converted = converted.convert(_MODES[channels])
        pixels = np.array(converted)  # (H, W) or (H, W, channels)
    return _to_tensor(pixels.reshape(*pixels.shape[:2], channels))


def encode_png(image: Tensor) -> bytes:
    """Encodes an image (C, H, W) uint8 with C = 1 or 3 as PNG; equal pixels give equal bytes."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def encode_jpeg(image: Tensor) -> bytes:
    """Encodes an image (C, H, W) uint8 with C = 1 or 3 as JPEG of quality 95, with colours at half the resolution."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    kind, sampling = ("GRAY", "Gray") if pixels.shape[-1] == 1 else ("RGB", "420")
    data: bytes = simplejpeg.encode_jpeg(pixels, quality=95, colorspace=kind, colorsubsampling=sampling)
    return data


def fit_image(image: Tensor, *, image_size: ImageSize, crop: tuple[float, float] | None) -> Tensor:
    """Crops an image to the shape of the result and resizes it. An image of the right size is returned unchanged.

    The result is that of the usual "resize until the result fits in, then crop", without resizing the pixels
    outside the crop.

    Args:
        image: (C, h, w) uint8.
        image_size: Size of the result: H = W, or (H, W).
        crop: Place of the crop; see ``crop_to_shape``.

    Returns:
        (C, H, W) uint8.
    """
    size = height_width(image_size)
    part = crop_to_shape(image, image_size=size, crop=crop)
    return part if part.shape[-2:] == size else resize(part, size)


def crop_to_shape(image: Tensor, *, image_size: ImageSize, crop: tuple[float, float] | None = None) -> Tensor:
    """Crops the largest part of an image whose sides have a given ratio.

    Args:
        image: (C, h, w).
        image_size: H = W, or (H, W), of which only the ratio matters.
        crop: Place of the part along (height, width), each in [0, 1); None for the centre.

    Returns:
        A part of ``image``. One side is that of the image; the other is rounded to the nearest pixel, at least 1.
    """
    (height, width), (rows, columns) = image.shape[-2:], height_width(image_size)
    high = min(height, max(1, (2 * width * rows + columns) // (2 * columns)))
    wide = min(width, max(1, (2 * height * columns + rows) // (2 * rows)))
    if crop is None:
        top, left = (height - high) // 2, (width - wide) // 2
    else:
        top, left = int(crop[0] * (height - high + 1)), int(crop[1] * (width - wide + 1))
    return image[:, top : top + high, left : left + wide]


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes an image (C, h, w) uint8 to a height and width."""
    import torch

    # The layout of decoded images; the other layout takes twice as long.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def _to_tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Returns pixels (H, W, C) as a tensor (C, H, W) of the same memory."""
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1)


def _scratch(size: int) -> npt.NDArray[np.uint8] | None:
    """Returns this thread's buffer to decode into, or None for large images."""
    if size > _MAX_SCRATCH_BYTES:
        return None
    buffer: npt.NDArray[np.uint8] | None = getattr(_thread_local, "buffer", None)
    if buffer is None or buffer.size < size:
        _thread_local.buffer = buffer = np.empty(size, np.uint8)
    return buffer


def _find_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, without decoding pixels; 1 if EXIF is missing or damaged."""
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode the pixels, to search after them
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except PIL_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    """Rotates or mirrors a stored image so that it is upright, by its EXIF orientation, 1 to 8."""
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


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """Scales 16-bit grey, which PIL would clip, to 8 bits, and composites transparent images over a colour."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.array(image).astype("uint32") >> 8).clip(max=255).astype("uint8"))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image

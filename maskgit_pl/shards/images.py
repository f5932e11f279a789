"""Decoding of images: the bytes of a file become a uint8 tensor of a given size and number of channels.

Used by the data modules, by ``tokenize`` and by commands that read images.

* The header is read before any pixel is allocated. Files may be hostile; ``image_bytes`` limits their parts first.
* Grey and colour JPEG: simplejpeg gives the pixels of PIL in half the time. It also raises an error where libjpeg only
  warns (flipped or zeroed bytes), while PIL and torchvision return garbage.
* Plain 8-bit PNG: torchvision, 2.5 times faster than PIL on 28 x 28.
* Palettes, alpha, CMYK, 16 bit and WebP: PIL, which converts them correctly.
* Results with 1 or 3 channels show transparent images over white. Those with 2 or 4 keep alpha; opaque files get 255.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maskgit_pl.image_format import ImageSize, check_channels, height_width
from maskgit_pl.shards.crops import Place, fit_image
from maskgit_pl.shards.image_bytes import (
    JPEG_MAGIC,
    MAX_PIXELS,
    PNG_MAGIC,
    Reason,
    UnreadableImageError,
    check_complete,
    check_jpeg,
    check_png,
    check_size,
    image_error,
    is_plain_png,
    kind_of_fault,
    may_be_rotated,
    png_chunks,
    read_image_file,
)
from maskgit_pl.shards.orientation import PIL_ERRORS, apply_orientation, find_orientation
from maskgit_pl.text import printable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

__all__ = [
    "ImageHeader",
    "Reason",
    "UnreadableImageError",
    "check_complete",
    "decode_image",
    "encode_png",
    "from_pil",
    "load_image",
    "load_image_into",
    "parse_image_header",
    "read_image_file",
]

FORMATS = ("JPEG", "PNG", "WEBP")
_CHANNELS = {"1": 1, "L": 1, "I;16": 1, "I": 1, "LA": 4, "PA": 4, "RGBA": 4}  # every other mode becomes RGB
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of PIL, by the channels of the result
_MAX_SCRATCH_BYTES = 2**24  # of the reused buffer; larger images get new memory
_thread_local = threading.local()
_SOURCE_LINE = re.compile(r"^.*\.cpp:\d+, ")  # the beginning of torchvision's errors


@dataclass(frozen=True)
class ImageHeader:
    """The header of an image.

    Args:
        format: ``"JPEG"``, ``"PNG"`` or ``"WEBP"``.
        height: Height in pixels as displayed, after the EXIF orientation.
        width: Width in pixels as displayed.
        channels: 1 (grey), 3 (colour) or 4 (with alpha).
    """

    format: str
    height: int
    width: int
    channels: int


def parse_image_header(data: bytes, *, name: str) -> ImageHeader:
    """Reads format, size and channels of an image without decoding pixels.

    Args:
        data: All bytes of the file.
        name: The image's name in error messages, such as ``train-000000.tar:00000012.png``.

    Raises:
        UnreadableImageError: if it is not a still JPEG, PNG or WebP of at most 64 million pixels.
    """
    image = _open(data, name)
    width, height = image.size
    if find_orientation(image) >= 5:
        width, height = height, width
    # MPO: a JPEG followed by further pictures, as phones write it
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    return ImageHeader(kind, height, width, _CHANNELS.get(image.mode, 3))


def decode_image(data: bytes, *, channels: int, name: str) -> Tensor:
    """Decodes an image and applies its EXIF orientation.

    Args:
        data: All bytes of the file.
        channels: 1 for grey (luma of ITU-R 601), 2 for grey with alpha, 3 for RGB, 4 for RGBA. Without alpha,
            transparent images are composited over white.
        name: The image's name in error messages.

    Returns:
        (channels, H, W) uint8, in most cases channels-last in memory.

    Raises:
        ValueError: if ``channels`` is not 1, 2, 3 or 4.
        UnreadableImageError: if ``parse_image_header`` rejects the image, or its pixels cannot be decoded. Damage of a
            JPEG is found where a code word is invalid, of a PNG by checksums; WebP has none.
    """
    check_channels("in_channels", channels)
    chunks = check_png(data, name) if data.startswith(PNG_MAGIC) else frozenset()
    if is_plain_png(data, chunks, channels):
        return _decode_png(data, channels, name)
    if _plain_jpeg_size(data, name) is not None:
        return _decode_jpeg(data, channels, name)
    image = _open(data, name)
    if b"tRNS" in chunks and data[25] in (0, 2):  # grey or RGB with one transparent colour
        return _decode_colour_key(data, image, channels, name)
    return from_pil(image, channels=channels, name=name)


def load_image(data: bytes, *, image_size: ImageSize, channels: int, crop: Place, name: str) -> Tensor:
    """Decodes an image, crops it to the shape of the result and resizes it.

    Args:
        data: All bytes of the file.
        image_size: Size of the result: H = W, or (H, W).
        channels: Channels of the result; see ``decode_image``.
        crop: Place of the crop; see ``load_image_into``.
        name: The image's name in error messages.

    Returns:
        (channels, H, W) uint8, channels-last in memory.

    Raises:
        UnreadableImageError: See ``decode_image``.
    """
    import torch

    image = torch.empty((*height_width(image_size), channels), dtype=torch.uint8).permute(2, 0, 1)
    load_image_into(image, data, crop=crop, name=name)
    return image


def load_image_into(out: Tensor, data: bytes, *, crop: Place, name: str) -> None:
    """Decodes an image, crops it and resizes it into existing memory, such as a row of a batch.

    Args:
        out: (C, H, W) uint8 with C = 1 to 4, overwritten with the result; fastest if it is channels-last.
        data: All bytes of the file.
        crop: Place of the crop, see ``crops.Place``; None for the centre.
        name: The image's name in error messages.

    Raises:
        UnreadableImageError: See ``decode_image``; ``out`` is then unchanged.
    """
    channels, height, width = out.shape
    size = _plain_jpeg_size(data, name)
    if size is None:
        image = decode_image(data, channels=channels, name=name)
    else:
        image = _decode_jpeg(data, channels, name, buffer=_scratch(3 * size[0] * size[1]))
    out.copy_(fit_image(image, image_size=(height, width), crop=crop))


def from_pil(image: Image.Image, *, channels: int, name: str) -> Tensor:
    """Converts a PIL image to a tensor: orientation applied, 16-bit grey scaled to 8.

    Args:
        image: Image of any mode.
        channels: Channels of the result; see ``decode_image``.
        name: The image's name in error messages.

    Returns:
        (channels, H, W) uint8.

    Raises:
        UnreadableImageError: if it has more than 64 million pixels, or its file cannot be decoded.
    """
    import torch

    check_size(image.height, image.width, name)
    try:
        image.load()  # EXIF may follow a PNG's pixels
        upright = apply_orientation(image, find_orientation(image))
        converted = _to_eight_bits(upright, has_alpha=channels % 2 == 0).convert(_MODES[channels])
    except PIL_ERRORS as error:
        raise _decode_error(name, error) from error
    pixels = _to_array(converted)  # (H, W) or (H, W, channels)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def encode_png(image: Tensor) -> bytes:
    """Encodes an image as PNG; equal pixels give equal bytes.

    Args:
        image: (C, H, W) uint8 with C = 1 to 4.
    """
    if image.shape[0] % 2:
        from torchvision.io import encode_png as encode

        data: bytes = encode(image).numpy().tobytes()
        return data
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(stream, format="PNG")
    return stream.getvalue()


def _decode_png(data: bytes, channels: int, name: str) -> Tensor:
    from torchvision.io import ImageReadMode

    return _decode_by_libpng(data, ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB, name)


def _decode_colour_key(data: bytes, opened: Image.Image, channels: int, name: str) -> Tensor:
    """Decodes a grey or RGB PNG with one transparent colour. PIL compares this colour at the wrong bit depth.

    1. Decode the pixels at their own depth, and read the transparent colour from the ``tRNS`` chunk.
    2. Make the pixels of that colour transparent.
    3. Continue as for any PIL image: orientation and channels.
    """
    import numpy as np
    from PIL import Image
    from torchvision.io import ImageReadMode

    # 1.
    pixels = _decode_by_libpng(data, ImageReadMode.UNCHANGED, name).numpy()  # (1 or 3, H, W) uint8 or uint16
    depth, top = data[24], 2 ** data[24] - 1
    key = next(data[chunk.start : chunk.end] for chunk in png_chunks(data) if chunk.name == b"tRNS")
    if len(key) != 2 * len(pixels):
        raise UnreadableImageError(f"image {name} is damaged: its transparent colour has {len(key)} bytes")
    values = (np.frombuffer(key, ">u2") & top) * (255 // top or 1)  # (1 or 3,); libpng scales depths below 8 bits
    # 2.
    opaque = (pixels != values[:, None, None]).any(axis=0)
    eight_bits = (pixels >> 8 if depth == 16 else pixels).astype(np.uint8)
    planes = [Image.fromarray(plane) for plane in (*eight_bits, opaque.astype(np.uint8) * 255)]
    picture = Image.merge("LA" if len(planes) == 2 else "RGBA", planes)
    # 3.
    try:
        opened.load()  # EXIF may follow the pixels
    except PIL_ERRORS as error:
        raise _decode_error(name, error) from error
    return from_pil(apply_orientation(picture, find_orientation(opened)), channels=channels, name=name)


def _decode_by_libpng(data: bytes, mode: Any, name: str) -> Tensor:
    import torch
    from torchvision.io import decode_png as decode

    try:
        # bytearray: torch warns of sharing memory that is read-only.
        pixels: Tensor = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except RuntimeError as error:
        raise _decode_error(name, error) from error
    return pixels


def _plain_jpeg_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Returns height and width, as stored, of a grey or colour JPEG; None for other files. Takes 2 microseconds.

    Raises:
        UnreadableImageError: if the JPEG exceeds a limit of ``check_jpeg`` or ``check_size``.
    """
    if data[:3] != JPEG_MAGIC:
        return None
    check_jpeg(data, name)
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # damaged, or a rare layout: PIL decides
        return None
    check_size(height, width, name)
    return (height, width) if colours in ("Gray", "RGB", "YCbCr") else None


def _scratch(size: int) -> npt.NDArray[np.uint8] | None:
    """Returns this thread's buffer to decode into, or None for large images.

    Allocating new memory for each image would take a fifth of the decoding time.
    """
    import numpy as np

    if size > _MAX_SCRATCH_BYTES:
        return None
    buffer: npt.NDArray[np.uint8] | None = getattr(_thread_local, "buffer", None)
    if buffer is None or buffer.size < size:
        _thread_local.buffer = buffer = np.empty(size, np.uint8)
    return buffer


def _decode_jpeg(data: bytes, channels: int, name: str, *, buffer: npt.NDArray[np.uint8] | None = None) -> Tensor:
    """Decodes a grey or colour JPEG.

    Returns:
        (channels, H, W) uint8, a view of ``buffer`` if one is given and the image is neither rotated nor made grey.
    """
    import simplejpeg
    import torch
    from PIL import Image

    try:
        # (H, W, 3) uint8; strict by default: libjpeg's warnings are errors
        pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    except ValueError as error:
        raise _decode_error(name, error) from error
    if may_be_rotated(data):
        pixels = _rotate_upright(pixels, find_orientation(_open(data, name)))
    if channels != 3:
        pixels = _to_array(Image.fromarray(pixels).convert(_MODES[channels])).reshape(*pixels.shape[:2], channels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(data: bytes, name: str) -> Image.Image:
    """Opens an image with PIL, which reads only the header, after the limits of ``image_bytes``."""
    if kind_of_fault(data) != "damaged":
        raise image_error(data, name)
    if data.startswith(PNG_MAGIC):
        check_png(data, name)
    elif data.startswith(JPEG_MAGIC):
        check_jpeg(data, name)
    from PIL import Image, UnidentifiedImageError

    bombs = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            # PIL warns of odd metadata, which is harmless, and of decompression bombs, which are not
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = int(getattr(image, "n_frames", 1))
    except bombs as error:
        got = re.sub(r"\D*(\d+).*", r"\1", str(error))  # "Image size (N pixels) exceeds ..."
        text = f"image {name} must have at most {MAX_PIXELS} pixels, got {got}"
        raise UnreadableImageError(text, reason="too large") from error
    except PIL_ERRORS as error:
        why = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else _first_words(error)
        raise image_error(data, name, why) from error
    width, height = image.size
    check_size(height, width, name)
    if frames > 1 and image.format != "MPO":  # the first picture of an MPO is the photo
        raise UnreadableImageError(f"image {name} must be a still image, got {frames} frames", reason="animated")
    return image


def _decode_error(name: str, error: Exception) -> UnreadableImageError:
    return UnreadableImageError(f"image {name} cannot be decoded: {_first_words(error)}")


def _first_words(error: Exception) -> str:
    """Returns the first line of another package's error, without its position in C++ code."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return printable(_SOURCE_LINE.sub("", first)[:200])


def _rotate_upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    if orientation == 1:
        return pixels
    turned: npt.NDArray[np.uint8] = _to_array(apply_orientation(Image.fromarray(pixels), orientation))
    return turned


def _to_eight_bits(image: Image.Image, *, has_alpha: bool) -> Image.Image:
    """Scales 16-bit grey, which PIL would clip, and makes transparency RGBA: as it is, or composited over white.

    Args:
        image: Image of any mode.
        has_alpha: True keeps alpha, and gives one to opaque modes that PIL does not convert to LA.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        values = _to_array(image)
        clear = values == image.info.get("transparency", -1)
        image = Image.fromarray((values.astype("uint32") >> 8).clip(max=255).astype("uint8"))
        if clear.any():
            image.putalpha(Image.fromarray((~clear).astype("uint8") * 255))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return over if has_alpha else Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB") if has_alpha and image.mode not in ("1", "L", "RGB") else image


def _to_array(image: Image.Image) -> Any:
    import numpy as np

    return np.array(image)

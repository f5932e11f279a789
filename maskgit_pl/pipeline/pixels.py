"""Reads images and masks from files, PIL images, tensors and arrays, and fits them to the size of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import ImageSize, height_width, pixels_text, shorten
from maskgit_pl.errors import printable

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ImageLike",
    "MaskLike",
    "check_fits",
    "fit_to_model",
    "image_pixels",
    "mask_pixels",
]

ImageLike: TypeAlias = Union[str, Path, "Image.Image", "Tensor", "npt.NDArray[Any]"]
MaskLike: TypeAlias = ImageLike

_WHITE = 128  # pixels of a mask picture with at least this grey value are generated


def image_pixels(image: ImageLike, *, channels: int, name: str = "image", background: str = "white") -> Tensor:
    """Reads an image for the tokenizer: rotated upright, with the channels of the model.

    Args:
        image: JPEG, PNG or WebP file, PIL image, or uint8 pixels as a tensor (C, H, W) or an array (H, W) or (H, W, C)
            with C = 1 to 4.
        channels: 1 for grey, 3 for RGB.
        name: Word for the image in an error, if it is not a file.
        background: Colour below transparent pixels.

    Returns:
        (channels, H, W) uint8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, has too many pixels, is not uint8 of one of these shapes, or is a PIL image
            of floats or 32-bit integers.
        TypeError: if it is something else.
    """
    from PIL import Image  # with the first image only

    from maskgit_pl.data.images import decode_image, from_pil, read_image_file

    if isinstance(image, str | Path):
        shown = printable(image)
        if not Path(image).exists():
            raise FileNotFoundError(f"image {shown}: no such file; name a JPEG, PNG or WebP file")
        data = read_image_file(image, name=shown)
        return decode_image(data, channels=channels, name=shown, background=background)
    # Tensors and arrays go through PIL, so that all sources are converted in the same way.
    picture = image if isinstance(image, Image.Image) else Image.fromarray(_pixels(image, name))
    # PIL would clip the values to [0, 255], so that [0, 1] becomes black. Older versions open a PNG of 16 bits as "I".
    if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
        raise ValueError(
            f"{name} must have 8 bits per channel, or 16 bits of grey, got a PIL image of mode {picture.mode}; scale "
            'its values to [0, 255] and convert it to "L"'
        )
    return from_pil(picture, channels=channels, name=f"({name})", background=background)


def mask_pixels(mask: MaskLike, *, name: str = "mask") -> Tensor:
    """Reads a mask.

    Args:
        mask: File or PIL image, white (grey value >= 128) where pixels are generated, or a bool tensor or array (H, W).
            Transparent pixels are composited over black, so that they stay as they are.
        name: Word for the mask in an error, if it is not a file.

    Returns:
        (H, W) bool, True where pixels are generated.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither a picture nor (H, W) bool.
        TypeError: if it is something else.
    """
    from PIL import Image

    if isinstance(mask, str | Path) and not Path(mask).exists():
        raise FileNotFoundError(f"mask {printable(mask)}: no such file; name a JPEG, PNG or WebP file")
    if isinstance(mask, str | Path | Image.Image):
        # Over black: nothing is painted where the picture is transparent.
        return image_pixels(mask, channels=1, name=name, background="black")[0] >= _WHITE
    if not isinstance(mask, torch.Tensor | np.ndarray) or (isinstance(mask, np.ndarray) and mask.dtype.hasobject):
        raise TypeError(f"{name} must be a file, a PIL image or (H, W) bool, got {shorten(mask)}")
    made = torch.as_tensor(mask).cpu()
    if made.dtype != torch.bool or made.ndim != 2:
        raise ValueError(
            f"{name} must be (H, W) bool, got {tuple(made.shape)} {made.dtype}; for grey values use mask >= {_WHITE}"
        )
    return made


def check_fits(height: int, width: int, *, image_size: ImageSize, fit: bool, name: str = "image") -> None:
    """Checks that an image has the size of the model, unless it will be fitted.

    Args:
        height: H of the image.
        width: W of the image.
        image_size: Image size of the model: a side, or (height, width), in pixels.
        fit: True accepts any size. See ``fit_to_model``.
        name: Word for the image in an error.

    Raises:
        ValueError: if the sizes differ and ``fit`` is False.
    """
    if not fit and (height, width) != height_width(image_size):
        raise ValueError(
            f"{name} must have the {pixels_text(image_size)} pixels of the model, got {width} x {height}; fit=True "
            "(--fit) crops and resizes it"
        )


def fit_to_model(
    image: Tensor, mask: Tensor, *, image_size: ImageSize, fit: bool, name: str = "image"
) -> tuple[Tensor, Tensor]:
    """Crops and resizes an image and its mask to the size of the model.

    Args:
        image: (C, h, w) uint8.
        mask: (h, w) bool.
        image_size: Image size of the model: H = W, or (H, W), in pixels.
        fit: True crops both to the central part with the model's shape and resizes it; False accepts images of the
            model's size only.
        name: Word for the image in an error.

    Returns:
        (C, H, W) uint8 and (H, W) bool. A pixel of the new mask is True if any pixel of the old mask that it covers is.

    Raises:
        ValueError: if image and mask differ in size, their size is not the model's without ``fit``, or the mask is all
            False.
    """
    from maskgit_pl.data.images import crop_to_shape, fit_image

    height, width = image.shape[-2:]
    if mask.shape != image.shape[-2:]:
        raise ValueError(
            f"mask of {name} must have {width} x {height} pixels like the image, got {mask.shape[1]} x {mask.shape[0]}"
        )
    check_fits(height, width, image_size=image_size, fit=fit, name=name)
    if not bool(mask.any()):
        raise ValueError(f"mask of {name} must not be empty; paint the region to generate white, or give a box")
    part = crop_to_shape(mask[None], image_size=image_size)
    # Max pooling keeps a masked pixel when the mask becomes smaller; resizing could lose it.
    cut = F.adaptive_max_pool2d(part.float(), height_width(image_size))[0] > 0
    if not bool(cut.any()):
        raise ValueError(f"mask of {name} lies outside the central part that is cut out; crop the image yourself")
    return fit_image(image, image_size=image_size, crop=None), cut


def _pixels(image: Tensor | npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Checks a tensor (C, H, W) or array (H, W) or (H, W, C), and converts it to an array (H, W) or (H, W, C > 1)."""
    if not isinstance(image, Tensor | np.ndarray):
        raise TypeError(
            f"{name} must be a file, a PIL image, a tensor (C, H, W) or an array (H, W, C), got {shorten(image)}"
        )
    shown = f"{tuple(image.shape)} {image.dtype}"
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
        # torch has channels first, numpy and PIL have them last.
        image = rearrange(image, "c h w -> h w c") if image.ndim == 3 else image
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 2, 3, 4) or pixels.size == 0:
        raise ValueError(f"{name} must be uint8, a tensor (C, H, W) or an array (H, W, C) with C = 1 to 4, got {shown}")
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

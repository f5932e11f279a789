"""Crops and resizes decoded images to the size of the model's images.

Resampling is bicubic (a = -0.5) and antialiased, from full resolution. Decoding a JPEG at a fraction of its size would
make the pixels depend on the ratio of the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from maskgit_pl.checks import check_choice
from maskgit_pl.image_format import ImageSize, height_width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Crop", "Place", "check_crop", "crop_to_shape", "fit_image", "resize"]

Crop = Literal["center", "random"]
Place = tuple[float, float] | Callable[["Tensor", tuple[int, int]], "Tensor"] | None
"""The part of an image that is used: its place along (height, width), each in [0, 1), a function of the image and of
the size of the result, which crops by itself, or None for the centre."""


def check_crop(crop: str) -> None:
    """Checks that a crop is ``"center"`` or ``"random"``.

    Raises:
        ValueError: if it is not. The message lists the choices.
    """
    check_choice("crop", crop, get_args(Crop))


def fit_image(image: Tensor, *, image_size: ImageSize, crop: Place) -> Tensor:
    """Crops an image to the shape of the result and resizes it. An image of the right size is returned unchanged.

    The result is that of the usual "resize until the result fits in, then crop", without resizing the pixels outside
    the crop.

    Args:
        image: (C, h, w) uint8.
        image_size: Size of the result: H = W, or (H, W).
        crop: Place of the crop; see ``crop_to_shape``. A function returns the result itself.

    Returns:
        (C, H, W) uint8.
    """
    size = height_width(image_size)
    if callable(crop):
        return crop(image, size)
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
    """Resizes an image.

    Args:
        image: (C, h, w) uint8.
        size: Height and width of the result.

    Returns:
        (C, H, W) uint8.
    """
    import torch

    # The layout of decoded images; the other layout takes twice as long.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]

"""Regions of an edit: boxes and masks in pixels, the tokens that they cover, and the seam of the result.

Used by ``pipeline.edit`` and the editing commands.

Source: paper, section on class-conditional image editing; google-research/maskgit, the editing functions of its demo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, TypeAlias

from einops import reduce, repeat

from maskgit_pl.checks import check_integer, check_number, plain_number
from maskgit_pl.image_format import ImageSize, height_width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Box",
    "box_mask",
    "check_blend",
    "check_box",
    "check_dilation",
    "composite",
    "first_step",
    "parse_box",
    "pixel_region",
    "seam",
    "seam_radius",
    "token_mask",
]

Box: TypeAlias = Sequence[int]

_RANGE = "[0, 65536]"  # of dilation and blend: the sides of the largest image

_STEPS_SKIPPED = 6  # an edit skips one sixth of the steps: the released code skips 2 of 12
_EDGE = re.compile(r"(?P<number>-?[0-9]{1,9}(\.[0-9]{1,9})?)(?P<percent>%)?")  # one edge of a box


def check_dilation(dilation: object) -> int:
    """Returns ``dilation``, a number of tokens, as an ``int``.

    Raises:
        ValueError: if it is not an integer in [0, 65536].
    """
    return check_integer("dilation", plain_number(dilation), _RANGE)


def check_blend(blend: object) -> float:
    """Returns ``blend``, a blur in pixels.

    Raises:
        ValueError: if it is not a number in [0, 65536].
    """
    return check_number("blend", plain_number(blend), _RANGE)


def check_box(box: Box, *, height: int, width: int) -> None:
    """Checks that a box lies within an image.

    Args:
        box: (left, top, right, bottom) in pixels; right and bottom are exclusive.
        height: H of the image in pixels.
        width: W of the image in pixels.

    Raises:
        ValueError: if it does not have four numbers, is empty or reversed, or leaves the image.
        TypeError: if a number is not an integer.
    """
    shown = ",".join(map(str, box))
    if len(box) != 4:
        raise ValueError(f"box must have four numbers left,top,right,bottom, got {shown}")
    if any(isinstance(edge, bool) or not hasattr(edge, "__index__") for edge in box):
        raise TypeError(f"box must have integers, got {shown}; round the pixels")
    left, top, right, bottom = box
    for low, high, names in ((left, right, "left < right"), (top, bottom, "top < bottom")):
        if low >= high:
            raise ValueError(f"box must be left,top,right,bottom with {names}, got {shown}")
    if left < 0 or top < 0 or right > width or bottom > height:
        raise ValueError(
            f"box must lie in the image, with left and top >= 0, right <= {width} and bottom <= {height}, got {shown}"
        )


def parse_box(text: str, *, height: int, width: int) -> list[int]:
    """Parses a box: four edges separated by commas, each in whole pixels or in percent of the image.

    Percentages of left and top are rounded down to pixels, those of right and bottom up.

    Args:
        text: left,top,right,bottom such as ``0,0,14,28`` or ``10%,20%,60%,80%``.
        height: H of the image in pixels.
        width: W of the image in pixels.

    Raises:
        ValueError: if the text has another form. ``check_box`` checks that the box lies within the image.
    """
    # Percentages of left and right refer to the width, those of top and bottom to the height.
    edges = [_EDGE.fullmatch(word.strip()) for word in text.split(",")]
    box = []
    for edge, length, to_pixels in zip(edges, (width, height, width, height), (floor, floor, ceil, ceil), strict=False):
        if edge is None or (edge["percent"] is None and "." in edge["number"]):
            break
        # Fraction keeps 33.3% of 1000 pixels exact, so that rounding is not off by one.
        number = edge["number"]
        box.append(int(number) if edge["percent"] is None else to_pixels(Fraction(number) * length / 100))
    if len(edges) != 4 or len(box) != 4:
        raise ValueError(
            f"box must be left,top,right,bottom in whole pixels or in percent, such as 0,0,14,28 or 10%,20%,60%,80%, "
            f"got {text}"
        )
    return box


def box_mask(box: Box, *, height: int, width: int) -> Tensor:
    """Returns (H, W) bool, True inside a box. See ``check_box`` for arguments and errors."""
    import torch

    check_box(box, height=height, width=width)
    left, top, right, bottom = box
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def token_mask(mask: Tensor, *, factor: int, dilation: int = 0) -> Tensor:
    """Returns the tokens to generate again: those with a masked pixel, and their neighbours.

    Args:
        mask: (H, W) bool, True where pixels are generated.
        factor: Height and width of a token in pixels.
        dilation: Number of tokens by which the region grows on each side and diagonally, at least 0.

    Returns:
        (h, w) bool with h = ceil(H / factor) and w = ceil(W / factor).

    Raises:
        ValueError: if ``dilation`` is negative or above 65536.

    Source: released code, which takes the tokens of the box and one more on each side. It rounds position and size of
    the box down, so that a box between tokens may lose its last pixels; here no pixel is lost.
    """
    import torch.nn.functional as F

    check_dilation(dilation)
    # Pixels that the last tokens cover beyond the image.
    bottom, right = -mask.shape[0] % factor, -mask.shape[1] % factor
    # Pads with "not masked" to whole tokens, then takes the maximum over the pixels of each token.
    whole = F.pad(mask.float(), (0, right, 0, bottom))
    tokens = reduce(whole, "(h fh) (w fw) -> 1 h w", "max", fh=factor, fw=factor)
    if dilation > 0:  # max pooling of a bool mask is a dilation
        dilation = min(dilation, max(tokens.shape))  # which covers everything
        tokens = F.max_pool2d(tokens, 2 * dilation + 1, stride=1, padding=dilation)
    return tokens[0] > 0


def pixel_region(tokens: Tensor, *, factor: int, height: int, width: int) -> Tensor:
    """Returns the pixels that tokens cover: (h, w) bool -> (H, W) bool. See ``token_mask`` for ``factor``."""
    return repeat(tokens, "h w -> (h fh) (w fw)", fh=factor, fw=factor)[:height, :width]


def first_step(tokens: Tensor, *, num_steps: int) -> int:
    """Returns the first decoding step of an edit: floor(T / 6), or 0 if all tokens are masked.

    The first steps of a generation decide few tokens, because they have little context. An edit has context from the
    start.

    Args:
        tokens: Bool mask of any shape, True for the tokens to decode.
        num_steps: Number of decoding steps T.

    Source: released code: step 2 of 12.
    """
    return 0 if bool(tokens.all()) else num_steps // _STEPS_SKIPPED


def seam_radius(image_size: ImageSize) -> float:
    """Returns the blur of the seam in the released code: max(0, side / 16 - 1) pixels, here of the shorter side."""
    return max(0.0, min(height_width(image_size)) / 16 - 1)


def seam(region: Tensor, *, radius: float) -> Tensor:
    """Returns the weight of the edited image in each pixel: the blurred region.

    Args:
        region: (H, W) bool, True where tokens were generated.
        radius: Standard deviation of the Gaussian blur in pixels, at least 0. Beyond the image, the values at its
            border are repeated.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        ValueError: if ``radius`` is negative or above 65536.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageFilter

    check_blend(radius)
    if radius == 0:
        return region.float()
    # The released code blurs with PIL, on 8 bits.
    picture = Image.fromarray(region.cpu().numpy().astype(np.uint8) * 255)
    return torch.from_numpy(np.array(picture.filter(ImageFilter.GaussianBlur(radius)))).float() / 255


def composite(original: Tensor, edited: Tensor, weight: Tensor) -> Tensor:
    """Pastes part of an edited image into the original: original + weight * (edited - original).

    Args:
        original: (C, H, W) uint8.
        edited: (C, H, W) uint8.
        weight: (H, W) float32 in [0, 1] from ``seam``. 0 keeps the original bit by bit, 1 takes the edited image.

    Returns:
        (C, H, W) uint8.

    Source: released code, which blurs the token mask after enlarging it to the image.
    """
    mixed = original + weight * (edited.float() - original)
    return mixed.round().to(original.dtype)

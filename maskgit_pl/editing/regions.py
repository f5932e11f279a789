"""Regions of an image as tokens: boxes, masks, and the seam along which an edit is pasted back.

Source: paper, section on class-conditional image editing; google-research/maskgit, the editing functions of its demo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, TypeAlias

from einops import reduce, repeat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Box",
    "box_mask",
    "check_box",
    "composite",
    "first_step",
    "parse_box",
    "pixel_region",
    "seam",
    "seam_radius",
    "token_mask",
]

Box: TypeAlias = Sequence[int]

_STEPS_SKIPPED = 6  # one step in so many: 2 of the released 12
_EDGE = re.compile(r"(?P<number>-?[0-9]{1,9}(\.[0-9]{1,9})?)(?P<percent>%)?")  # of a box


def check_box(box: Box, *, height: int, width: int) -> None:
    """Refuses a box that is not a part of an image.

    Args:
        box: (left, top, right, bottom) in pixels; right and bottom are the first ones outside.
        height: H of the image.
        width: W of the image.

    Raises:
        ValueError: if it is not four numbers, empty, reversed, or not within the image.
        TypeError: if a number is not whole.
    """
    shown = ",".join(map(str, box))
    if len(box) != 4:
        raise ValueError(f"box {shown}: four numbers left,top,right,bottom are needed, got {len(box)}")
    if any(isinstance(edge, bool) or not hasattr(edge, "__index__") for edge in box):
        raise TypeError(f"box {shown}: whole numbers of pixels are needed; round them")
    left, top, right, bottom = box
    for low, high, names in ((left, right, "left < right"), (top, bottom, "top < bottom")):
        if low >= high:
            raise ValueError(
                f"box {shown}: {names} is needed, got {low} and {high}; the order is left,top,right,bottom"
            )
    if left < 0 or top < 0 or right > width or bottom > height:
        raise ValueError(
            f"box {shown}: it must lie within the image, left and top at least 0, right at most {width} and bottom at "
            f"most {height}"
        )


def parse_box(text: str, *, height: int, width: int) -> list[int]:
    """Returns the box that a text names: four edges with commas, in whole pixels or in percent of the image.

    Of percentages, left and top are rounded down, right and bottom up.

    Args:
        text: Such as ``0,0,14,28`` or ``10%,20%,60%,80%``: left, top, right, bottom.
        height: H of the image.
        width: W of the image.

    Raises:
        ValueError: if it is anything else. ``check_box`` checks that the box lies within the image.
    """
    edges = [_EDGE.fullmatch(word.strip()) for word in text.split(",")]
    box = []
    for edge, length, to_pixels in zip(edges, (width, height, width, height), (floor, floor, ceil, ceil), strict=False):
        if edge is None or (edge["percent"] is None and "." in edge["number"]):
            break
        number = edge["number"]
        box.append(int(number) if edge["percent"] is None else to_pixels(Fraction(number) * length / 100))
    if len(edges) != 4 or len(box) != 4:
        raise ValueError(
            f"box must be left,top,right,bottom in whole pixels or in percent, got {text}; write such as 0,0,14,28 "
            "or 10%,20%,60%,80%"
        )
    return box


def box_mask(box: Box, *, height: int, width: int) -> Tensor:
    """Returns the pixels of a box: (H, W) bool; arguments and errors as ``check_box``."""
    import torch

    check_box(box, height=height, width=width)
    left, top, right, bottom = box
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def token_mask(mask: Tensor, *, factor: int, dilation: int = 0) -> Tensor:
    """Returns the tokens to be generated again: those with any masked pixel, and their neighbours.

    Args:
        mask: (H, W) bool, True = to be generated.
        factor: Pixels along an edge of a token.
        dilation: Tokens by which the region grows on each side, diagonals too, at least 0; it ends at the border.

    Returns:
        (h, w) bool with h = ceil(H / factor), w = ceil(W / factor).

    Raises:
        ValueError: if ``dilation`` is negative.

    Source: released code: the box in tokens, and one more on each side. It rounds a box's position and size down, so
    that a box between tokens may lose its last pixels; here none is lost.
    """
    import torch.nn.functional as F

    if dilation < 0:
        raise ValueError(f"dilation: at least 0 tokens are needed, got {dilation}")
    bottom, right = -mask.shape[0] % factor, -mask.shape[1] % factor  # what the last tokens cover beyond the image
    whole = F.pad(mask.float(), (0, right, 0, bottom))
    tokens = reduce(whole, "(h fh) (w fw) -> 1 h w", "max", fh=factor, fw=factor)
    if dilation > 0:
        tokens = F.max_pool2d(tokens, 2 * dilation + 1, stride=1, padding=dilation)
    return tokens[0] > 0


def pixel_region(tokens: Tensor, *, factor: int, height: int, width: int) -> Tensor:
    """Returns the pixels that tokens cover: (h, w) bool -> (H, W) bool; other arguments as ``token_mask``."""
    return repeat(tokens, "h w -> (h fh) (w fw)", fh=factor, fw=factor)[:height, :width]


def first_step(tokens: Tensor, *, num_steps: int) -> int:
    """Returns the decoding step at which an edit starts: floor(T / 6), or 0 if nothing is known.

    The first steps of a generation decide few tokens because they lack context; an edit has it from the start.

    Args:
        tokens: Token mask, bool of any shape.
        num_steps: T.

    Source: released code: step 2 of 12.
    """
    return 0 if bool(tokens.all()) else num_steps // _STEPS_SKIPPED


def seam_radius(image_size: int) -> float:
    """Returns the released blur of the seam in pixels, max(0, image_size / 16 - 1): about one token of the paper's."""
    return max(0.0, image_size / 16 - 1)


def seam(region: Tensor, *, radius: float) -> Tensor:
    """Returns the share of the edited image in each pixel: the region, blurred.

    Args:
        region: (H, W) bool.
        radius: Standard deviation of the blur in pixels, at least 0; the border's values go on beyond it.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        ValueError: if the radius is negative or not finite.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageFilter

    if not 0 <= radius < math.inf:
        raise ValueError(f"blend: a blur of at least 0 pixels is needed, got {radius}; 0 gives a hard edge")
    if radius == 0:
        return region.float()
    picture = Image.fromarray(region.cpu().numpy().astype(np.uint8) * 255)
    return torch.from_numpy(np.array(picture.filter(ImageFilter.GaussianBlur(radius)))).float() / 255


def composite(original: Tensor, edited: Tensor, weight: Tensor) -> Tensor:
    """Pastes a part of an edited image into the original.

    Args:
        original: (C, H, W) uint8.
        edited: (C, H, W) uint8.
        weight: (H, W) float32 in [0, 1] of ``seam``: 0 leaves the original's value, bit by bit, and 1 takes the other.

    Returns:
        (C, H, W) uint8.

    Source: released code, which blurs the token mask, enlarged to the image.
    """
    mixed = original + weight * (edited.float() - original)
    return mixed.round().to(original.dtype)

"""Canvases larger than the images of the model: the pixels added around an image, and the windows that fill a canvas.

Used by outpainting and panoramas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from einops import rearrange

from maskgit_pl.checks import check_integer, check_number, plain_number
from maskgit_pl.data.image_bytes import MAX_PIXELS
from maskgit_pl.image_format import ImageSize, height_width

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Margins", "Window", "check_canvas", "check_overlap", "windows"]


_SIDES = f"[0, {MAX_PIXELS}]"  # a canvas has at most as many pixels as an image that can be read


@dataclass(frozen=True)
class Margins:
    """Numbers of pixels that are added to an image on each side.

    Args:
        left: Pixels on the left, at least 0.
        right: Pixels on the right, at least 0.
        up: Pixels above, at least 0.
        down: Pixels below, at least 0.

    Raises:
        ValueError: if a side is not an integer in [0, 64000000].
    """

    left: int
    right: int
    up: int
    down: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            object.__setattr__(self, name, check_integer(name, plain_number(value), _SIDES))

    def check(self, size: Sequence[int], *, factor: int, least: ImageSize) -> None:
        """Checks that the pixels can be added to an image.

        Args:
            size: (H, W) of the image in pixels.
            factor: Height and width of a token in pixels.
            least: Smallest size of the result: the image size of the model.

        Raises:
            ValueError: if all sides are 0, a size is not a multiple of ``factor``, or the result is too small or too
                large.
        """
        sides = asdict(self)
        if not any(sides.values()):
            raise ValueError("one of left, right, up and down must be > 0 pixels, got none")
        for name, value in {**sides, "height of the image": size[0], "width of the image": size[1]}.items():
            _check_whole_tokens(name, value, factor)
        check_canvas(size[0] + self.up + self.down, size[1] + self.left + self.right, factor=factor, least=least)

    def outside(self, height: int, width: int) -> Tensor:
        """Returns (H + up + down, W + left + right) bool, False inside the image (H, W)."""
        import torch

        mask = torch.ones(height + self.up + self.down, width + self.left + self.right, dtype=torch.bool)
        mask[self.up : self.up + height, self.left : self.left + width] = False
        return mask

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """The numbers (left, right, up, down)."""
        return self.left, self.right, self.up, self.down

    def at_most(self, height: int, width: int) -> Margins:
        """Returns the margins with up and down clipped to ``height`` pixels, and left and right to ``width``."""
        return Margins(min(self.left, width), min(self.right, width), min(self.up, height), min(self.down, height))

    def pad(self, image: Tensor, *, size: int, mode: Literal["constant", "replicate"] = "constant") -> Tensor:
        """Pads an image, or its grid of tokens, to the size of the canvas.

        Args:
            image: (C, H, W), or (H, W) in mode ``constant``, of any dtype; of a float dtype in mode ``replicate``.
            size: Height and width of an element in pixels: 1 for pixels, ``factor`` for tokens.
            mode: ``constant`` pads with 0, ``replicate`` repeats the last elements.

        Returns:
            (..., H + up + down, W + left + right) elements.
        """
        import torch.nn.functional as F

        return F.pad(image, [side // size for side in self.sides], mode=mode)


def check_canvas(height: int, width: int, *, factor: int, least: ImageSize) -> tuple[int, int]:
    """Checks the size of a canvas, and returns it as plain integers (H, W).

    Args:
        height: H in pixels.
        width: W in pixels.
        factor: Height and width of a token in pixels.
        least: Image size of the model: a side, or (height, width), in pixels.

    Raises:
        ValueError: if a side is not an integer, smaller than that of ``least``, or not a multiple of ``factor`` (the
            message names the nearest sizes), or the canvas has more than 64 million pixels.
    """
    own_height, own_width = height_width(least)
    size = [("height", plain_number(height), own_height), ("width", plain_number(width), own_width)]
    for name, value, own in size:
        number = check_integer(name, value, f"[1, {MAX_PIXELS}]")
        if number < own:
            raise ValueError(f"{name} must be >= {own} pixels, the {name} of the model's images, got {number}")
        _check_whole_tokens(name, number, factor, least=own)
    height, width = int(height), int(width)
    if height * width > MAX_PIXELS:
        name = "height" if height > width else "width"
        raise ValueError(
            f"{name} must be smaller, because a canvas has at most {MAX_PIXELS} pixels, got {width} x {height}"
        )
    return height, width


def _check_whole_tokens(name: str, value: int, factor: int, *, least: int = 0) -> None:
    if value % factor:
        lower = value - value % factor
        fitting = " or ".join(str(number) for number in (lower, lower + factor) if number >= least)
        raise ValueError(
            f"{name} must be a multiple of {factor} pixels, the size of a token, got {value}; use {fitting}"
        )


def check_overlap(overlap: float) -> None:
    """Checks ``overlap``, a fraction of a window.

    Raises:
        ValueError: if it is not in (0, 1).
    """
    check_number("overlap", plain_number(overlap), "(0, 1)")


@dataclass(frozen=True)
class Window:
    """A part of a canvas of tokens with the size of the grid of the transformer.

    Args:
        top: First row on the canvas.
        left: First column on the canvas.
        unknown: (h, w) bool, True for the tokens to decode.
    """

    top: int
    left: int
    unknown: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """The number of rows and columns (h, w)."""
        return self.unknown.shape[0], self.unknown.shape[1]

    def as_grid(self, values: Tensor) -> Tensor:
        """Reshapes (B, h w) to (B, h, w)."""
        return rearrange(values, "b (h w) -> b h w", h=self.size[0])

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """The index of the window into a batch of canvases (B, R, C)."""
        height, width = self.size
        return slice(None), slice(self.top, self.top + height), slice(self.left, self.left + width)


def windows(unknown: Tensor, *, size: tuple[int, int], overlap: float) -> Iterator[Window]:
    """Yields the windows that fill a canvas, one after the other, until no token is unknown.

    1. Counts the unknown tokens in each possible window.
    2. Keeps the windows with enough known tokens as context: a fraction of ``overlap``, or as many as the window with
       the most known tokens has, if that is less.
    3. Yields the window with the most unknown tokens among them, the first one in raster order if several have as many.

    Args:
        unknown: (R, C) bool, True for the tokens to decode. R >= h and C >= w.
        size: (h, w) of a window.
        overlap: Fraction of a window in (0, 1).

    Yields:
        Windows. When all of them are decoded, nothing is unknown.
    """
    left = unknown.clone()
    while bool(left.any()):
        # 1. (R - h + 1, C - w + 1): number of unknown tokens of each window
        counts = left.float().unfold(0, size[0], 1).unfold(1, size[1], 1).sum((-1, -2))
        # 2. A window without unknown tokens is never chosen: -1 known tokens.
        known = (size[0] * size[1] - counts).masked_fill(counts == 0, -1)
        enough = min(math.ceil(overlap * size[0] * size[1]), int(known.max()))
        # 3. argmax returns the first maximum in raster order.
        place = int(counts.masked_fill(known < enough, -1).flatten().argmax())
        top, column = divmod(place, counts.shape[1])
        window = left[top : top + size[0], column : column + size[1]]
        yield Window(top, column, window.clone())
        window.fill_(value=False)  # a view of ``left``

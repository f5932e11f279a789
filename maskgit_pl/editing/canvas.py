"""Canvases larger than the model's images: what is added around an image, and the windows that fill it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from einops import rearrange

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Margins", "Window", "check_canvas", "check_overlap", "windows"]


@dataclass(frozen=True)
class Margins:
    """Pixels that are added around an image, on each side."""

    left: int
    right: int
    up: int
    down: int

    def check(self, size: Sequence[int], *, factor: int, least: int) -> None:
        """Refuses what cannot be added to an image.

        Args:
            size: Height and width (H, W) of the image.
            factor: Pixels along an edge of a token.
            least: Height and width that the result has at least: those of the model's images.

        Raises:
            ValueError: if a side is negative, all are 0, a size is not whole tokens, or the result is too small.
        """
        sides = asdict(self)
        for name, value in sides.items():
            if value < 0:
                raise ValueError(f"{name}: at least 0 pixels are needed, got {value}")
        if not any(sides.values()):
            raise ValueError("left, right, up, down: pixels to add on at least one side are needed, got none")
        for name, value in {**sides, "height of the image": size[0], "width of the image": size[1]}.items():
            _check_whole_tokens(name, value, factor)
        check_canvas(size[0] + self.up + self.down, size[1] + self.left + self.right, factor=factor, least=least)

    def outside(self, height: int, width: int) -> Tensor:
        """Returns (H + up + down, W + left + right) bool: False where the image (H, W) lies."""
        import torch

        mask = torch.ones(height + self.up + self.down, width + self.left + self.right, dtype=torch.bool)
        mask[self.up : self.up + height, self.left : self.left + width] = False
        return mask

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """The four numbers of pixels: (left, right, up, down)."""
        return self.left, self.right, self.up, self.down

    def at_most(self, pixels: int) -> Margins:
        """Returns the same sides, none wider than ``pixels``."""
        return Margins(*(min(side, pixels) for side in self.sides))

    def pad(self, image: Tensor, *, size: int, mode: Literal["constant", "replicate"] = "constant") -> Tensor:
        """Lays an image on its canvas.

        Args:
            image: (C, H, W), or (H, W) in mode ``constant``, of any type; of float type in mode ``replicate``.
            size: Pixels along an edge of its elements.
            mode: ``constant`` is 0 outside, ``replicate`` repeats the last elements.

        Returns:
            (..., H + up + down, W + left + right) elements.
        """
        import torch.nn.functional as F

        return F.pad(image, [side // size for side in self.sides], mode=mode)


def check_canvas(height: int, width: int, *, factor: int, least: int) -> None:
    """Refuses a picture that is no whole number of tokens, or smaller than the model's.

    Args:
        height: H in pixels.
        width: W in pixels.
        factor: Pixels along an edge of a token.
        least: Height and width of the model's images.

    Raises:
        ValueError: if it is. The message names the nearest sizes.
    """
    for name, value in (("height", height), ("width", width)):
        if value < least:
            raise ValueError(f"{name}: at least the {least} pixels of the model's images are needed, got {value}")
        if least % factor or value != least:
            _check_whole_tokens(name, value, factor)


def _check_whole_tokens(name: str, value: int, factor: int) -> None:
    if value % factor:
        lower = value - value % factor
        raise ValueError(
            f"{name}: a multiple of the {factor} pixels of a token is needed, got {value}; take {lower} or "
            f"{lower + factor}"
        )


def check_overlap(overlap: float) -> None:
    """Checks a share of a window.

    Raises:
        ValueError: if it is not in (0, 1).
    """
    if not 0 < overlap < 1:
        raise ValueError(f"overlap: a share in (0, 1) is needed, got {overlap}")


@dataclass(frozen=True)
class Window:
    """A part of a canvas of tokens, as large as what the transformer sees.

    Args:
        top: First row.
        left: First column.
        unknown: (h, w) bool: the tokens to decode in it.
    """

    top: int
    left: int
    unknown: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns (h, w)."""
        return self.unknown.shape[0], self.unknown.shape[1]

    def square(self, values: Tensor) -> Tensor:
        """Reshapes (B, h w) to (B, h, w)."""
        return rearrange(values, "b (h w) -> b h w", h=self.size[0])

    @property
    def index(self) -> tuple[slice, slice, slice]:
        """The index of the window in a batch of canvases (B, R, C)."""
        height, width = self.size
        return slice(None), slice(self.top, self.top + height), slice(self.left, self.left + width)


def windows(unknown: Tensor, *, size: tuple[int, int], overlap: float) -> Iterator[Window]:
    """Yields the windows that fill a canvas, one after the other.

    A window is chosen among those with enough known tokens: the one with the most unknown tokens, of several the first
    in raster order. Enough is ``overlap`` of a window, or the most that any window has.

    Args:
        unknown: (R, C) bool: the tokens to decode; at least one window in size.
        size: (h, w) of a window.
        overlap: In (0, 1).

    Yields:
        Windows; when all are decoded, nothing is unknown.
    """
    left = unknown.clone()
    while bool(left.any()):
        # (R - h + 1, C - w + 1): unknown tokens of each window
        counts = left.float().unfold(0, size[0], 1).unfold(1, size[1], 1).sum((-1, -2))
        known = (size[0] * size[1] - counts).masked_fill(counts == 0, -1)
        enough = min(math.ceil(overlap * size[0] * size[1]), int(known.max()))
        place = int(counts.masked_fill(known < enough, -1).flatten().argmax())
        top, column = divmod(place, counts.shape[1])
        window = left[top : top + size[0], column : column + size[1]]
        yield Window(top, column, window.clone())
        window.fill_(value=False)  # a view of ``left``

"""Regions of an edit: boxes and masks in pixels, the tokens that they cover, and the seam of the result.

Outpainting and panoramas fill a canvas that is larger than the images of the model; ``windows`` says in which order.
Used by ``pipeline.edit`` and the editing commands.

Source: paper, section on class-conditional image editing; google-research/maskgit, the editing functions of its demo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Literal, TypeAlias

from einops import rearrange, reduce, repeat

from maskgit_pl.checks import ImageSize, check_integer, check_number, height_width, plain_number
from maskgit_pl.data.image_bytes import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Box",
    "Margins",
    "Window",
    "box_mask",
    "check_blend",
    "check_canvas",
    "check_dilation",
    "check_overlap",
    "composite",
    "first_step",
    "parse_box",
    "pixel_region",
    "seam",
    "seam_radius",
    "token_mask",
    "windows",
]

Box: TypeAlias = Sequence[int]

_RANGE = "[0, 65536]"  # of dilation and blend: the sides of the largest image
_SIDES = f"[0, {MAX_PIXELS}]"  # a canvas has at most as many pixels as an image that can be read
_STEPS_SKIPPED = 6  # an edit skips one sixth of the steps: the released code skips 2 of 12
_EDGE = re.compile(r"(?P<number>-?[0-9]{1,9}(\.[0-9]{1,9})?)(?P<percent>%)?")  # one edge of a box


def parse_box(text: str, *, height: int, width: int) -> list[int]:
    """Parses a box: four edges separated by commas, each in whole pixels or in percent of the image.

    Percentages of left and top are rounded down to pixels, those of right and bottom up.

    Args:
        text: left,top,right,bottom such as ``0,0,14,28`` or ``10%,20%,60%,80%``.
        height: H of the image in pixels.
        width: W of the image in pixels.

    Raises:
        ValueError: if the text has another form. ``box_mask`` checks that the box lies within the image.
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


def _check_box(box: Box, *, height: int, width: int) -> None:
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


def box_mask(box: Box, *, height: int, width: int) -> Tensor:
    """Returns (H, W) bool, True inside a box. See ``_check_box`` for errors."""
    import torch

    _check_box(box, height=height, width=width)
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
        enough = min(ceil(overlap * size[0] * size[1]), int(known.max()))
        # 3. argmax returns the first maximum in raster order.
        place = int(counts.masked_fill(known < enough, -1).flatten().argmax())
        top, column = divmod(place, counts.shape[1])
        window = left[top : top + size[0], column : column + size[1]]
        yield Window(top, column, window.clone())
        window.fill_(value=False)  # a view of ``left``


def _check_whole_tokens(name: str, value: int, factor: int, *, least: int = 0) -> None:
    if value % factor:
        lower = value - value % factor
        fitting = " or ".join(str(number) for number in (lower, lower + factor) if number >= least)
        raise ValueError(
            f"{name} must be a multiple of {factor} pixels, the size of a token, got {value}; use {fitting}"
        )

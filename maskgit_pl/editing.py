"""Editing: which tokens of an image are found anew, and how the result is put back into the image.

A part of an image is edited by masking its tokens and decoding them again, for the same class or another one. This file
holds what that needs beside the decoder, as functions of masks and pixels; ``MaskGIT.inpaint`` puts them together.
PIL and torch are imported when a function needs them, so that the command line refuses a wrong box at once.

Source: paper, section on class-conditional image editing; google-research/maskgit, the editing functions of its demo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

from einops import rearrange, reduce, repeat

from maskgit_pl.text import printable

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor

__all__ = [
    "Box",
    "ImageLike",
    "Margins",
    "MaskLike",
    "Window",
    "box_mask",
    "check_box",
    "check_canvas",
    "check_fits",
    "check_overlap",
    "composite",
    "first_step",
    "fitted",
    "image_pixels",
    "mask_pixels",
    "pixel_region",
    "seam",
    "seam_radius",
    "token_mask",
    "windows",
]

Box: TypeAlias = Sequence[int]
ImageLike: TypeAlias = Union[str, Path, "Image.Image", "Tensor", "npt.NDArray[Any]"]
MaskLike: TypeAlias = ImageLike

_WHITE = 128  # from this grey value on, a pixel of a mask picture is to be generated
_STEPS_SKIPPED = 6  # one step in so many: 2 of the released 12


def check_box(box: Box, *, height: int, width: int) -> None:
    """Refuses a box that is not a part of an image.

    Args:
        box: (left, top, right, bottom) in pixels; right and bottom are the first ones outside.
        height: H of the image.
        width: W of the image.

    Raises:
        ValueError: Not four numbers, empty, reversed, or not within the image.
        TypeError: Not whole numbers.
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


def box_mask(box: Box, *, height: int, width: int) -> Tensor:
    """The pixels of a box: (H, W) bool; arguments and errors as of ``check_box``."""
    import torch

    check_box(box, height=height, width=width)
    left, top, right, bottom = box
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def token_mask(mask: Tensor, *, factor: int, dilation: int = 0) -> Tensor:
    """The tokens to be found anew: those of which any pixel is masked, and their neighbours.

    Args:
        mask: (H, W) bool, True = to be generated.
        factor: Pixels along an edge of a token.
        dilation: Tokens by which the region grows on each side, diagonals too, at least 0; it ends at the border.

    Returns:
        (h, w) bool with h = ceil(H / factor), w = ceil(W / factor).

    Raises:
        ValueError: ``dilation`` is negative.

    Source: released code: the box in tokens, and one more on each side. It rounds a box's position and size down, so
    that a box between tokens may lose its last pixels; here none is lost.
    """
    from torch.nn import functional

    if dilation < 0:
        raise ValueError(f"dilation: at least 0 tokens are needed, got {dilation}")
    bottom, right = -mask.shape[0] % factor, -mask.shape[1] % factor  # what the last tokens cover beyond the image
    whole = functional.pad(mask.float(), (0, right, 0, bottom))
    tokens = reduce(whole, "(h fh) (w fw) -> 1 h w", "max", fh=factor, fw=factor)
    if dilation > 0:
        tokens = functional.max_pool2d(tokens, 2 * dilation + 1, stride=1, padding=dilation)
    return tokens[0] > 0


def pixel_region(tokens: Tensor, *, factor: int, height: int, width: int) -> Tensor:
    """The pixels that tokens cover: (h, w) bool -> (H, W) bool; other arguments as of ``token_mask``."""
    return repeat(tokens, "h w -> (h fh) (w fw)", fh=factor, fw=factor)[:height, :width]


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
            size: (H, W) of the image.
            factor: Pixels along an edge of a token.
            least: Height and width that the result has at least: those of the model's images.

        Raises:
            ValueError: Negative, nothing at all, no whole tokens, or a result that is too small.
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
        """(H + up + down, W + left + right) bool: False where the image (H, W) lies."""
        import torch

        mask = torch.ones(height + self.up + self.down, width + self.left + self.right, dtype=torch.bool)
        mask[self.up : self.up + height, self.left : self.left + width] = False
        return mask

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """(left, right, up, down)."""
        return self.left, self.right, self.up, self.down

    def at_most(self, pixels: int) -> Margins:
        """The same sides, none wider than ``pixels``."""
        return Margins(*(min(side, pixels) for side in self.sides))

    def padded(self, image: Tensor, *, size: int, mode: Literal["constant", "replicate"] = "constant") -> Tensor:
        """Lays an image on its canvas.

        Args:
            image: (C, H, W), or (H, W) in mode ``constant``, of any type; of float type in mode ``replicate``.
            size: Pixels along an edge of its elements.
            mode: 0 outside, or the image's last elements again.

        Returns:
            (..., H + up + down, W + left + right) elements.
        """
        from torch.nn import functional

        return functional.pad(image, [side // size for side in self.sides], mode=mode)


def check_canvas(height: int, width: int, *, factor: int, least: int) -> None:
    """Refuses a picture that is no whole number of tokens, or smaller than the model's.

    Args:
        height: H in pixels.
        width: W in pixels.
        factor: Pixels along an edge of a token.
        least: Height and width of the model's images.

    Raises:
        ValueError: With the rule and the nearest sizes.
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
    """Refuses a share that is none.

    Raises:
        ValueError: Not in (0, 1).
    """
    if not 0 < overlap < 1:
        raise ValueError(f"overlap: a share in (0, 1) of a window is needed, got {overlap}")


@dataclass(frozen=True)
class Window:
    """A part of a canvas of tokens, as large as what the transformer sees.

    Args:
        top: First row.
        left: First column.
        unknown: (h, w) bool: what is to be decoded in it.
    """

    top: int
    left: int
    unknown: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.unknown.shape[0], self.unknown.shape[1]

    def square(self, values: Tensor) -> Tensor:
        """(B, h w) -> (B, h, w)."""
        return rearrange(values, "b (h w) -> b h w", h=self.size[0])

    @property
    def of_rows(self) -> tuple[slice, slice, slice]:
        """The index of the window in a batch of canvases (B, R, C)."""
        height, width = self.size
        return slice(None), slice(self.top, self.top + height), slice(self.left, self.left + width)


def windows(unknown: Tensor, *, size: tuple[int, int], overlap: float) -> Iterator[Window]:
    """The windows that fill a canvas, one after the other.

    Each is, of those that see enough that is known, one with most that is not; of several the first in raster order.
    Enough is ``overlap`` of a window, or the most that any window has.

    Args:
        unknown: (R, C) bool: what is to be decoded; at least one window in size.
        size: (h, w) of a window.
        overlap: In (0, 1).

    Yields:
        Windows; when all are decoded, nothing is unknown.
    """
    left = unknown.clone()
    while bool(left.any()):
        # (R - h + 1, C - w + 1): what each window has to do
        counts = left.float().unfold(0, size[0], 1).unfold(1, size[1], 1).sum((-1, -2))
        known = (size[0] * size[1] - counts).masked_fill(counts == 0, -1)
        enough = min(math.ceil(overlap * size[0] * size[1]), int(known.max()))
        place = int(counts.masked_fill(known < enough, -1).flatten().argmax())
        top, column = divmod(place, counts.shape[1])
        window = left[top : top + size[0], column : column + size[1]]
        yield Window(top, column, window.clone())
        window.fill_(False)  # a view of ``left``


def first_step(tokens: Tensor, *, num_steps: int) -> int:
    """The decoding step at which an edit begins: floor(T / 6), or 0 where nothing is known.

    The first steps of a generation decide few tokens, for lack of context; an edit has its context from the start.

    Args:
        tokens: Token mask, bool of any shape.
        num_steps: T.

    Source: released code: step 2 of 12.
    """
    return 0 if bool(tokens.all()) else num_steps // _STEPS_SKIPPED


def seam_radius(image_size: int) -> float:
    """The released blur of the seam in pixels, image_size / 16 - 1 and at least 0: about one token of the paper's."""
    return max(0.0, image_size / 16 - 1)


def seam(region: Tensor, *, radius: float) -> Tensor:
    """How much of the edited image each pixel shows: the region, blurred.

    Args:
        region: (H, W) bool.
        radius: Standard deviation of the blur in pixels, at least 0; the border's values go on beyond it.

    Returns:
        (H, W) float32 in [0, 1].

    Raises:
        ValueError: The radius is negative or not finite.
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
        edited: The same shape.
        weight: (H, W) float32 in [0, 1] of ``seam``: 0 leaves the original's value, bit by bit, and 1 takes the other.

    Returns:
        (C, H, W) uint8.

    Source: released code, which blurs the token mask, enlarged to the image.
    """
    mixed = original + weight * (edited.float() - original)
    return mixed.round().to(original.dtype)


def image_pixels(image: ImageLike, *, channels: int, name: str = "image") -> Tensor:
    """An image as the tokenizer sees it: upright, grey or RGB, alpha laid over white.

    Args:
        image: A JPEG, PNG or WebP file; a PIL picture; uint8 pixels as a tensor (C, H, W) or an array (H, W) or
            (H, W, C), C up to 4.
        channels: 1 for grey, 3 for RGB.
        name: What to call it in an error where it is no file.

    Returns:
        (channels, H, W) uint8.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an image, too large to be read, or not uint8 pixels of such a shape.
    """
    from PIL import Image

    from maskgit_pl.shards.images import decode_image, from_pil, read_image_file

    if isinstance(image, str | Path):
        shown = printable(image)
        if not Path(image).exists():
            raise FileNotFoundError(f"image {shown}: no such file; name a JPEG, PNG or WebP file")
        return decode_image(read_image_file(image, name=shown), channels=channels, name=shown)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(_pixels(image, name))
    return from_pil(picture, channels=channels, name=f"({name})")


def mask_pixels(mask: MaskLike, *, name: str = "mask") -> Tensor:
    """A mask as (H, W) bool, True = to be generated.

    Args:
        mask: A file or PIL picture, white where pixels are to be generated (from grey value 128 on); or a bool tensor
            or array (H, W).
        name: What to call it in an error where it is no file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an image, or an array that is not (H, W) bool.
    """
    import torch
    from PIL import Image

    if isinstance(mask, str | Path | Image.Image):
        return image_pixels(mask, channels=1, name=name)[0] >= _WHITE
    made = torch.as_tensor(mask).cpu()
    if made.dtype != torch.bool or made.ndim != 2:
        raise ValueError(
            f"{name}: (H, W) bool is needed, got {tuple(made.shape)} {made.dtype}; of grey values take mask >= {_WHITE}"
        )
    return made


def check_fits(height: int, width: int, *, image_size: int, fit: bool, name: str = "image") -> None:
    """Refuses an image of another size than the model's, unless it is to be fitted.

    Args:
        height: H of the image.
        width: W of the image.
        image_size: Height and width that are needed.
        fit: As of ``fitted``.
        name: What to call the image in an error.

    Raises:
        ValueError: if the sizes differ and ``fit`` is False.
    """
    if not fit and (height, width) != (image_size, image_size):
        raise ValueError(
            f"{name}: the model's {image_size} x {image_size} pixels are needed, got {width} x {height}; fit=True "
            "(--fit) cuts out the middle and resizes it"
        )


def fitted(image: Tensor, mask: Tensor, *, image_size: int, fit: bool, name: str = "image") -> tuple[Tensor, Tensor]:
    """An image and its mask at the size of the model.

    Args:
        image: (C, H, W) uint8.
        mask: (H, W) bool.
        image_size: Height and width that are needed.
        fit: Whether to cut the largest square out of the middle of both and to resize it.
        name: What to call the image in an error.

    Returns:
        (C, image_size, image_size) uint8 and (image_size, image_size) bool; a pixel of the mask is True where any of
        those that it stands for is.

    Raises:
        ValueError: The two sizes differ, another size without ``fit``, or a mask that is False everywhere.
    """
    from torch.nn import functional

    from maskgit_pl.shards.images import fit_square

    height, width = image.shape[-2:]
    if mask.shape != image.shape[-2:]:
        raise ValueError(
            f"mask of {name}: the image's {width} x {height} pixels are needed, got {mask.shape[1]} x {mask.shape[0]}"
        )
    check_fits(height, width, image_size=image_size, fit=fit, name=name)
    if not bool(mask.any()):
        raise ValueError(f"mask of {name}: something to generate is needed, got none; paint it white, or name a box")
    square = fit_square(mask[None].to(image.dtype), image_size=min(height, width), crop=None)
    cut = functional.adaptive_max_pool2d(square.float(), image_size)[0] > 0
    if not bool(cut.any()):
        raise ValueError(f"mask of {name}: all of it lies outside the square in the middle; crop the image yourself")
    return fit_square(image, image_size=image_size, crop=None), cut


def _pixels(image: Tensor | npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Tensor (C, H, W) or array (H, W) or (H, W, C) -> array (H, W) or (H, W, C > 1), checked."""
    import numpy as np
    from torch import Tensor

    shown = f"{tuple(image.shape)} {image.dtype}"
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
        image = rearrange(image, "c h w -> h w c") if image.ndim == 3 else image
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(
            f"{name}: uint8 pixels are needed, a tensor (C, H, W) or an array (H, W, C) with C = 1, 3 or 4, got {shown}"
        )
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

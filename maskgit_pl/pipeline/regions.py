"""Images and masks of an edit: read from files, pictures and arrays, cut to the model, and turned into regions.

A region is a box or a mask in pixels, and then the tokens that it covers. ``windows`` gives the order in which a canvas
larger than the images of the model is filled. Used by ``pipeline.tasks``, the editing commands and the page.

Source: paper, section on class-conditional image editing; google-research/maskgit, the editing functions of its demo.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from maskgit_pl.checks import ImageSize, check_integer, height_width, pixels_text
from maskgit_pl.data.image_bytes import MAX_PIXELS, read_image_file
from maskgit_pl.text import printable, shorten

if TYPE_CHECKING:
    from PIL import Image

Box: TypeAlias = tuple[int, ...]
ImageLike: TypeAlias = Union[str, Path, "Image.Image", Tensor, npt.NDArray[Any]]
MaskLike: TypeAlias = ImageLike

_WHITE = 128  # pixels of a mask picture with at least this grey value are generated
_STEPS_SKIPPED = 6  # an edit skips one sixth of the steps: the released code skips 2 of 12


def image_pixels(image: ImageLike, *, channels: int, name: str = "image", background: str = "white") -> Tensor:
    """Reads an image for the tokenizer: rotated upright, with the channels of the model.

    Args:
        image: JPEG, PNG or WebP file, PIL image, or uint8 pixels as a tensor (C, H, W) or an array (H, W) or
            (H, W, C) with C = 1 to 4.
        channels: 1 for grey, 3 for RGB.
        name: Word for the image in an error, if it is not a file.
        background: Colour below transparent pixels.

    Returns:
        (channels, H, W) uint8.
    """
    from PIL import Image  # with the first image only

    from maskgit_pl.data.images import decode_image, from_pil

    if isinstance(image, str | Path):
        printed_name = printable(image)
        data = read_image_file(image, name=printed_name)
        return decode_image(data, channels=channels, name=printed_name, background=background)
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
        mask: File or PIL image, white (grey value >= 128) where pixels are generated, or a bool tensor or
            array (H, W). Transparent pixels are composited over black, so that they stay as they are.
        name: Word for the mask in an error, if it is not a file.

    Returns:
        (H, W) bool, True where pixels are generated.
    """
    if isinstance(mask, np.ndarray) and not mask.dtype.hasobject:
        mask = torch.from_numpy(mask)
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(
                f"{name} must be (H, W) bool, got {tuple(mask.shape)} {mask.dtype}; for grey values use mask >= "
                f"{_WHITE}"
            )
        return mask.cpu()
    # Over black: nothing is painted where the picture is transparent.
    return image_pixels(mask, channels=1, name=name, background="black")[0] >= _WHITE


def fit_to_model(
    image: Tensor, mask: Tensor | None, *, image_size: ImageSize, fit: bool, name: str = "image"
) -> tuple[Tensor, Tensor]:
    """Crops and resizes an image and its mask to the size of the model.

    Args:
        image: (C, h, w) uint8.
        mask: (h, w) bool; None for the whole image.
        image_size: Image size of the model: H = W, or (H, W), in pixels.
        fit: True crops both to the central part with the model's shape and resizes it; False accepts images
            of the model's size only.
        name: Word for the image in an error.

    Returns:
        (C, H, W) uint8 and (H, W) bool. A pixel of the new mask is True if any pixel of the old mask that it covers is.
    """
    from maskgit_pl.data.images import crop_to_shape, fit_image  # which import Pillow

    height, width = image.shape[-2:]
    mask = torch.ones(height, width, dtype=torch.bool) if mask is None else mask
    if mask.shape != image.shape[-2:]:
        raise ValueError(
            f"mask of {name} must have {width} x {height} pixels like the image, got {mask.shape[1]} x {mask.shape[0]}"
        )
    if not fit and (height, width) != height_width(image_size):
        raise ValueError(
            f"{name} must have the {pixels_text(image_size)} pixels of the model, got {width} x {height}; fit=True "
            "(--fit) crops and resizes it"
        )
    part = crop_to_shape(mask[None], image_size=image_size)
    # Max pooling keeps a masked pixel when the mask becomes smaller; resizing could lose it.
    cut = F.adaptive_max_pool2d(part.float(), height_width(image_size))[0] > 0
    if not bool(cut.any()):
        raise ValueError(
            f"mask of {name} must not be empty in the central part that is cut out; paint the region to generate white"
        )
    return fit_image(image, image_size=image_size, crop=None), cut


def box_mask(box: Box, *, height: int, width: int) -> Tensor:
    """Returns (H, W) bool, True inside a box.

    Args:
        box: (left, top, right, bottom) in pixels; right and bottom are exclusive.
        height: H of the image in pixels.
        width: W of the image in pixels.
    """
    left, top, right, bottom = box if len(box) == 4 else (0, 0, 0, 0)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"box must be left,top,right,bottom in the image, with 0 <= left < right <= {width} and 0 <= top < bottom "
            f"<= {height}, got {shorten(','.join(map(str, box)))}"
        )
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

    Source: released code, which takes the tokens of the box and one more on each side. It rounds position and
    size of the box down, so that a box between tokens may lose its last pixels; here no pixel is lost.
    """
    # Pixels that the last tokens cover beyond the image.
    bottom, right = -mask.shape[0] % factor, -mask.shape[1] % factor
    # Pads with "not masked" to whole tokens, then takes the maximum over the pixels of each token.
    whole = F.pad(mask.float(), (0, right, 0, bottom))
    tokens = reduce(whole, "(h fh) (w fw) -> 1 h w", "max", fh=factor, fw=factor)
    # Max pooling of a bool mask is a dilation.
    return F.max_pool2d(tokens, 2 * dilation + 1, stride=1, padding=dilation)[0] > 0


def pixel_region(tokens: Tensor, *, factor: int, height: int, width: int) -> Tensor:
    """Returns the pixels that tokens cover: (h, w) bool -> (H, W) bool. See ``token_mask`` for ``factor``."""
    return repeat(tokens, "h w -> (h fh) (w fw)", fh=factor, fw=factor)[:height, :width]


def first_step(tokens: Tensor, *, num_steps: int) -> int:
    """Returns the first decoding step of an edit: floor(T / 6), or 0 if all tokens are masked.

    The first steps of a generation decide few tokens, because they have little context. An edit has context
    from the start.

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
        radius: Standard deviation of the Gaussian blur in pixels, at least 0. Beyond the image, the values at
            its border are repeated.

    Returns:
        (H, W) float32 in [0, 1].
    """
    if radius == 0:
        return region.float()
    from PIL import Image, ImageFilter

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
    """

    left: int
    right: int
    up: int
    down: int

    def check(self, size: Sequence[int], *, factor: int, least: ImageSize) -> None:
        """Checks that the pixels can be added to an image.

        Args:
            size: (H, W) of the image in pixels.
            factor: Height and width of a token in pixels.
            least: Smallest size of the result: the image size of the model.
        """
        if not any(self.sides):
            raise ValueError("one of left, right, up and down must be > 0 pixels, got none")
        for name, value in {**asdict(self), "height of the image": size[0], "width of the image": size[1]}.items():
            check_integer(name, value, "[0, inf)")
            _check_whole_tokens(name, value, factor)
        check_canvas(size[0] + self.up + self.down, size[1] + self.left + self.right, factor=factor, least=least)

    def outside(self, height: int, width: int) -> Tensor:
        """Returns (H + up + down, W + left + right) bool, False inside the image (H, W)."""
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
        return F.pad(image, [side // size for side in self.sides], mode=mode)


def check_canvas(height: int, width: int, *, factor: int, least: ImageSize) -> None:
    """Checks the size of a canvas.

    Args:
        height: H in pixels.
        width: W in pixels.
        factor: Height and width of a token in pixels.
        least: Image size of the model: a side, or (height, width), in pixels.
    """
    for name, side, least_side in zip(("height", "width"), (height, width), height_width(least), strict=True):
        check_integer(name, side, f"[{least_side}, {MAX_PIXELS}]")
        _check_whole_tokens(name, side, factor, least=least_side)
    if height * width > MAX_PIXELS:
        name = "height" if height > width else "width"
        raise ValueError(
            f"{name} must be smaller, because a canvas has at most {MAX_PIXELS} pixels, got {width} x {height}"
        )


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


def windows(unknown: Tensor, *, size: tuple[int, int]) -> Iterator[Window]:
    """Yields the windows that fill a canvas, one after the other, until no token is unknown.

    1. Counts the unknown tokens in each possible window.
    2. Keeps the windows with enough known tokens as context: half of all, or as many as the window with the most
       known tokens has, if that is less.
    3. Yields the window with the most unknown tokens among them, the first one in raster order if several have as many.

    Args:
        unknown: (R, C) bool, True for the tokens to decode. R >= h and C >= w.
        size: (h, w) of a window.

    Yields:
        Windows. When all of them are decoded, nothing is unknown.
    """
    left = unknown.clone()
    while bool(left.any()):
        # 1. (R - h + 1, C - w + 1): number of unknown tokens of each window
        counts = left.float().unfold(0, size[0], 1).unfold(1, size[1], 1).sum((-1, -2))
        # 2. A window without unknown tokens is never chosen: -1 known tokens.
        num_known = (size[0] * size[1] - counts).masked_fill(counts == 0, -1)
        enough = min(ceil(size[0] * size[1] / 2), int(num_known.max()))
        # 3. argmax returns the first maximum in raster order.
        index = int(counts.masked_fill(num_known < enough, -1).flatten().argmax())
        top, column = divmod(index, counts.shape[1])
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


def _pixels(image: Tensor | npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Checks a tensor (C, H, W) or array (H, W) or (H, W, C), and converts it to an array (H, W) or (H, W, C > 1)."""
    description = f"{tuple(image.shape)} {image.dtype}"
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
        # torch has channels first, numpy and PIL have them last.
        image = rearrange(image, "c h w -> h w c") if image.ndim == 3 else image
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] not in (1, 2, 3, 4) or pixels.size == 0:
        raise ValueError(
            f"{name} must be uint8, a tensor (C, H, W) or an array (H, W, C) with C = 1 to 4, got {description}"
        )
    return np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

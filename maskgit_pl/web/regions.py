"""Uploaded images and brush strokes: checked, and turned into pixels and masks of the model's size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.checks import height_width
from maskgit_pl.data.images import decode_image, fit_image, parse_image_header, read_image_file
from maskgit_pl.files import size_text
from maskgit_pl.pipeline.grids import draw_mask, enlarge, scale_to, to_pil
from maskgit_pl.pipeline.regions import box_mask, parse_box, pixel_region, token_mask

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit_pl.pipeline.options import Outline

__all__ = ["MAX_UPLOAD_BYTES", "MAX_UPLOAD_PIXELS", "EditRegion", "canvas_picture", "read_brush", "read_upload"]

MAX_UPLOAD_BYTES = 16 * 2**20
MAX_UPLOAD_PIXELS = 24 * 10**6
_CANVAS = 448  # pixels of the longer edge of the canvas that the brush paints on
_PAINTED = 128  # alpha of a stroke from which a pixel counts as painted


def read_upload(path: Path, outline: Outline) -> Tensor:
    """Reads an uploaded image, crops its centre and resizes it to the size of the model.

    Args:
        path: Uploaded file. Its bytes and its pixels are limited before it is decoded.
        outline: Sizes of the model.

    Returns:
        (C, H, W) uint8.

    Raises:
        ValueError: if it is too large, or not a JPEG, PNG or WebP that can be read.
    """
    size = path.stat().st_size
    if size > MAX_UPLOAD_BYTES:
        raise ValueError(f"image {path.name} must have at most {size_text(MAX_UPLOAD_BYTES)}, got {size_text(size)}")
    data = read_image_file(path, name=path.name)
    header = parse_image_header(data, name=path.name)
    if header.width * header.height > MAX_UPLOAD_PIXELS:
        raise ValueError(
            f"image {path.name} must have at most {MAX_UPLOAD_PIXELS} pixels, got {header.width} x {header.height}; "
            "make it smaller"
        )
    pixels = decode_image(data, channels=outline.channels, name=path.name)
    return fit_image(pixels, image_size=outline.image_size, crop=None)


def canvas_picture(pixels: Tensor) -> Image.Image:
    """Returns an image (C, H, W) uint8, enlarged to the canvas of the brush without smoothing."""
    return enlarge(pixels, scale_to(pixels, _CANVAS))


def read_brush(layers: Sequence[Image.Image], *, height: int, width: int) -> Tensor:
    """Returns the pixels of an image that a brush has painted, (H, W) bool.

    A pixel of the image is masked if any pixel of the canvas that it covers is painted.

    Args:
        layers: Layers of the canvas, RGBA of any size, transparent where nothing is painted.
        height: H of the image.
        width: W of the image.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    mask = torch.zeros(height, width, dtype=torch.bool)
    for layer in layers:
        painted = torch.from_numpy(np.array(layer.convert("RGBA"))[..., 3]) >= _PAINTED
        mask |= F.adaptive_max_pool2d(painted[None].float(), (height, width))[0] > 0
    return mask


class EditRegion:
    """The part of an image that an edit generates again.

    Args:
        pixels: The image, (C, H, W) uint8 of the model's size.
        layers: Layers of the brush; see ``read_brush``.
        box: left,top,right,bottom in pixels or in percent, in place of the brush; empty for the brush.
        dilation: Number of tokens by which the region grows on each side, at least 0.
        outline: Sizes of the model.

    Attributes:
        mask: (H, W) bool, the painted pixels or those in the box.
        tokens: (h, w) bool, the tokens that are generated again.

    Raises:
        ValueError: if the box is wrong, or nothing is painted.
    """

    def __init__(
        self, pixels: Tensor, layers: Sequence[Image.Image], *, box: str, dilation: int, outline: Outline
    ) -> None:
        height, width = height_width(outline.image_size)
        if box.strip():
            self.mask = box_mask(parse_box(box, height=height, width=width), height=height, width=width)
        else:
            self.mask = read_brush(layers, height=height, width=width)
        if not bool(self.mask.any()):
            raise ValueError("mask must not be empty; paint the region to generate, or give a box")
        self.tokens = token_mask(self.mask, factor=outline.token_size, dilation=dilation)
        self._pixels, self._factor = pixels, outline.token_size

    def picture(self) -> Image.Image:
        """Returns the image with the tokens that are generated again in grey, and the mask in a green outline."""
        height, width = self.mask.shape
        region = pixel_region(self.tokens, factor=self._factor, height=height, width=width)
        return draw_mask(self._pixels, mask=self.mask, region=region, scale=scale_to(self._pixels, _CANVAS))

    def describe(self) -> str:
        """Returns the numbers of painted pixels and of tokens that are generated again."""
        painted, pixels = int(self.mask.sum()), self.mask.numel()
        tokens, every = int(self.tokens.sum()), self.tokens.numel()
        return f"{painted} of {pixels} pixels became {tokens} of {every} tokens, which are generated again"

    def mask_picture(self) -> Image.Image:
        """Returns the mask as a grey picture, white where pixels are generated."""
        return to_pil(self.mask[None].byte() * 255)

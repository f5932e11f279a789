"""Lays out tiles, captions and titles on a page. All pictures of this folder use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskgit_pl.image_format import composite_over_white
from maskgit_pl.imaging.pixels import to_pil
from maskgit_pl.text import printable

__all__ = [
    "MASKED",
    "NEW",
    "PANEL_SIZE",
    "PAPER",
    "REMASKED",
    "TILE_SIZE",
    "add_title",
    "enlarge",
    "lay_out",
    "scale_to",
]

TILE_SIZE = 84  # smallest edge of an image in pixels: images of 28 px are enlarged three times
PANEL_SIZE = 168  # the same for pictures of decoding, in which single tokens must be visible
# RGB. MASKED fills masked tokens; NEW and REMASKED frame tokens just kept and just masked again.
PAPER, INK, MASKED, NEW, REMASKED = (255, 255, 255), (40, 40, 40), (176, 176, 176), (230, 90, 20), (40, 110, 220)
_GAP, _MARGIN, _FONT_SIZE = 4, 8, 14  # pixels


def scale_to(images: Tensor, wanted: int) -> int:
    """Returns the smallest integer factor that enlarges the longer edge to at least ``wanted`` pixels."""
    return max(1, math.ceil(wanted / max(images.shape[-2:])))


def enlarge(image: Tensor, scale: int) -> Image.Image:
    """Returns an image (C, H, W) uint8, over white, as an RGB picture, enlarged ``scale`` times without smoothing."""
    picture = to_pil(composite_over_white(image)).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def lay_out(
    tiles: Sequence[Image.Image],
    *,
    rows: int,
    columns: int,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> Image.Image:
    """Lays out tiles of the same size in raster order, with captions on the left and above."""
    font = ImageFont.load_default(_FONT_SIZE)
    row_captions, column_captions = (list(map(printable, texts)) for texts in (row_captions, column_captions))
    width, height = tiles[0].size
    # The longest caption sets the left margin.
    left = _MARGIN + math.ceil(max((font.getlength(text) + _MARGIN for text in row_captions), default=0))
    top = _MARGIN + (_FONT_SIZE + _MARGIN if column_captions else 0)
    size = left + columns * (width + _GAP) - _GAP + _MARGIN, top + rows * (height + _GAP) - _GAP + _MARGIN
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for number, tile in enumerate(tiles):
        page.paste(tile, (left + number % columns * (width + _GAP), top + number // columns * (height + _GAP)))
    # Anchors of Pillow: "rm" is right and vertically centred, "mm" centred in both directions.
    for row, text in enumerate(row_captions):
        middle = top + row * (height + _GAP) + height // 2
        draw.text((left - _MARGIN, middle), text, INK, font, anchor="rm")
    for column, text in enumerate(column_captions):
        middle = left + column * (width + _GAP) + width // 2
        draw.text((middle, _MARGIN + _FONT_SIZE // 2), _shorten(text, width, font), INK, font, anchor="mm")
    return page


def add_title(picture: Image.Image, title: str) -> Image.Image:
    """Returns a picture with a line of text above it. The picture is widened for a wider text."""
    font, title = ImageFont.load_default(_FONT_SIZE), printable(title)
    height = _FONT_SIZE + _MARGIN
    width = max(picture.width, math.ceil(font.getlength(title)) + 2 * _MARGIN)
    page = Image.new("RGB", (width, picture.height + height), PAPER)
    page.paste(picture, (0, height))
    ImageDraw.Draw(page).text((_MARGIN, _MARGIN + _FONT_SIZE // 2), title, INK, font, anchor="lm")
    return page


def _shorten(text: str, width: int, font: Any) -> str:
    """Returns a text, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

"""Lays out tiles, captions, head lines and legends on a page. All pictures of this folder use it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskgit_pl.pipeline.imaging_pixels import to_pil
from maskgit_pl.text import printable

__all__ = [
    "MASKED",
    "NEW",
    "PANEL_SIZE",
    "PAPER",
    "REMASKED",
    "REQUESTED",
    "TILE_SIZE",
    "add_legend",
    "add_title",
    "draw_color_bar",
    "draw_outline",
    "enlarge",
    "lay_out",
    "panel_scale",
    "scale_to",
    "swatch",
    "viridis",
]

TILE_SIZE = 84  # smallest edge of an image in pixels: images of 28 px are enlarged three times
PANEL_SIZE = 168  # the same for pictures of decoding, in which single tokens must be visible
# RGB. MASKED fills masked tokens; NEW and REMASKED frame tokens just kept and just masked again; REQUESTED outlines the
# pixels that the user of an edit named.
PAPER, INK, MASKED, NEW, REMASKED = (255, 255, 255), (40, 40, 40), (176, 176, 176), (230, 90, 20), (40, 110, 220)
REQUESTED = (0, 158, 115)
_GAP, _MARGIN, _FONT_SIZE = 4, 8, 14  # pixels
_NARROWEST = 420  # pixels: a head line or a legend widens a narrower picture to it
_BAR = (160, 12)  # width and height of a color bar in pixels
_LINE = 2  # pixels of an outline


def scale_to(images: Tensor, wanted: int) -> int:
    """Returns the smallest integer factor that enlarges the longer edge to at least ``wanted`` pixels."""
    return max(1, math.ceil(wanted / max(images.shape[-2:])))


def panel_scale(images: Tensor, wanted: int) -> int:
    """Returns ``scale_to``, but a factor that enlarges the shorter edge of a wide image to at least half of it."""
    return max(scale_to(images, wanted), math.ceil(wanted / 2 / min(images.shape[-2:])))


def enlarge(image: Tensor, scale: int) -> Image.Image:
    """Returns an image (C, H, W) uint8 as an RGB picture, enlarged ``scale`` times without smoothing."""
    picture = to_pil(image).convert("RGB")
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
    """Returns a picture with a head line above it. A long one is wrapped; a narrow picture is widened to 420 pixels."""
    font = ImageFont.load_default(_FONT_SIZE)
    width, line = max(picture.width, _NARROWEST), _FONT_SIZE + _MARGIN
    lines = list(_wrap(printable(title, limit=None), width - 2 * _MARGIN, font))
    page = Image.new("RGB", (width, picture.height + len(lines) * line), PAPER)
    page.paste(picture, (0, len(lines) * line))
    for number, text in enumerate(lines):
        middle = _MARGIN + _FONT_SIZE // 2 + number * line
        ImageDraw.Draw(page).text((_MARGIN, middle), text, INK, font, anchor="lm")
    return page


def add_legend(picture: Image.Image, entries: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Returns a picture with a legend below it, which wraps where the picture is narrow.

    Args:
        picture: The picture. A narrow one is widened to 420 pixels.
        entries: A small picture, from ``swatch`` or ``draw_color_bar``, and its meaning, each.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    width, line = max(picture.width, _NARROWEST), max(sample.height for sample, _ in entries) + _MARGIN
    places, left, top = [], _MARGIN, picture.height
    for sample, text in entries:
        needed = sample.width + _MARGIN + math.ceil(font.getlength(text)) + 2 * _MARGIN
        if left > _MARGIN and left + needed > width:
            left, top = _MARGIN, top + line
        places.append((left, top))
        left += needed
    page = Image.new("RGB", (width, top + line), PAPER)
    page.paste(picture, (0, 0))
    for (left, top), (sample, text) in zip(places, entries, strict=True):
        page.paste(sample, (left, top + (line - _MARGIN - sample.height) // 2))
        middle = top + (line - _MARGIN) // 2
        ImageDraw.Draw(page).text((left + sample.width + _MARGIN, middle), text, INK, font, anchor="lm")
    return page


def swatch(*, fill: tuple[int, int, int] = PAPER, frame: tuple[int, int, int] | None = None) -> Image.Image:
    """Returns a small square for a legend, filled with a color or framed in it."""
    square = Image.new("RGB", (_FONT_SIZE, _FONT_SIZE), fill)
    if frame is not None:
        ImageDraw.Draw(square).rectangle((0, 0, _FONT_SIZE - 1, _FONT_SIZE - 1), outline=frame, width=_LINE)
    return square


def draw_color_bar(top: float) -> Image.Image:
    """Returns the color bar of viridis for a legend, with the numbers 0, ``top`` / 2 and ``top`` below it."""
    (width, height), font = _BAR, ImageFont.load_default(_FONT_SIZE - 2)
    bar = Image.new("RGB", (width, height + _FONT_SIZE), PAPER)
    draw = ImageDraw.Draw(bar)
    for x, color in enumerate(viridis([x / (width - 1) for x in range(width)])):
        draw.line((x, 0, x, height - 1), fill=color)
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((share * (width - 1), height), f"{share * top:.2f}", INK, font, anchor=anchor)
    return bar


def viridis(values: Sequence[float]) -> list[tuple[int, int, int]]:
    """Returns the RGB color of each value in [0, 1], from dark to bright."""
    from matplotlib import colormaps

    colors = (colormaps["viridis"](list(values))[:, :3] * 255).round().astype(int)
    return [(int(red), int(green), int(blue)) for red, green, blue in colors]


def draw_outline(picture: Image.Image, mask: Tensor, color: tuple[int, int, int]) -> Image.Image:
    """Returns a picture with a line along the inner edge of a mask.

    Args:
        picture: RGB picture, an integer factor larger than the mask.
        mask: (H, W) bool.
        color: RGB color of the line.
    """
    scale = picture.width // mask.shape[1]
    inside = mask.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    # A max pooling of the outside, also beyond the picture, reaches the pixels within the width of the line.
    outside = F.pad(inside.logical_not()[None].float(), (_LINE,) * 4, value=1.0)
    line = inside.cpu() & (F.max_pool2d(outside, 2 * _LINE + 1, stride=1)[0] > 0).cpu()
    outlined = picture.copy()
    outlined.paste(color, mask=to_pil(line[None].byte() * 255))
    return outlined


def _wrap(text: str, width: int, font: Any) -> Iterator[str]:
    """Yields the lines of a text: as many words in each as ``width`` pixels hold, and at least one."""
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    yield _shorten(line, width, font)


def _shorten(text: str, width: int, font: Any) -> str:
    """Returns a text, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

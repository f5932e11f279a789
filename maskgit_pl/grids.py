"""Draws pages of images with captions, head lines and legends, and writes PNG and GIF files.

ASCII texts are drawn in Pillow's own font, and others in DejaVu Sans of matplotlib, which has accents, Greek and
Cyrillic, among others; or, such as Chinese, Japanese and Korean, in a font of the system that has all letters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskgit_pl.files import write_atomically
from maskgit_pl.text import printable

TILE_SIZE = 84  # smallest edge of an image in pixels: images of 28 px are enlarged three times
_PANEL_SIZE = 168  # the same for pictures of decoding, in which single tokens must be visible
# RGB. MASKED fills masked tokens; NEW and REMASKED frame tokens just kept and just masked again; REQUESTED
# outlines the pixels that the user of an edit named.
PAPER, _INK, MASKED, NEW, REMASKED = (255, 255, 255), (40, 40, 40), (176, 176, 176), (230, 90, 20), (40, 110, 220)
REQUESTED = (0, 158, 115)
_GAP, _MARGIN, _FONT_SIZE = 4, 8, 14  # pixels
_NARROWEST = 420  # pixels: a head line or a legend widens a narrower picture to it
_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont  # the latter in a Pillow without FreeType
_BAR = (160, 12)  # width and height of a color bar in pixels
_LINE = 2  # pixels of an outline
_LAST_FRAME = 2400  # milliseconds


def class_captions(names: Sequence[str], labels: Sequence[int | None]) -> list[str]:
    """Returns the name of each class, or its number where no font has the letters; "no class" for None or past all."""
    captions = ["no class" if label is None or label >= len(names) else names[label] for label in labels]
    if (text := "".join(captions)).isascii() or _font_file(frozenset(text)):
        return captions
    drawn = [_font_file(frozenset(name)) == next(_font_files()) for name in captions]
    return [name if known else f"class {label}" for name, known, label in zip(captions, drawn, labels, strict=True)]


def to_pil(image: Tensor) -> Image.Image:
    """Converts (C, H, W) uint8 with C = 1 or 3 to an image of the mode L or RGB."""
    pixels = rearrange(image.cpu().numpy(), "c h w -> h w c")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def scale_to(images: Tensor, length: int) -> int:
    """Returns the smallest integer factor that enlarges the longer edge to at least ``length`` pixels."""
    return max(1, math.ceil(length / max(images.shape[-2:])))


def panel_scale(images: Tensor) -> int:
    """Returns the factor of a picture of decoding: its edges have at least 168 and 84 pixels."""
    return max(scale_to(images, _PANEL_SIZE), math.ceil(_PANEL_SIZE / 2 / min(images.shape[-2:])))


def enlarge(image: Tensor, scale: int) -> Image.Image:
    """Returns an image (C, H, W) uint8 as an RGB picture, enlarged ``scale`` times without smoothing."""
    picture = to_pil(image).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def lay_out(
    tiles: Sequence[Image.Image],
    *,
    columns: int,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> Image.Image:
    """Lays out tiles of one size in raster order, with captions on the left and above; the last row may be short."""
    row_captions, column_captions = (list(map(printable, texts)) for texts in (row_captions, column_captions))
    font = _font([*row_captions, *column_captions])
    (width, height), rows = tiles[0].size, math.ceil(len(tiles) / columns)
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
        draw.text((left - _MARGIN, middle), text, _INK, font, anchor="rm")
    for column, text in enumerate(column_captions):
        middle = left + column * (width + _GAP) + width // 2
        draw.text((middle, _MARGIN + _FONT_SIZE // 2), _shorten(text, width, font), _INK, font, anchor="mm")
    return page


def add_title(picture: Image.Image, title: str) -> Image.Image:
    """Returns a picture with a head line above it. A long one is wrapped; a narrow picture is widened to 420 pixels."""
    font, width, line = _font([title]), max(picture.width, _NARROWEST), _FONT_SIZE + _MARGIN
    lines = list(_wrap(printable(title, limit=None), width - 2 * _MARGIN, font))
    page = Image.new("RGB", (width, picture.height + len(lines) * line), PAPER)
    page.paste(picture, (0, len(lines) * line))
    for number, text in enumerate(lines):
        middle = _MARGIN + _FONT_SIZE // 2 + number * line
        ImageDraw.Draw(page).text((_MARGIN, middle), text, _INK, font, anchor="lm")
    return page


def add_legend(picture: Image.Image, entries: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Returns a picture with a legend below it, which wraps where the picture is narrow.

    Args:
        picture: The picture. A narrow one is widened to 420 pixels.
        entries: A small picture, from ``swatch`` or ``draw_color_bar``, and its meaning, each.
    """
    font = _font(text for _, text in entries)
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
        ImageDraw.Draw(page).text((left + sample.width + _MARGIN, middle), text, _INK, font, anchor="lm")
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
        draw.text((share * (width - 1), height), f"{share * top:.2f}", _INK, font, anchor=anchor)
    return bar


def viridis(values: Sequence[float]) -> list[tuple[int, int, int]]:
    """Returns the RGB color of each value in [0, 1], from dark to bright."""
    from matplotlib import colormaps

    colors = (colormaps["viridis"](list(values))[:, :3] * 255).round().astype(int)
    return [(int(red), int(green), int(blue)) for red, green, blue in colors]


def draw_outline(picture: Image.Image, mask: Tensor) -> Image.Image:
    """Returns a picture with a green line along the inner edge of a mask: the pixels that the user of an edit named.

    Args:
        picture: RGB picture, an integer factor larger than the mask.
        mask: (H, W) bool.
    """
    scale = picture.width // mask.shape[1]
    inside = mask.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    # A max pooling of the outside, also beyond the picture, reaches the pixels within the width of the line.
    outside = F.pad(inside.logical_not()[None].float(), (_LINE,) * 4, value=1.0)
    line = inside.cpu() & (F.max_pool2d(outside, 2 * _LINE + 1, stride=1)[0] > 0).cpu()
    outlined = picture.copy()
    outlined.paste(REQUESTED, mask=to_pil(line[None].byte() * 255))
    return outlined


def image_grid(
    images: Tensor,
    *,
    columns: int,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Lays images out in rows, enlarged without smoothing so that their pixels are visible.

    Args:
        images: (n, C, H, W) uint8 with C = 1 or 3 and n >= 1. The last row may be short.
        columns: Number of images per row, at least 1.
        row_captions: Text left of each row; empty for none.
        column_captions: Text above each column; empty for none.
        scale: Factor of the enlargement, at least 1; None enlarges small images to about 84 px.
    """
    scale = scale_to(images, TILE_SIZE) if scale is None else scale
    tiles = [enlarge(image, scale) for image in images]
    return lay_out(tiles, columns=columns, row_captions=row_captions, column_captions=column_captions)


def reconstruction_grid(originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """Lays out rows of at most 8 originals, each above the row of their reconstructions.

    Args:
        originals: (n, C, H, W) uint8.
        reconstructions: (n, C, H, W) uint8.
    """
    columns = min(8, len(originals))
    starts = range(0, len(originals) // columns * columns, columns)  # an incomplete last row is left out
    # Rows alternate: originals, then their reconstructions.
    rows = [part[start : start + columns] for start in starts for part in (originals, reconstructions)]
    return image_grid(torch.cat(rows), columns=columns, row_captions=["original", "reconstruction"] * len(starts))


def edit_sheet(
    original: Tensor, variants: Tensor, *, mask: Tensor, region: Tensor, title: str, captions: Sequence[str]
) -> Image.Image:
    """Lays out an edit in one row: original, masked image (region grey, mask outlined), and variants; below, a legend.

    Args:
        original: (C, H, W) uint8 with C = 1 or 3.
        variants: (n, C, H, W) uint8.
        mask: (H, W) bool, the pixels that the user named.
        region: (H, W) bool, the pixels that were generated: the mask and its surroundings.
        title: Text above the row.
        captions: Text above each variant.
    """
    scale = scale_to(original, TILE_SIZE)
    # Grey images become RGB, because grey and outline have colors.
    masked = torch.tensor(MASKED, dtype=torch.uint8)[:, None, None].where(region, original.expand(3, -1, -1))
    edited = draw_outline(enlarge(masked, scale), mask)
    tiles = [enlarge(original, scale), edited, *(enlarge(image, scale) for image in variants)]
    page = lay_out(tiles, columns=len(tiles), column_captions=["original", "masked", *captions])
    legend = [(swatch(frame=REQUESTED), "requested"), (swatch(fill=MASKED), "generated again (whole tokens)")]
    return add_title(add_legend(page, legend), title)


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a PNG file atomically, and makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        picture.save(file, format="PNG")


def save_images(images: Tensor, labels: Sequence[int | None], folder: Path, *, seeds: Sequence[int]) -> None:
    """Writes each image to a PNG file named after its class and its seed, such as ``class-0003-seed-000007.png``.

    Args:
        images: (n, C, H, W) uint8.
        labels: Class of each image; None is "no class".
        folder: Folder of the files, which is made if it does not exist.
        seeds: Seed of each image.
    """
    for image, label, seed in zip(images, labels, seeds, strict=True):
        name = "no-class" if label is None else f"class-{label:04d}"
        save_png(to_pil(image), folder / f"{name}-seed-{seed:06d}.png")


def save_gif(frames: Sequence[Image.Image], path: Path, *, milliseconds: int) -> None:
    """Writes frames as a looping GIF atomically, and makes the folders above it.

    Args:
        frames: At least one frame. All have the same size.
        path: File to write.
        milliseconds: Duration of each frame but the last, which stays longer.
    """
    durations = [milliseconds] * (len(frames) - 1) + [_LAST_FRAME]
    # 128 colours per frame keep the file small.
    first, *rest = [frame.quantize(128) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


def _font(texts: Iterable[str]) -> _Font:
    """Returns the font in which all texts of a part of a page are drawn."""
    text = "".join(texts)
    if text.isascii():
        return ImageFont.load_default(_FONT_SIZE)
    return ImageFont.truetype(_font_file(frozenset(text)) or next(_font_files()), _FONT_SIZE)


@cache
def _font_file(letters: frozenset[str]) -> str | None:
    """Returns the first font that has all letters; None if no font has them."""
    from matplotlib.ft2font import FT2Font

    codes = [ord(letter) for letter in letters if letter.isprintable()]
    for file in _font_files():
        with suppress(RuntimeError, OSError):  # a damaged font
            if all(map(FT2Font(file).get_char_index, codes)):
                return file
    return None


def _font_files() -> Iterator[str]:
    """Yields the font of matplotlib, and then those of the system, whose search takes time."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts

    yield f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    yield from sorted(findSystemFonts())


def _wrap(text: str, width: int, font: _Font) -> Iterator[str]:
    """Yields the lines of a text: as many words in each as ``width`` pixels hold, and at least one."""
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    yield _shorten(line, width, font)


def _shorten(text: str, width: int, font: _Font) -> str:
    """Returns a text, shortened with an ellipsis if it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"

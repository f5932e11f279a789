"""Pictures of an inspection page: the atlas of codes, their histogram, the worst reconstructions."""

from __future__ import annotations

import torch
from torch import Tensor

from maskgit_pl.contrib.inspect_charts import line_chart
from maskgit_pl.contrib.inspect_code_use import picture_codes
from maskgit_pl.contrib.inspect_html import embed_png
from maskgit_pl.evaluation.pages import image_to_png
from maskgit_pl.imaging import image_grid, reconstruction_grid, to_pil
from maskgit_pl.pretrained import PretrainedTokenizer
from maskgit_pl.shards.images import decode_image

__all__ = ["draw_atlas", "draw_histogram", "draw_worst", "safe_png"]

_MAX_CODES = 512
_COLUMNS = 16
_TILE = 20  # pixels
_MAX_BYTES = 8_000_000  # of a picture in an event file


def draw_histogram(counts: Tensor) -> str:
    """Draws the frequencies of codes, sorted, beside uniform use.

    Args:
        counts: (K,) int64: number of tokens of each code.
    """
    shares = (counts.double() / counts.sum().clamp(min=1) * len(counts)).sort(descending=True).values
    frequencies = {rank + 1: value for rank, value in enumerate(shares.tolist()) if value > 0}
    uniform = {1: 1.0, len(counts): 1.0}
    lines = {"frequency / uniform": frequencies, "uniform": uniform}
    return line_chart("Frequency of each code, sorted", lines, x_label="rank of the code")


def draw_atlas(tokenizer: PretrainedTokenizer, counts: Tensor) -> str:
    """Draws one small picture per code, sorted by use, at most 512.

    Args:
        tokenizer: The tokenizer.
        counts: (K,) int64: number of tokens of each code.
    """
    order = counts.argsort(descending=True, stable=True)[:_MAX_CODES]
    tiles = picture_codes(tokenizer, order)
    columns = min(_COLUMNS, len(tiles))
    picture = image_grid(tiles, columns=columns, scale=max(1, _TILE // tiles.shape[-1]))
    used = int((counts > 0).sum())
    title = f"Atlas of {len(order)} of {len(counts)} codes, the most used first (the first {used} occur)"
    description = f"{len(order)} small pictures, each of a token map that is filled with one code"
    return embed_png(title, image_to_png(picture), description=description)


def draw_worst(images: Tensor, reconstructions: Tensor) -> str:
    """Draws images (n, C, H, W) uint8 above their reconstructions."""
    picture = reconstruction_grid(images, reconstructions)
    title = f"The {len(images)} worst reconstructions: originals above"
    return embed_png(title, image_to_png(picture), description=f"{len(images)} images above their reconstructions")


def safe_png(data: bytes) -> bytes | None:
    """Decodes a picture from a file and encodes it again; None if it is damaged or too large."""
    if len(data) > _MAX_BYTES:
        return None
    try:
        pixels: Tensor = decode_image(data, channels=3, name="picture")
    except ValueError:
        return None
    return image_to_png(to_pil(pixels.to(torch.uint8)))

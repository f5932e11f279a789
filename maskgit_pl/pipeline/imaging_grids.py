"""Draws grids of images and sheets of edits, and writes PNG and GIF files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from maskgit_pl.files import write_atomically
from maskgit_pl.image_format import image_file_name
from maskgit_pl.pipeline.grids import (
    MASKED,
    REQUESTED,
    TILE_SIZE,
    add_legend,
    add_title,
    draw_outline,
    enlarge,
    lay_out,
    scale_to,
    swatch,
)
from maskgit_pl.pipeline.imaging_pixels import to_pil

__all__ = ["draw_mask", "edit_sheet", "image_grid", "reconstruction_grid", "save_gif", "save_images", "save_png"]


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

    Raises:
        ValueError: if there are no images, fewer than one column, or more captions than rows or columns.
    """
    rows = _count_rows(images, columns, row_captions, column_captions)
    scale = scale_to(images, TILE_SIZE) if scale is None else scale
    tiles = [enlarge(image, scale) for image in images]
    return lay_out(tiles, rows=rows, columns=columns, row_captions=row_captions, column_captions=column_captions)


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, *, columns: int = 8) -> Image.Image:
    """Lays out rows of originals, each above the row of their reconstructions.

    Args:
        originals: (n, C, H, W) uint8.
        reconstructions: (n, C, H, W) uint8.
        columns: Number of images per row.
    """
    columns = min(columns, len(originals))
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
    masked = draw_mask(original, mask=mask, region=region, scale=scale)
    tiles = [enlarge(original, scale), masked, *(enlarge(image, scale) for image in variants)]
    page = lay_out(tiles, rows=1, columns=len(tiles), column_captions=["original", "masked", *captions])
    legend = [(swatch(frame=REQUESTED), "requested"), (swatch(fill=MASKED), "generated again (whole tokens)")]
    return add_title(add_legend(page, legend), title)


def draw_mask(original: Tensor, *, mask: Tensor, region: Tensor, scale: int) -> Image.Image:
    """Returns an image, enlarged ``scale`` times, with the region of an edit in grey and the mask in a green outline.

    See ``edit_sheet`` for the other arguments.
    """
    # Grey images become RGB, because the outline has a color.
    pixels = original.expand(3, -1, -1)
    masked = torch.tensor(MASKED, dtype=torch.uint8)[:, None, None].where(region, pixels)
    return draw_outline(enlarge(masked, scale), mask, REQUESTED)


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a PNG file atomically, and makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        picture.save(file, format="PNG")


def save_images(images: Tensor, labels: Sequence[int | None], folder: Path, *, seed: int | Sequence[int]) -> None:
    """Writes each image to a PNG file named after its class and its seed.

    Args:
        images: (n, C, H, W) uint8.
        labels: Class of each image; None is "no class".
        folder: Folder of the files, which is made if it does not exist.
        seed: Seed of the first image, and image i has seed + i; or the seed of each image.
    """
    seeds = range(seed, seed + len(images)) if isinstance(seed, int) else seed
    for image, label, own in zip(images, labels, seeds, strict=True):
        save_png(to_pil(image), folder / image_file_name(label, own))


def save_gif(frames: Sequence[Image.Image], path: Path, *, milliseconds: int = 600, last: int = 2400) -> None:
    """Writes frames as a looping GIF atomically, and makes the folders above it.

    Args:
        frames: At least one frame. All have the same size.
        path: File to write.
        milliseconds: Duration of each frame but the last.
        last: Duration of the last frame in milliseconds.
    """
    durations = [milliseconds] * (len(frames) - 1) + [last]
    # 128 colours per frame keep the file small.
    first, *rest = [frame.quantize(128) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


def _count_rows(images: Tensor, columns: int, row_captions: Sequence[str], column_captions: Sequence[str]) -> int:
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"images must be (n, C, H, W) uint8 with n >= 1, got {tuple(images.shape)} {images.dtype}")
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    rows = math.ceil(len(images) / columns)
    for name, captions, most in (("row", row_captions, rows), ("column", column_captions, columns)):
        if len(captions) > most:
            raise ValueError(f"{name}_captions must be at most {most}, one per {name}, got {len(captions)}")
    return rows

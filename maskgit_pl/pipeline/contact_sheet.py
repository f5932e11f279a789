"""Draws a few images of each class of a data set, for ``maskgit data stats --out``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from maskgit_pl.data.images import load_image
from maskgit_pl.data.shard_facts import ImageRange
from maskgit_pl.data.stats import DataStatistics, images_of_classes
from maskgit_pl.image_format import ImageSize, height_width
from maskgit_pl.pipeline.imaging_grids import image_grid, save_png

__all__ = ["draw_contact_sheet"]

_MOST_ROWS = 40  # number of classes
_COLUMNS = 8  # number of images of each class
_SIDE = 84  # largest height and width of an image in pixels
_LONGEST_CAPTION = 32  # characters


def draw_contact_sheet(statistics: DataStatistics, out: Path) -> None:
    """Draws a row of images for each class, or for 40 evenly spread classes if there are more.

    Args:
        statistics: Statistics of the data folder.
        out: PNG file to write.
    """
    summary = statistics.summary
    size = _tile_size(summary.images)
    # With many classes, the shown ones are evenly spread over the indices.
    shown = np.unique(np.linspace(0, summary.num_classes - 1, min(_MOST_ROWS, summary.num_classes)).round().astype(int))
    # Classes with fewer images than columns end with white tiles.
    paper = torch.full((summary.channels, *height_width(size)), 255, dtype=torch.uint8)
    tiles = []
    for files in images_of_classes(statistics.manifests["train"], shown.tolist(), each=_COLUMNS):
        row = [
            load_image(data, image_size=size, channels=summary.channels, crop=None, name=name) for data, name in files
        ]
        tiles += row + [paper] * (_COLUMNS - len(row))
    captions = [_caption(summary.classes[label]) for label in shown]
    save_png(image_grid(torch.stack(tiles), columns=_COLUMNS, row_captions=captions), out)


def _tile_size(images: ImageRange) -> ImageSize:
    """Returns the size of all tiles: the shape of the images, if all have the same, else a square of at most 84 px."""
    (height, highest), (width, widest) = images.height, images.width
    if (height, width) == (highest, widest):
        scale = min(1.0, _SIDE / max(height, width))
        return max(1, round(scale * height)), max(1, round(scale * width))
    return _SIDE if min(highest, widest) > _SIDE else min(_SIDE, height, width)


def _caption(name: str) -> str:
    return name if len(name) <= _LONGEST_CAPTION else f"{name[: _LONGEST_CAPTION - 1]}…"

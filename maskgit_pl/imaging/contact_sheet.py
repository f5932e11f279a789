"""Draws a few images of each class of a data set, for ``maskgit data stats --out``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from maskgit_pl.imaging.grids import image_grid, save_png
from maskgit_pl.shards.images import load_image
from maskgit_pl.shards.stats import DataStatistics, images_of_classes

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
    side = min(_SIDE, summary.images.height[0], summary.images.width[0])
    side = _SIDE if min(summary.images.height[1], summary.images.width[1]) > _SIDE else side
    # With many classes, the shown ones are evenly spread over the indices.
    shown = np.unique(np.linspace(0, summary.num_classes - 1, min(_MOST_ROWS, summary.num_classes)).round().astype(int))
    # Classes with fewer images than columns end with white tiles.
    paper = torch.full((summary.channels, side, side), 255, dtype=torch.uint8)
    tiles = []
    for files in images_of_classes(statistics.manifests["train"], shown.tolist(), each=_COLUMNS):
        row = [
            load_image(data, image_size=side, channels=summary.channels, crop=None, name=name) for data, name in files
        ]
        tiles += row + [paper] * (_COLUMNS - len(row))
    captions = [_caption(summary.classes[label]) for label in shown]
    save_png(image_grid(torch.stack(tiles), columns=_COLUMNS, row_captions=captions), out)


def _caption(name: str) -> str:
    return name if len(name) <= _LONGEST_CAPTION else f"{name[: _LONGEST_CAPTION - 1]}…"

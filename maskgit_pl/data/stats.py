"""Statistics of a data folder, a few images per class, and exact duplicates within and across its splits.

Used by ``maskgit data stats``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.images import UnreadableImageError, decode_image, parse_image_header
from maskgit_pl.data.manifest import DataSummary, Manifest, Split, load_manifests, read_manifest_summary, splits_of
from maskgit_pl.data.reader import ShardReader

__all__ = [
    "DataStatistics",
    "Duplicates",
    "find_duplicates",
    "images_of_classes",
    "read_statistics",
    "statistics_as_json",
]

_HEADERS = 2_000  # images whose size is read, spread evenly over the split
_MAX_PAIRS = 5
_DIGEST_BYTES = 16  # two of 10^9 different images are equal with a probability of 10^-21


@dataclass(frozen=True)
class DataStatistics:
    """The statistics of a data folder.

    Args:
        summary: Class names, samples of the splits, range of the image sizes.
        manifests: Manifest of each split.
        classes: Number of samples of each class, (num_classes,) int64, for each split.
        medians: Median (height, width) of the train images, of at most 2,000 of them.
    """

    summary: DataSummary
    manifests: dict[Split, Manifest]
    classes: dict[Split, npt.NDArray[np.int64]]
    medians: tuple[int, int]


def read_statistics(folder: str | Path) -> DataStatistics:
    """Counts the classes from the index, and reads the sizes of up to 2,000 train images.

    Raises:
        FileNotFoundError: if the folder or the manifest is missing.
        ValueError: if shards differ from their manifests.
    """
    folder = Path(folder)
    summary = read_manifest_summary(folder)
    # Raises an error without train.
    manifests: dict[Split, Manifest] = load_manifests(folder, tuple(dict.fromkeys(("train", *splits_of(folder)))))
    classes = {
        split: np.bincount(ShardReader(manifest).index["label"], minlength=summary.num_classes)
        for split, manifest in manifests.items()
    }
    return DataStatistics(summary, manifests, classes, _medians(manifests["train"]))


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
        "duplicates": None if duplicates is None else {**asdict(duplicates), "share_of_val": duplicates.share_of_val},
    }


def images_of_classes(manifest: Manifest, labels: list[int], *, each: int) -> Iterator[list[tuple[bytes, str]]]:
    """Yields, for each of the labels, the bytes and names of its first images, at most ``each``."""
    reader = ShardReader(manifest)
    of_sample = np.asarray(reader.index["label"])
    for label in labels:
        chosen = np.flatnonzero(of_sample == label)[:each].tolist()
        yield [(reader.read(index), reader.name(index)) for index in chosen]


@dataclass(frozen=True)
class Duplicates:
    """Images that equal an earlier one. Train comes before val.

    Args:
        compared: The values that were compared: bytes of the files, or decoded pixels.
        images: Number of images of each split.
        repeated: Number of images of each split that equal an earlier one of the same split.
        val_in_train: Number of val images that equal a train image.
        other_label: Number of images that equal an earlier one of another class.
        pairs: Names of the first five of them, each after that of the image which it equals.
    """

    compared: Literal["bytes", "pixels"]
    images: dict[Split, int]
    repeated: dict[Split, int]
    val_in_train: int
    other_label: int
    pairs: tuple[tuple[str, str], ...]

    @property
    def share_of_val(self) -> float:
        """The fraction of val images that equal a train image, in [0, 1]."""
        return self.val_in_train / max(1, self.images.get("val", 0))


def find_duplicates(
    manifests: Mapping[Split, Manifest],
    *,
    compare: Literal["bytes", "pixels"] = "bytes",
    on_image: Callable[[Split, int], object] = lambda split, total: None,
) -> Duplicates:
    """Compares all images of a data folder by a hash.

    Only files of equal length can have equal bytes, so the others are not read. Pixels are compared as RGB of 8 bit;
    files that cannot be decoded equal only copies of themselves.

    Args:
        manifests: Manifest of each split, train first.
        compare: ``"bytes"`` of the files, or decoded ``"pixels"``, which takes about ten times as long.
        on_image: Called with the split and its number of images after each image (for a progress bar).

    Raises:
        ValueError: if shards differ from their manifests.
    """
    readers: dict[Split, ShardReader] = {split: ShardReader(manifest) for split, manifest in manifests.items()}
    digest = _digest_of_bytes if compare == "bytes" else _digest_of_pixels
    lengths, counts = np.unique(
        np.concatenate([reader.index["size"] for reader in readers.values()]), return_counts=True
    )
    first: dict[bytes, tuple[Split, int]] = {}  # digest -> split and number of the first image
    repeated: dict[Split, int] = dict.fromkeys(readers, 0)
    val_in_train, other_label, pairs = 0, 0, list[tuple[str, str]]()
    for split, reader in readers.items():
        is_candidate = np.isin(reader.index["size"], lengths[counts > 1]) | (compare == "pixels")
        for place in range(len(reader)):
            on_image(split, len(reader))
            if not is_candidate[place]:
                continue
            original, number = first.setdefault(digest(reader.read(place), reader.name(place)), (split, place))
            if (original, number) == (split, place):
                continue
            repeated[split] += original == split
            val_in_train += original != split
            other_label += int(readers[original].index["label"][number] != reader.index["label"][place])
            if len(pairs) < _MAX_PAIRS:
                pairs.append((readers[original].name(number), reader.name(place)))
    images = {split: len(reader) for split, reader in readers.items()}
    return Duplicates(compare, images, repeated, val_in_train, other_label, tuple(pairs))


def _medians(manifest: Manifest) -> tuple[int, int]:
    """Returns the median height and width of images that are spread evenly over the split."""
    # Reading a header costs a read of the whole image, so only some images are read.
    reader = ShardReader(manifest)
    indices = np.unique(np.linspace(0, len(reader) - 1, min(_HEADERS, len(reader))).round().astype(int)).tolist()
    headers = [parse_image_header(reader.read(index), name=reader.name(index)) for index in indices]
    medians = np.median([(header.height, header.width) for header in headers], axis=0)
    height, width = medians.round().astype(int).tolist()
    return height, width


def _digest_of_bytes(data: bytes, name: str) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _digest_of_pixels(data: bytes, name: str) -> bytes:
    try:
        pixels = decode_image(data, channels=3, name=name)  # (3, H, W) uint8
    except UnreadableImageError:
        return _digest_of_bytes(data, name)
    # The sizes, too: images of 2 x 8 and 4 x 4 pixels may have equal values.
    return _digest_of_bytes(repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes(), name)

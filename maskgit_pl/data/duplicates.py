"""Exact duplicates among the images of a data folder, within and across its splits. Used by ``maskgit data stats``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from maskgit_pl.data.images import UnreadableImageError, decode_image
from maskgit_pl.data.manifest import Manifest, Split
from maskgit_pl.data.reader import ShardReader

__all__ = ["DuplicatePair", "Duplicates", "find_duplicates"]

_MAX_PAIRS = 5
_DIGEST_BYTES = 16  # two of 10^9 different images are equal with a probability of 10^-21


class DuplicatePair(NamedTuple):
    """An image and the first one that it equals, by their names."""

    first: str
    repeated: str


@dataclass(frozen=True)
class Duplicates:
    """Images that equal an earlier one. Train comes before val.

    Args:
        compared: The values that were compared: bytes of the files, or decoded pixels.
        images: Number of images of each split.
        repeated: Number of images of each split that equal an earlier one of the same split.
        val_in_train: Number of val images that equal a train image.
        other_label: Number of images that equal an earlier one of another class.
        pairs: The first five of them.
    """

    compared: Literal["bytes", "pixels"]
    images: dict[Split, int]
    repeated: dict[Split, int]
    val_in_train: int
    other_label: int
    pairs: tuple[DuplicatePair, ...]

    @property
    def share_of_val(self) -> float:
        """The fraction of val images that equal a train image, in [0, 1]."""
        return self.val_in_train / max(1, self.images.get("val", 0))


class _Image(NamedTuple):
    """An image of a data folder."""

    split: Split
    place: int
    label: int


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
    first: dict[bytes, _Image] = {}
    repeated: dict[Split, int] = dict.fromkeys(readers, 0)
    val_in_train, other_label, pairs = 0, 0, list[DuplicatePair]()
    for image, is_candidate in _images(readers, any_length=compare == "pixels"):
        reader = readers[image.split]
        if is_candidate:
            original = first.setdefault(digest(reader.read(image.place), reader.name(image.place)), image)
            if original is not image:
                repeated[image.split] += original.split == image.split
                val_in_train += original.split != image.split
                other_label += original.label != image.label
                if len(pairs) < _MAX_PAIRS:
                    names = (readers[each.split].name(each.place) for each in (original, image))
                    pairs.append(DuplicatePair(*names))
        on_image(image.split, len(reader))
    for reader in readers.values():
        reader.close()
    images = {split: len(reader) for split, reader in readers.items()}
    return Duplicates(compare, images, repeated, val_in_train, other_label, tuple(pairs))


def _images(readers: Mapping[Split, ShardReader], *, any_length: bool) -> Iterator[tuple[_Image, bool]]:
    """Yields all images, and whether another one has the same length (or True for all)."""
    lengths = [np.asarray(reader.index["size"]) for reader in readers.values()]
    values, counts = np.unique(np.concatenate(lengths), return_counts=True)
    for (split, reader), own in zip(readers.items(), lengths, strict=True):
        candidates = np.isin(own, values[counts > 1]) | any_length
        labels = reader.labels(np.arange(len(reader)))
        for place, (label, is_candidate) in enumerate(zip(labels.tolist(), candidates.tolist(), strict=True)):
            yield _Image(split, place, label), is_candidate


def _digest_of_bytes(data: bytes, name: str) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _digest_of_pixels(data: bytes, name: str) -> bytes:
    try:
        pixels = decode_image(data, channels=3, name=name)  # (3, H, W) uint8
    except UnreadableImageError:
        return _digest_of_bytes(data, name)
    # The sizes, too: images of 2 x 8 and 4 x 4 pixels may have equal values.
    return _digest_of_bytes(repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes(), name)

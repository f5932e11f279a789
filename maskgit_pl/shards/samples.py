"""The samples that a source of shards hands out, and what all sources share; see ``sources`` and ``parquet``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from maskgit_pl.shards.image_bytes import UnreadableImageError, check_whole
from maskgit_pl.shards.images import parse_image_header
from maskgit_pl.shards.manifest import Split

__all__ = ["EXTENSIONS", "Sample", "Source", "UnreadableSample", "is_val", "read_sample"]

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # by what a file is, not by what it is called


class Sample(NamedTuple):
    """One image: file bytes, extension (``png``, ``jpg`` ...), label in [0, num_classes), and what errors call it."""

    data: bytes
    extension: str
    label: int
    name: str


class UnreadableSample(NamedTuple):
    """An image that cannot be read, in the place of its sample: one line that names it and says why."""

    error: str


class Source(Protocol):
    """A source of samples as the writer needs it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a place in this list."""

    @property
    def counts(self) -> dict[Split, int]:
        """Samples of each split."""

    def describe(self) -> dict[str, Any]:
        """Returns plain values that change when the samples would."""

    @property
    def left_out(self) -> Sequence[str]:
        """Lines that say which files of the source are no samples."""

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields the samples at some places of a split, whose order is always the same."""


def read_sample(read: Callable[[], bytes], *, label: int, name: str) -> Sample | UnreadableSample:
    """Makes a sample of an image file whose header can be read and that is not cut off.

    Args:
        read: Gives the file's bytes.
        label: Label of the sample.
        name: What errors call it.
    """
    try:
        data = read()
        header = parse_image_header(data, name=name)
        check_whole(data, name=name)
    except UnreadableImageError as error:
        return UnreadableSample(str(error))
    except OSError as error:
        return UnreadableSample(f"image {name} cannot be read: {error.strerror}")
    return Sample(data, EXTENSIONS[header.format], label, name)


def is_val(digest: bytes, fraction: float) -> bool:
    """Returns whether a sample is of the val split, by a hash of its name: new samples move no other."""
    return int.from_bytes(digest[-8:], "big") < math.ceil(fraction * 2**64)

"""What a source of shards hands out, and what all sources share; see ``sources`` and ``parquet``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from maskgit_pl.shards.manifest import Split

__all__ = ["EXTENSIONS", "Sample", "Source", "check_val_fraction", "is_val"]

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # by what a file is, not by what it is called


class Sample(NamedTuple):
    """One image: file bytes, extension (``png``, ``jpg`` ...), label in [0, num_classes), and what errors call it."""

    data: bytes
    extension: str
    label: int
    name: str


class Source(Protocol):
    """What the writer needs of a source of samples."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a place in this list."""

    @property
    def counts(self) -> dict[Split, int]:
        """Samples of each split."""

    def describe(self) -> dict[str, Any]:
        """Plain values that change when the samples would."""

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """The samples at some places of a split, whose order is always the same."""


def check_val_fraction(fraction: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: Not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val fraction: a number between 0 and 1 is needed, got {fraction}")


def is_val(digest: bytes, fraction: float) -> bool:
    """Whether a sample is of the val split, by the last bytes of a hash of its name: new samples move no other."""
    return int.from_bytes(digest[-8:], "big") < math.ceil(fraction * 2**64)

"""The samples of a source, and the interface and checks that all sources share.

Used by ``sources``, ``parquet`` and ``writer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from maskgit_pl.data.image_bytes import UnreadableImageError, check_complete
from maskgit_pl.data.images import parse_image_header
from maskgit_pl.data.manifest import Split

__all__ = ["EXTENSIONS", "Sample", "Source", "UnreadableSample", "is_val", "read_sample"]

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # by the format of the content, not by the file's name


class Sample(NamedTuple):
    """An image and its label.

    Args:
        data: Bytes of the image file.
        extension: ``"png"``, ``"jpg"`` or ``"webp"``.
        label: Class in [0, num_classes).
        name: The sample's name in error messages.
        vector: Bytes of the ``.npy`` file of its vector; None if it has none.
    """

    data: bytes
    extension: str
    label: int
    name: str
    vector: bytes | None = None


class UnreadableSample(NamedTuple):
    """An image that cannot be read, in place of its sample.

    Args:
        error: One line that names the image and gives the reason.
    """

    error: str


class Source(Protocol):
    """The interface of a source of samples, as ``writer.make_shards`` uses it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; label i is ``classes[i]``."""

    @property
    def counts(self) -> dict[Split, int]:
        """The number of samples of each split."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON values that identify the samples: they differ if any sample differs."""

    @property
    def left_out(self) -> Sequence[str]:
        """The files of the source that are not samples, one line per kind of file."""

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields samples of a split.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the order of the split, which is always the same.
        """


def read_sample(read: Callable[[], bytes], *, label: int, name: str) -> Sample | UnreadableSample:
    """Reads an image file and checks, without decoding it, that its header is valid and that it is complete.

    Args:
        read: Returns the bytes of the file.
        label: Label of the sample.
        name: The sample's name in error messages.

    Returns:
        The sample, or an ``UnreadableSample`` with the reason.
    """
    try:
        data = read()
        # The image's own format decides the extension; the pixels are not decoded.
        header = parse_image_header(data, name=name)
        check_complete(data, name=name)
    except UnreadableImageError as error:
        return UnreadableSample(str(error))
    except OSError as error:
        return UnreadableSample(f"image {name} cannot be read: {error.strerror}")
    return Sample(data, EXTENSIONS[header.format], label, name)


def is_val(digest: bytes, fraction: float) -> bool:
    """Returns whether a sample belongs to the val split.

    The hash of its name decides, so adding samples never moves others between splits.

    Args:
        digest: Hash of the sample's name, at least 8 bytes.
        fraction: Fraction of the samples that are val, in (0, 1).
    """
    # The last 8 bytes as a uniform integer in [0, 2^64).
    return int.from_bytes(digest[-8:], "big") < math.ceil(fraction * 2**64)

"""The IDX files of MNIST, Fashion-MNIST and similar data, as a source of samples. Used by ``open_source``."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.images import encode_png
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import Sample
from maskgit_pl.data.sources.labels import number_classes
from maskgit_pl.errors import printable
from maskgit_pl.files import size_text

__all__ = ["IdxFiles"]

_IDX_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("t10k", "test", "val")}
_MAX_IDX_BYTES = 2**30  # of a decompressed file; EMNIST's largest has 640 MB


class IdxFiles:
    """The four IDX files of MNIST, Fashion-MNIST and similar data, plain or gzipped; images become PNG.

    Samples keep the order of the files: sample i of val is image i of the official test set.

    Args:
        folder: Folder of ``train-images-idx3-ubyte[.gz]``, ``train-labels-idx1-ubyte[.gz]`` and the t10k pair.
        classes: Class names; None names the classes by their numbers.

    Raises:
        ValueError: if a file is missing, there are several data sets, or a file is not IDX, is larger than 1 GiB
            decompressed, or has another length than its header states.
    """

    left_out: tuple[str, ...] = ()
    has_splits = True

    def __init__(self, folder: Path, *, classes: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._splits = {split: _read_split(folder, split) for split in _IDX_SPLITS}
        found = {
            int(labels.max()): f"source {printable(folder)}:{split}" for split, (_, labels, _) in self._splits.items()
        }
        self.classes, _ = number_classes(found, classes, label_field="label")

    @property
    def counts(self) -> dict[Split, int]:
        """The number of images of each split."""
        return {split: len(labels) for split, (_, labels, _) in self._splits.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and a hash of the decompressed images and labels of each split."""
        files = {split: sha256 for split, (_, _, sha256) in self._splits.items()}
        return {"kind": "idx", "classes": list(self.classes), "files": files}

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Yields images of a split as PNG.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of image numbers.
        """
        import torch

        images, labels, _ = self._splits[split]
        for number in places:
            pixels = torch.from_numpy(images[number].copy())[None]  # (1, H, W); the file's bytes are read-only
            yield Sample(encode_png(pixels), "png", int(labels[number]), f"{self.folder}:{split} image {number}")


def _read_split(folder: Path, split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], str]:
    """Returns images (n, H, W), labels (n,) and a hash of both."""
    # The digest covers decompressed bytes: a recompressed file is the same data.
    digest = hashlib.sha256()
    images = _read_idx(_find_idx(folder, split, "images*idx3"), 3, digest)
    labels = _read_idx(_find_idx(folder, split, "labels*idx1"), 1, digest)
    if len(images) != len(labels):
        rule = f"{split} must have {len(images)} labels for its images"
        raise ValueError(f"source {printable(folder)}: {rule}, got {len(labels)}")
    return images, labels, digest.hexdigest()


def _find_idx(folder: Path, split: Split, kind: str) -> Path:
    patterns = [f"*{name}-{kind}*" for name in _IDX_SPLITS[split]]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    # A file may be there twice, also compressed. EMNIST has six data sets in one folder: the user chooses.
    sets = sorted({path.name.rpartition(f"-{kind[:6]}")[0] for path in found})
    if len(sets) != 1:
        got = ", ".join(map(printable, sets)) or f"no file {' or '.join(patterns)}"
        raise ValueError(
            f"source {printable(folder)} must have one data set, got {got} for the {split} split; give each data set a "
            "folder of its own"
        )
    return found[0]


def _read_idx(path: Path, dimensions: int, digest: Any) -> npt.NDArray[np.uint8]:
    """Reads an IDX file, plain or gzipped, and updates a digest with its bytes.

    IDX: two zero bytes, type 8 (uint8), number of dimensions, each dimension as big-endian uint32, then the values. No
    more bytes are read than the header states, since a small gzip file may expand to any size.

    Args:
        path: The file.
        dimensions: Expected number of dimensions: 3 for images, 1 for labels.
        digest: A hash object of ``hashlib``.

    Returns:
        (n, H, W) or (n,) uint8.
    """
    name = f"IDX file {printable(path)}"
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if is_packed else open(path, "rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{name} must hold bytes in {dimensions} dimensions, got a header of {header[:4]!r}")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            count = math.prod(shape)
            if not 0 < count <= _MAX_IDX_BYTES:
                raise ValueError(f"{name} must hold 1 byte to {size_text(_MAX_IDX_BYTES)}, got a header of {shape}")
            values = stream.read(count + 1)  # one more, to notice a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} must be a complete gzip file, got: {error}") from error
    if len(values) != count:
        got = "more" if len(values) > count else str(len(values))
        raise ValueError(f"{name} must hold the {count} values of {shape}, got {got}")
    digest.update(header)
    digest.update(values)
    return np.frombuffer(values, np.uint8).reshape(shape)

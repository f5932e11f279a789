"""What shards are made from: trees of image files with one folder a class, IDX files (the MNIST family), parquet files.

A source lists its splits, hands out samples one by one and describes itself, so that a second run of the same command
knows that nothing is left to do.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.shards.images import encode_png, read_header
from maskgit_pl.shards.manifest import Split
from maskgit_pl.shards.samples import EXTENSIONS, Sample, Source, check_val_fraction, is_val
from maskgit_pl.shards.walk import IMAGE_EXTENSIONS

__all__ = ["IdxFiles", "ImageFolder", "Sample", "Source", "open_source"]

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_IDX_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("t10k", "test", "val")}


def open_source(
    path: str | Path, *, classes: Sequence[str] | None = None, val_fraction: float = 0.1, label_field: str = "label"
) -> Source:
    """The source that a folder is: IDX or parquet files if it holds any, else a tree of images.

    Args:
        path: The folder.
        classes: Class names, where the files have none.
        val_fraction: Share that becomes val where the files are not split.
        label_field: Column of the labels in parquet files.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: The folder is none of them.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"source {folder}: no such folder")
    if any(folder.glob("*-images*idx3*")):
        return IdxFiles(folder, classes=classes)
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        from maskgit_pl.shards.parquet import ParquetFolder

        return ParquetFolder(folder, classes=classes, val_fraction=val_fraction, label_field=label_field)
    if classes is not None:
        raise ValueError(f"source {folder}: class names are the names of its sub-folders, so none can be given")
    return ImageFolder(folder, val_fraction=val_fraction)


class _File(NamedTuple):
    path: Path
    label: int
    digest: bytes  # of the path relative to the split's root: decides order and split


class ImageFolder:
    """A tree of images with one sub-folder a class; with ``train/`` and ``val/`` (or ``test/``), those are the splits.

    Files keep their bytes. Their order, and the split where the tree has none, follow from a hash of the path inside
    the tree, so that neighbours in a shard are of mixed classes and a new file moves no other to another split.

    Args:
        folder: The tree.
        val_fraction: Share of the files that become the val split of a tree without one, in (0, 1).

    Raises:
        ValueError: No images, no classes, a class that train lacks, or a split without files.
    """

    def __init__(self, folder: Path, *, val_fraction: float = 0.1) -> None:
        check_val_fraction(val_fraction)
        self.folder = folder
        self.classes: tuple[str, ...]
        val = next((folder / name for name in _VAL_FOLDERS if (folder / name).is_dir()), None)
        if (folder / "train").is_dir() and val is not None:
            self.classes, self._files = _read_split_tree(folder, val)
            self._split_by = f"{folder.name}/{val.name}"
        else:
            self.classes, self._files = _read_plain_tree(folder, val_fraction)
            self._split_by = f"hash, {val_fraction}"
        for split, files in self._files.items():
            if not files:
                raise ValueError(f"source {folder}: the {split} split has no files ({self._split_by})")

    @property
    def counts(self) -> dict[Split, int]:
        """Files of each split."""
        return {split: len(files) for split, files in self._files.items()}

    def describe(self) -> dict[str, Any]:
        """Class names, and a hash over paths and lengths of the files of each split."""
        return {
            "kind": "image folder",
            "classes": list(self.classes),
            "files": {split: self._digest(files) for split, files in self._files.items()},
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Files of a split in the order of their hashes; each is checked to be an image by its header."""
        for file in self._files[split][places.start : places.stop]:
            data = file.path.read_bytes()
            header = read_header(data, name=str(file.path))
            yield Sample(data, EXTENSIONS[header.format], file.label, str(file.path))

    def _digest(self, files: list[_File]) -> str:
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.digest + file.path.stat().st_size.to_bytes(8, "little"))
        return digest.hexdigest()


def _read_split_tree(folder: Path, val: Path) -> tuple[tuple[str, ...], dict[Split, list[_File]]]:
    classes = _class_names(folder / "train")
    unknown = sorted(set(_class_names(val)) - set(classes))
    if unknown:
        raise ValueError(f"source {folder}: classes of {val.name}/ that train/ lacks: {', '.join(unknown)}")
    return classes, {"train": _list_files(folder / "train", classes), "val": _list_files(val, classes)}


def _read_plain_tree(folder: Path, val_fraction: float) -> tuple[tuple[str, ...], dict[Split, list[_File]]]:
    classes = _class_names(folder)
    files = _list_files(folder, classes)
    return classes, {
        "train": [file for file in files if not is_val(file.digest, val_fraction)],
        "val": [file for file in files if is_val(file.digest, val_fraction)],
    }


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"source {folder}: one sub-folder a class is needed, got none; see data/README.md")
    return tuple(names)


def _list_files(folder: Path, classes: Sequence[str]) -> list[_File]:
    files = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file() and relative.split("/")[0] in classes:
            label = classes.index(relative.split("/")[0])
            files.append(_File(path, label, hashlib.sha256(relative.encode()).digest()))
    if not files:
        raise ValueError(f"source {folder}: no {', '.join(IMAGE_EXTENSIONS)} files in its class folders")
    return sorted(files, key=lambda file: file.digest)


class IdxFiles:
    """The four IDX files of MNIST, Fashion-MNIST and their kin, plain or gzipped; images become PNG.

    The order of the files is kept, so that sample i of val is image i of the official test set.

    Args:
        folder: Where ``train-images-idx3-ubyte[.gz]``, ``train-labels-idx1-ubyte[.gz]`` and the t10k pair lie.
        classes: Class names; without, the labels' numbers.

    Raises:
        ValueError: A file is missing, is not IDX, or has another length than its header says.
    """

    def __init__(self, folder: Path, *, classes: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._splits = {split: _read_idx_split(folder, split) for split in _IDX_SPLITS}
        largest = max(int(split.labels.max()) for split in self._splits.values())
        self.classes = tuple(classes) if classes is not None else tuple(str(label) for label in range(largest + 1))
        if largest >= len(self.classes):
            raise ValueError(f"source {folder}: {len(self.classes)} class names, but labels up to {largest}")

    @property
    def counts(self) -> dict[Split, int]:
        """Images of each split."""
        return {split: len(content.labels) for split, content in self._splits.items()}

    def describe(self) -> dict[str, Any]:
        """Class names, and a hash of each split's uncompressed images and labels."""
        return {
            "kind": "idx",
            "classes": list(self.classes),
            "files": {split: content.sha256 for split, content in self._splits.items()},
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Images of a split as PNG."""
        import torch

        content = self._splits[split]
        for number in places:
            # (1, H, W); a copy, since the file's bytes are const
            pixels = torch.from_numpy(content.images[number].copy()).unsqueeze(0)
            label = int(content.labels[number])
            yield Sample(encode_png(pixels), "png", label, f"{self.folder}:{split} image {number}")


@dataclass(frozen=True)
class _IdxSplit:
    images: npt.NDArray[np.uint8]  # (n, H, W)
    labels: npt.NDArray[np.uint8]  # (n,)
    sha256: str


def _read_idx_split(folder: Path, split: Split) -> _IdxSplit:
    image_bytes, label_bytes = (_read_idx_file(folder, split, kind) for kind in ("images*idx3", "labels*idx1"))
    images = _parse_idx(image_bytes, dimensions=3, name=f"{folder}, {split} images")
    labels = _parse_idx(label_bytes, dimensions=1, name=f"{folder}, {split} labels")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"source {folder}: {split} has {len(images)} images and {len(labels)} labels")
    return _IdxSplit(images, labels, hashlib.sha256(image_bytes + label_bytes).hexdigest())


def _read_idx_file(folder: Path, split: Split, kind: str) -> bytes:
    patterns = [f"*{name}-{kind}*" for name in _IDX_SPLITS[split]]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not found:
        raise ValueError(f"source {folder}: no file {' or '.join(patterns)} for the {split} split")
    data = found[0].read_bytes()
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"file {found[0]}: not a whole gzip file ({error})") from error


def _parse_idx(data: bytes, *, dimensions: int, name: str) -> npt.NDArray[np.uint8]:
    """IDX: two zero bytes, type 8 (uint8), number of dimensions, each as big-endian uint32, then the values."""
    start = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < start:
        raise ValueError(f"IDX file {name}: {dimensions} dimensions of bytes are needed, the file opens {data[:4]!r}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    if len(data) != start + math.prod(shape):
        raise ValueError(f"IDX file {name}: {start + math.prod(shape)} bytes expected for {shape}, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)

"""The sources that shards are made from: trees of images with a folder a class, IDX files (the MNIST family), parquet.

A source lists its splits, hands out samples one by one and describes itself, so that a second run of the same command
knows that nothing is left to do.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.files import size_text
from maskgit_pl.shards.image_bytes import read_image_file
from maskgit_pl.shards.images import encode_png
from maskgit_pl.shards.manifest import Split
from maskgit_pl.shards.samples import Sample, Source, UnreadableSample, is_val, read_sample
from maskgit_pl.shards.scan import IMAGE_EXTENSIONS
from maskgit_pl.text import printable

__all__ = ["IdxFiles", "ImageFolder", "Sample", "Source", "open_source"]

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_IDX_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("t10k", "test", "val")}
_MAX_IDX_BYTES = 2**30  # of a file when it is unpacked; EMNIST's largest has 640 MB
_MAX_LISTED = 3  # of files that are left out


def open_source(
    path: str | Path, *, classes: Sequence[str] | None = None, val_fraction: float = 0.1, label_field: str = "label"
) -> Source:
    """Opens the source that a folder is: IDX or parquet files if it holds any, else a tree of images.

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
        raise FileNotFoundError(f"source {printable(folder)}: no such folder")
    if any(folder.glob("*-images*idx3*")):
        return IdxFiles(folder, classes=classes)
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        from maskgit_pl.shards.parquet import ParquetFolder

        return ParquetFolder(folder, classes=classes, val_fraction=val_fraction, label_field=label_field)
    if classes is not None:
        raise ValueError(
            f"source {printable(folder)}: class names are the names of its sub-folders, so none can be given"
        )
    return ImageFolder(folder, val_fraction=val_fraction)


_LeftOut = dict[str, list[str]]  # names of files that are no samples, by what they are


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
        check_number("val fraction", val_fraction, "(0, 1)")
        self.folder = folder
        self.classes: tuple[str, ...]
        val = next((folder / name for name in _VAL_FOLDERS if (folder / name).is_dir()), None)
        if (folder / "train").is_dir() and val is not None:
            self.classes, self._files, self._left_out = _read_split_tree(folder, val)
            self._split_by = f"{folder.name}/{val.name}"
        else:
            self.classes, self._files, self._left_out = _read_plain_tree(folder, val_fraction)
            self._split_by = f"hash, {val_fraction}"
        for split, files in self._files.items():
            if not files:
                raise ValueError(f"source {printable(folder)}: the {split} split has no files ({self._split_by})")

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

    @property
    def left_out(self) -> tuple[str, ...]:
        """Lines that count and name the files that are no images of a class."""
        return tuple(_format_files(kind, names) for kind, names in sorted(self._left_out.items()))

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Files of a split in the order of their hashes; each is checked to be a whole image without decoding it."""
        for file in self._files[split][places.start : places.stop]:
            name = printable(file.path)
            yield read_sample(partial(read_image_file, file.path, name=name), label=file.label, name=name)

    def _digest(self, files: list[_File]) -> str:
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.digest + file.path.stat().st_size.to_bytes(8, "little"))
        return digest.hexdigest()


def _format_files(kind: str, names: Sequence[str]) -> str:
    listed = [printable(name) for name in names[:_MAX_LISTED]] + ["..."] * (len(names) > _MAX_LISTED)
    return f"{len(names)} {printable(kind)} ({', '.join(listed)})"


def _read_split_tree(folder: Path, val: Path) -> tuple[tuple[str, ...], dict[Split, list[_File]], _LeftOut]:
    classes = _class_names(folder / "train")
    unknown = sorted(set(_class_names(val)) - set(classes))
    if unknown:
        names = ", ".join(map(printable, unknown))
        raise ValueError(f"source {printable(folder)}: classes of {val.name}/ that train/ lacks: {names}")
    beside = sorted(path.name for path in folder.iterdir() if path.name not in ("train", val.name))
    left_out: _LeftOut = {"beside the folders of the splits": beside} if beside else {}
    train, held_out = (_list_files(part, classes, left_out) for part in (folder / "train", val))
    return classes, {"train": train, "val": held_out}, left_out


def _read_plain_tree(folder: Path, val_fraction: float) -> tuple[tuple[str, ...], dict[Split, list[_File]], _LeftOut]:
    classes = _class_names(folder)
    left_out: _LeftOut = {}
    files = _list_files(folder, classes, left_out)
    splits: dict[Split, list[_File]] = {
        "train": [file for file in files if not is_val(file.digest, val_fraction)],
        "val": [file for file in files if is_val(file.digest, val_fraction)],
    }
    return classes, splits, left_out


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    shown = printable(folder)
    if not names:
        count = sum(path.suffix[1:].lower() in IMAGE_EXTENSIONS for path in folder.iterdir())
        raise ValueError(
            f"source {shown} must have one sub-folder per class, got {count} images and no sub-folder; to train "
            f"without classes, move the images into one sub-folder such as {shown}/image"
        )
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise ValueError(
                f"source {shown}: a class folder must have a UTF-8 name on one line, got '{printable(name)}'"
            )
    return tuple(names)


def _list_files(folder: Path, classes: Sequence[str], left_out: _LeftOut) -> list[_File]:
    """Lists the images of a split; notes the names of all other files."""
    files = []
    labels = {name: label for label, name in enumerate(classes)}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        label = labels.get(relative.split("/")[0])
        if path.is_dir():
            if path.is_symlink():
                left_out.setdefault("symbolic links to folders, which are not followed", []).append(relative)
        elif "/" not in relative:
            left_out.setdefault("outside the class folders", []).append(relative)
        elif label is not None and path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
            left_out.setdefault(path.suffix.lower() or "without an ending", []).append(relative)
        elif label is not None and not path.is_file():
            left_out.setdefault("that are no regular files", []).append(relative)
        elif label is not None:  # else in a hidden folder
            files.append(_File(path, label, hashlib.sha256(os.fsencode(relative)).digest()))
    if not files:
        kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        got = ", ".join(_format_files(kind, names) for kind, names in left_out.items()) or "none"
        raise ValueError(f"source {printable(folder)} must hold {kinds} files in its class folders, got {got}")
    return sorted(files, key=lambda file: file.digest)


class IdxFiles:
    """The four IDX files of MNIST, Fashion-MNIST and their kin, plain or gzipped; images become PNG.

    The order of the files is kept, so that sample i of val is image i of the official test set.

    Args:
        folder: Where ``train-images-idx3-ubyte[.gz]``, ``train-labels-idx1-ubyte[.gz]`` and the t10k pair lie.
        classes: Class names; without, the labels' numbers.

    Raises:
        ValueError: A file is missing, is not IDX, is larger than 1 GiB unpacked, or has another length than its header
            says.
    """

    left_out: tuple[str, ...] = ()

    def __init__(self, folder: Path, *, classes: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._splits = {split: _read_idx_split(folder, split) for split in _IDX_SPLITS}
        largest = max(int(split.labels.max()) for split in self._splits.values())
        self.classes = tuple(classes) if classes is not None else tuple(str(label) for label in range(largest + 1))
        if largest >= len(self.classes):
            raise ValueError(f"source {printable(folder)}: {len(self.classes)} class names, but labels up to {largest}")

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
    digest = hashlib.sha256()
    images = _read_idx(_find_idx(folder, split, "images*idx3"), 3, digest)
    labels = _read_idx(_find_idx(folder, split, "labels*idx1"), 1, digest)
    if len(images) != len(labels):
        raise ValueError(f"source {printable(folder)}: {split} has {len(images)} images and {len(labels)} labels")
    return _IdxSplit(images, labels, digest.hexdigest())


def _find_idx(folder: Path, split: Split, kind: str) -> Path:
    patterns = [f"*{name}-{kind}*" for name in _IDX_SPLITS[split]]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    if not found:
        shown = printable(folder)
        raise ValueError(f"source {shown}: no file {' or '.join(patterns)} for the {split} split")
    return found[0]


def _read_idx(path: Path, dimensions: int, digest: Any) -> npt.NDArray[np.uint8]:
    """Reads an IDX file, plain or gzipped, as far as its header says and no further; adds its bytes to a digest.

    IDX: two zero bytes, type 8 (uint8), number of dimensions, each as big-endian uint32, then the values.
    """
    name = f"IDX file {printable(path)}"
    with open(path, "rb") as raw:
        is_packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if is_packed else raw  # type: ignore[assignment]  # reads bytes
        try:
            header = stream.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{name} must hold bytes in {dimensions} dimensions, it begins with {header[:4]!r}")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            count = math.prod(shape)
            if not 0 < count <= _MAX_IDX_BYTES:
                raise ValueError(f"{name} must hold 1 to {size_text(_MAX_IDX_BYTES)}, its header says {shape}")
            values = stream.read(count + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is not a whole gzip file: {error}") from error
    if len(values) != count:
        got = "more" if len(values) > count else str(len(values))
        raise ValueError(f"{name} must hold the {count} values of {shape}, got {got}")
    digest.update(header)
    digest.update(values)
    return np.frombuffer(values, np.uint8).reshape(shape)

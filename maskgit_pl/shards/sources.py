"""The sources of ``maskgit data make``: image folders with one sub-folder per class, IDX files (MNIST), parquet files.

A source counts the samples of its splits, yields samples one by one, and describes itself, so that a second run of the
same command finds that the data are complete. See ``samples.Source`` for the interface.
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
from maskgit_pl.shards.folder_vectors import FolderVectors
from maskgit_pl.shards.image_bytes import read_image_file
from maskgit_pl.shards.images import encode_png
from maskgit_pl.shards.manifest import Split
from maskgit_pl.shards.samples import Sample, Source, UnreadableSample, is_val, read_sample
from maskgit_pl.shards.scan import IMAGE_EXTENSIONS
from maskgit_pl.shards.vectors import VECTOR_EXTENSION
from maskgit_pl.text import printable

__all__ = ["IdxFiles", "ImageFolder", "Sample", "Source", "open_source"]

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_IDX_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("t10k", "test", "val")}
_MAX_IDX_BYTES = 2**30  # of a decompressed file; EMNIST's largest has 640 MB
_MAX_LISTED = 3  # names of files that are left out


def open_source(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    label_field: str = "label",
    vectors: bool = True,
) -> Source:
    """Opens a folder as a source: IDX or parquet files if it contains any, else an image folder.

    Args:
        path: The folder.
        classes: Class names, if the files have none.
        val_fraction: Fraction of the samples that become val if the files have no splits, in (0, 1).
        label_field: Column of the labels in parquet files.
        vectors: True to take the ``.npy`` files beside the images of an image folder as their vectors.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the folder is not a valid source.
    """
    # The kind of a folder follows from its files.
    folder = Path(path)
    if not folder.is_dir():
        fault = "must be a folder, got a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"source {printable(folder)} {fault}; name a folder with one sub-folder of images per class, or a folder "
            "of IDX or parquet files"
        )
    if any(folder.glob("*-images*idx3*")):
        return IdxFiles(folder, classes=classes)
    if any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet")):
        from maskgit_pl.shards.parquet import ParquetFolder

        return ParquetFolder(folder, classes=classes, val_fraction=val_fraction, label_field=label_field)
    if classes is not None:
        raise ValueError(
            f"source {printable(folder)}: class names must not be given, since they are the names of its sub-folders"
        )
    return ImageFolder(folder, val_fraction=val_fraction, vectors=vectors)


_LeftOut = dict[str, list[str]]  # names of files that are not samples, by kind


class _File(NamedTuple):
    """A file of an image folder."""

    path: Path
    label: int
    digest: bytes  # of the path relative to the split's root; determines order and split
    vector: Path | None = None  # the file NAME.npy beside NAME.jpg


class ImageFolder:
    """A folder of images with one sub-folder per class; ``train/`` and ``val/`` (or ``test/``) in it are the splits.

    The bytes of the files do not change. A hash of each file's path inside the folder determines its order and, without
    split folders, its split. So each shard has mixed classes, and adding a file never moves others between splits.

    A file ``NAME.npy`` beside an image ``NAME.jpg`` is the image's vector; see ``vectors``. If one image has a vector,
    all must have one, of the same size and type.

    Args:
        folder: The folder.
        val_fraction: Fraction of the files that become val if there are no split folders, in (0, 1).
        vectors: True to read vectors; False leaves out all ``.npy`` files.

    Raises:
        ValueError: if there are no images or no classes, val has a class that train lacks, one split folder stands
            without the other, or a split has no files.
    """

    def __init__(self, folder: Path, *, val_fraction: float = 0.1, vectors: bool = True) -> None:
        check_number("val_fraction", val_fraction, "(0, 1)")
        self.folder = folder
        self.classes: tuple[str, ...]
        # The first of these names is the val split; without it, or without train/, sub-folders are classes.
        val = next((folder / name for name in _VAL_FOLDERS if (folder / name).is_dir()), None)
        if (folder / "train").is_dir() and val is not None:
            self.classes, self._files, self._left_out = _read_split_tree(folder, val, vectors=vectors)
        else:
            _check_no_half_split(folder)
            self.classes, self._files, self._left_out = _read_plain_tree(folder, val_fraction, vectors=vectors)
        self._vectors = FolderVectors.of([file.vector for files in self._files.values() for file in files])
        count = sum(map(len, self._files.values()))
        for split, files in self._files.items():
            if not files:  # only without split folders: a hash puts few files into one split
                raise ValueError(
                    f"source {printable(folder)}: the {split} split must have files, got none of {count} at a val "
                    f"fraction of {val_fraction:g}; add images, set --val-fraction, or make the folders train/ and val/"
                )

    @property
    def counts(self) -> dict[Split, int]:
        """The number of files of each split."""
        return {split: len(files) for split, files in self._files.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and a hash of the paths and lengths of the files of each split."""
        described: dict[str, Any] = {
            "kind": "image folder",
            "classes": list(self.classes),
            "files": {split: self._digest(files) for split, files in self._files.items()},
        }
        # Without vectors, the record of a folder that was made earlier must not change.
        if self._vectors is not None:
            described["vectors"] = {
                split: self._vectors.digest([file.vector for file in files]) for split, files in self._files.items()
            }
        return described

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files that are not images of a class, one line per kind with a count and the first names."""
        return tuple(_format_files(kind, names) for kind, names in sorted(self._left_out.items()))

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields files of a split in the order of their hashes, checked to be complete images without decoding.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the split's order.
        """
        for file in self._files[split][places.start : places.stop]:
            name = printable(file.path)
            sample = read_sample(partial(read_image_file, file.path, name=name), label=file.label, name=name)
            if self._vectors is not None and isinstance(sample, Sample):
                sample = self._vectors.add_to(sample, file.path, file.vector)
            yield sample

    def _digest(self, files: list[_File]) -> str:
        digest = hashlib.sha256()
        for file in files:
            digest.update(file.digest + file.path.stat().st_size.to_bytes(8, "little"))
        return digest.hexdigest()


def _format_files(kind: str, names: Sequence[str]) -> str:
    listed = [printable(name) for name in names[:_MAX_LISTED]] + ["..."] * (len(names) > _MAX_LISTED)
    return f"{len(names)} {printable(kind)} ({', '.join(listed)})"


def _read_split_tree(
    folder: Path, val: Path, *, vectors: bool
) -> tuple[tuple[str, ...], dict[Split, list[_File]], _LeftOut]:
    # Labels are numbered by train's classes; val may lack some of them.
    classes = _class_names(folder / "train")
    unknown = sorted(set(_class_names(val)) - set(classes))
    if unknown:
        names = ", ".join(map(printable, unknown))
        raise ValueError(f"source {printable(folder)}: train/ must have all classes of {val.name}/; it lacks {names}")
    beside = sorted(path.name for path in folder.iterdir() if path.name not in ("train", val.name))
    left_out: _LeftOut = {"beside the folders of the splits": beside} if beside else {}
    train, held_out = (_list_files(part, classes, left_out, vectors=vectors) for part in (folder / "train", val))
    return classes, {"train": train, "val": held_out}, left_out


def _check_no_half_split(folder: Path) -> None:
    """Raises if one split folder stands without the other: it would become a class that is named like a split."""
    for name in ("train", *_VAL_FOLDERS):
        # A class may be called train too: it has images in it, not folders.
        if (folder / name).is_dir() and any(path.is_dir() for path in (folder / name).iterdir()):
            other = "val/ (or test/)" if name == "train" else "train/"
            raise ValueError(
                f"source {printable(folder)} must have {other} beside {name}/, got no such folder; add it, or name "
                f"{printable(folder / name)} to take the val split from its images"
            )


def _read_plain_tree(
    folder: Path, val_fraction: float, *, vectors: bool
) -> tuple[tuple[str, ...], dict[Split, list[_File]], _LeftOut]:
    classes = _class_names(folder)
    left_out: _LeftOut = {}
    files = _list_files(folder, classes, left_out, vectors=vectors)
    splits: dict[Split, list[_File]] = {
        "train": [file for file in files if not is_val(file.digest, val_fraction)],
        "val": [file for file in files if is_val(file.digest, val_fraction)],
    }
    return classes, splits, left_out


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    shown = printable(folder)
    # The most common mistake is a flat folder of images.
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


def _list_files(folder: Path, classes: Sequence[str], left_out: _LeftOut, *, vectors: bool) -> list[_File]:
    """Returns the images of a split in the order of their hashes, and adds the names of other files to ``left_out``."""
    files, others = list[_File](), _LeftOut()
    labels = {name: label for label, name in enumerate(classes)}
    # Sorted, so that notes about other files have a fixed order.
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        label = labels.get(relative.split("/")[0])
        if path.is_dir():
            if path.is_symlink():
                others.setdefault("symbolic links to folders, which are not followed", []).append(relative)
        elif "/" not in relative:
            others.setdefault("outside the class folders", []).append(relative)
        elif label is not None and path.suffix[1:].lower() not in IMAGE_EXTENSIONS:
            others.setdefault(path.suffix.lower() or "without an ending", []).append(relative)
        elif label is not None and not path.is_file():
            others.setdefault("that are not regular files", []).append(relative)
        elif label is not None:  # without a label, the file is in a hidden folder
            files.append(_File(path, label, hashlib.sha256(os.fsencode(relative)).digest()))
    if vectors:
        files = _take_vectors(folder, files, others)
    _extend(left_out, others)
    if not files:
        kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        got = ", ".join(_format_files(kind, names) for kind, names in left_out.items()) or "none"
        raise ValueError(f"source {printable(folder)} must hold {kinds} files in its class folders, got {got}")
    return sorted(files, key=lambda file: file.digest)


def _extend(left_out: _LeftOut, others: _LeftOut) -> None:
    for kind, names in others.items():
        left_out.setdefault(kind, []).extend(names)


def _take_vectors(folder: Path, files: Sequence[_File], left_out: _LeftOut) -> list[_File]:
    """Returns files with the vectors beside them, and removes these vectors from ``left_out``."""
    kind = f".{VECTOR_EXTENSION}"
    names = set(left_out.pop(kind, []))
    taken = {
        file.path: file.path.with_suffix(kind)
        for file in files
        if file.path.with_suffix(kind).relative_to(folder).as_posix() in names
    }
    unused = sorted(names - {path.relative_to(folder).as_posix() for path in taken.values()})
    if unused:
        left_out[kind] = unused
    return [file._replace(vector=taken.get(file.path)) for file in files]


class IdxFiles:
    """The four IDX files of MNIST, Fashion-MNIST and similar data, plain or gzipped; images become PNG.

    Samples keep the order of the files: sample i of val is image i of the official test set.

    Args:
        folder: Folder of ``train-images-idx3-ubyte[.gz]``, ``train-labels-idx1-ubyte[.gz]`` and the t10k pair.
        classes: Class names; None names the classes by their numbers.

    Raises:
        ValueError: if a file is missing, is not IDX, is larger than 1 GiB decompressed, or has another length than its
            header states.
    """

    left_out: tuple[str, ...] = ()

    def __init__(self, folder: Path, *, classes: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._splits = {split: _read_idx_split(folder, split) for split in _IDX_SPLITS}
        largest = max(int(split.labels.max()) for split in self._splits.values())
        self.classes = tuple(classes) if classes is not None else tuple(str(label) for label in range(largest + 1))
        if largest >= len(self.classes):
            raise ValueError(
                f"source {printable(folder)}: labels must be in [0, {len(self.classes)}), the number of class names, "
                f"got {largest}"
            )

    @property
    def counts(self) -> dict[Split, int]:
        """The number of images of each split."""
        return {split: len(content.labels) for split, content in self._splits.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and a hash of the decompressed images and labels of each split."""
        return {
            "kind": "idx",
            "classes": list(self.classes),
            "files": {split: content.sha256 for split, content in self._splits.items()},
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Yields images of a split as PNG.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of image numbers.
        """
        import torch

        content = self._splits[split]
        for number in places:
            # (1, H, W); a copy, since the file's bytes are read-only
            pixels = torch.from_numpy(content.images[number].copy()).unsqueeze(0)
            label = int(content.labels[number])
            yield Sample(encode_png(pixels), "png", label, f"{self.folder}:{split} image {number}")


@dataclass(frozen=True)
class _IdxSplit:
    """The content of a split's two IDX files."""

    images: npt.NDArray[np.uint8]  # (n, H, W)
    labels: npt.NDArray[np.uint8]  # (n,)
    sha256: str


def _read_idx_split(folder: Path, split: Split) -> _IdxSplit:
    # The digest covers decompressed bytes: a recompressed file is the same data.
    digest = hashlib.sha256()
    images = _read_idx(_find_idx(folder, split, "images*idx3"), 3, digest)
    labels = _read_idx(_find_idx(folder, split, "labels*idx1"), 1, digest)
    if len(images) != len(labels):
        raise ValueError(
            f"source {printable(folder)}: {split} must have {len(images)} labels for its images, got {len(labels)}"
        )
    return _IdxSplit(images, labels, digest.hexdigest())


def _find_idx(folder: Path, split: Split, kind: str) -> Path:
    patterns = [f"*{name}-{kind}*" for name in _IDX_SPLITS[split]]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    if not found:
        shown = printable(folder)
        raise ValueError(f"source {shown} must have a file {' or '.join(patterns)} for the {split} split, got none")
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
    with open(path, "rb") as raw:
        is_packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if is_packed else raw  # type: ignore[assignment]  # reads bytes
        try:
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

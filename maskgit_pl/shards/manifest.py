"""The manifest beside the shards, one a split, so that shards can be counted, checked and read by index.

A data folder holds ordinary WebDataset tars and, for each split, two files::

    train-000000.tar ...    samples: KEY.png|.jpg|.jpeg|.webp and KEY.cls (a decimal class number)
    train.json              format, shards (name, bytes, samples, sha256), class names, range of image sizes;
                            where labels come from, if not from .cls; what was left out, if anything
    train.npy               one row a sample, see INDEX_DTYPE; memory-mapped

Used by everything that reads data. Imports neither torch nor PIL, so that a summary answers at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import build_dataclass, check_integer, check_keys, check_sha256, shorten
from maskgit_pl.files import read_json, write_atomically, write_text
from maskgit_pl.shards.mapped_array import map_array
from maskgit_pl.shards.quick_check import find_fault
from maskgit_pl.shards.tar import BLOCK

__all__ = [
    "INDEX_DTYPE",
    "DataSummary",
    "ImageRange",
    "Manifest",
    "Shard",
    "Split",
    "check_shards",
    "data_fingerprint",
    "index_sha256",
    "load_manifest",
    "load_manifests",
    "read_manifest_summary",
    "save_manifest",
    "splits_of",
    "union",
]

Split = Literal["train", "val"]
FORMAT = 1
_MAX_MANIFEST_BYTES = 2**28  # a million shards
_MAX_SIDE = 2**26  # of an image; it has at most 64 million pixels
_BLOCK_ROWS = 2**20  # of an index that are compared at a time
# offset and size of the image's bytes inside the tar, so that one pread fetches it
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """One tar.

    Args:
        name: Path inside the data folder.
        bytes: Length.
        samples: Samples in it.
        sha256: Of the whole file, in hex.

    Raises:
        ValueError: if a value is out of range, or the name leaves the folder.
    """

    name: str
    bytes: int
    samples: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _is_inside(self.name):
            raise ValueError(f"name must be that of a file inside the data folder, got {shorten(self.name)}")
        check_integer("bytes", self.bytes, "[0, 1125899906842624]")  # 1 PiB
        check_integer("samples", self.samples, "[0, 4294967296]")
        check_sha256("sha256", self.sha256)


@dataclass(frozen=True)
class ImageRange:
    """Smallest and largest height and width of the images as stored, and the channels seen (1, 3, or 4 with alpha)."""

    height: tuple[int, int]
    width: tuple[int, int]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """One split of a data folder.

    Args:
        folder: Where the shards lie.
        split: ``"train"`` or ``"val"``.
        shards: In the order in which samples are numbered.
        classes: Class names; label i is ``classes[i]``.
        images: What sizes the images have.
        index_sha256: Hash of the rows of the index file.
        labels: Where labels come from: ``"cls"``, ``"json:FIELD"`` or ``"none"``.
        left_out: Samples of the tars that the index has not, by what is wrong with them.
    """

    folder: Path
    split: Split
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    images: ImageRange
    index_sha256: str
    labels: str = "cls"
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Sha256 over everything but the place of the folder, hex: equal for equal data."""
        content = json.dumps(_to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def index(self) -> npt.NDArray[np.void]:
        """Returns the rows of the index, (samples,) INDEX_DTYPE, memory-mapped; their number and type are checked.

        Raises:
            ValueError: if the file cannot be read or has other rows.
        """
        path = self.folder / f"{self.split}.npy"
        try:
            rows: npt.NDArray[np.void] = map_array(path)
        except FileNotFoundError as error:
            raise ValueError(f"index {path}: cannot be read ({error.strerror}); {_remake_hint(self.folder)}") from error
        except ValueError as error:
            raise ValueError(f"index {error}; {_remake_hint(self.folder)}") from error
        if rows.dtype != INDEX_DTYPE or rows.shape != (self.samples,):
            raise ValueError(
                f"index {path} must have {self.samples} rows of {INDEX_DTYPE}, got {rows.shape} of {rows.dtype}; "
                f"{_remake_hint(self.folder)}"
            )
        return rows


@dataclass(frozen=True)
class DataSummary:
    """The facts that a recipe or a command needs of a data folder before torch is imported."""

    classes: tuple[str, ...]
    samples: Mapping[str, int]
    images: ImageRange
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """The number of classes that the labels name."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """1 if all images are grey, else 3."""
        return 1 if self.images.channels == (1,) else 3


def splits_of(folder: str | Path) -> tuple[Split, ...]:
    """Returns the splits that a data folder has a manifest of."""
    return tuple(split for split in get_args(Split) if (Path(folder) / f"{split}.json").is_file())


def read_manifest_summary(folder: str | Path) -> DataSummary:
    """Class names, counts and image sizes of a data folder; reads two small JSON files.

    Raises:
        FileNotFoundError: The folder or its train manifest is missing.
        ValueError: A manifest cannot be read, or the splits name other classes.
    """
    manifests = [load_manifest(folder, split, check=False) for split in splits_of(folder) or ("train",)]
    first = manifests[0]
    for other in manifests[1:]:
        if other.classes != first.classes:
            raise ValueError(f"data {folder}: both splits must have the same classes; {_remake_hint(Path(folder))}")
    return DataSummary(
        classes=first.classes,
        samples={manifest.split: manifest.samples for manifest in manifests},
        images=union([manifest.images for manifest in manifests]),
        fingerprint=hashlib.sha256("".join(manifest.fingerprint for manifest in manifests).encode()).hexdigest(),
    )


def data_fingerprint(folder: str | Path) -> str:
    """Returns one hash for all splits of a data folder, sha256 in hex; token stores are keyed by it."""
    return read_manifest_summary(folder).fingerprint


def load_manifest(folder: str | Path, split: Split, *, check: bool = True) -> Manifest:
    """Reads a split's manifest and compares what is on disk with it.

    Args:
        folder: The data folder.
        split: Which split.
        check: Whether to call ``check_shards``.

    Raises:
        FileNotFoundError: if there is no such folder or manifest.
        ValueError: if the manifest is not one, or index or shards are not what it says.
    """
    folder = Path(folder)
    path = folder / f"{split}.json"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data folder {folder}: there is none; make it with `maskgit data make SOURCE --out {folder}`, "
            "or fetch the default data with `python data/fashion_mnist.py`"
        )
    if not path.exists():
        raise FileNotFoundError(f"data folder {folder}: no manifest {path.name}; {_remake_hint(folder)}")
    manifest = _from_json(path, folder, split)
    if check:
        check_shards(manifest)
    return manifest


def load_manifests(folder: str | Path, splits: Sequence[Split] = ("train", "val")) -> dict[Split, Manifest]:
    """Reads the manifests of some splits and compares all their shards on disk with them.

    Args:
        folder: The data folder.
        splits: Which splits; the bad shards of all stand in one list.

    Raises:
        FileNotFoundError: No such folder or manifest.
        ValueError: A manifest is not one, or shards are not what they were.
    """
    manifests = {split: load_manifest(folder, split, check=False) for split in splits}
    check_shards(*manifests.values())
    return manifests


def check_shards(*manifests: Manifest) -> None:
    """Compares what is on disk with the manifests: the whole index; length, first and last header of each shard.

    ``maskgit data verify`` reads everything; this is what there is time for before each run.

    Raises:
        ValueError: if an index is not the one that its manifest names, or a shard is missing, cannot be read, or has
            another length or another header. The message names every such shard.
    """
    faults = [fault for manifest in manifests for fault in _faults(manifest)]
    if faults:
        folder, total = manifests[0].folder, sum(len(manifest.shards) for manifest in manifests)
        listed = "\n  ".join(faults)
        raise ValueError(
            f"data {folder}: {len(faults)} of {total} shards are not what the manifest says:\n  {listed}\n"
            f"bring the shards back, or, if they were changed on purpose, {_remake_hint(folder)}"
        )


def save_manifest(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Writes the split's two files, whole or not at all; the JSON last, since it makes the split valid."""
    folder, split = manifest.folder, manifest.split
    with write_atomically(folder / f"{split}.npy") as file:
        np.save(file, rows, allow_pickle=False)
    write_text(folder / f"{split}.json", json.dumps(_to_json(manifest), indent=1) + "\n")


def index_sha256(rows: npt.NDArray[np.void]) -> str:
    """Returns the sha256 of the rows of an index, in hex; a mapped index is not copied into memory."""
    return hashlib.sha256(np.ascontiguousarray(rows).view(np.uint8).data).hexdigest()


def _check_index(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Compares the rows with the manifest: their hash, and the place of each image inside its shard.

    Raises:
        ValueError: if they are not the rows that the manifest names.
    """
    path, hint = manifest.folder / f"{manifest.split}.npy", _remake_hint(manifest.folder)
    actual = index_sha256(rows)
    if actual != manifest.index_sha256:
        raise ValueError(
            f"index {path}: changed since it was made: sha256 {manifest.index_sha256[:12]} expected, got "
            f"{actual[:12]}; {hint}"
        )
    lengths = np.array([shard.bytes for shard in manifest.shards], np.uint64)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        shard, offset, size = block["shard"], block["offset"], block["size"]
        bad = (shard >= len(lengths)) | (offset < BLOCK)
        # a difference, since a sum might overflow
        bad |= offset > lengths[np.minimum(shard, len(lengths) - 1)]
        bad |= size > lengths[np.minimum(shard, len(lengths) - 1)] - np.where(bad, 0, offset)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"index {path}: row {start + row} must name bytes of one of {len(lengths)} shards, got "
                f"{block[row]}; {hint}"
            )


def _faults(manifest: Manifest) -> Iterator[str]:
    rows, end = manifest.index(), 0
    _check_index(manifest, rows)
    for shard in manifest.shards:
        start, end = end, end + shard.samples
        fault = find_fault(manifest.folder / shard.name, shard.bytes, rows[start:end])
        if fault is not None:
            yield f"{shard.name}: {fault}"


def _to_json(manifest: Manifest) -> dict[str, Any]:
    unusual: dict[str, Any] = {}  # only where it is, so that the fingerprint of other data stays what it was
    if manifest.labels != "cls":
        unusual["labels"] = manifest.labels
    if manifest.left_out:
        unusual["left_out"] = dict(manifest.left_out)
    return unusual | {
        "format": FORMAT,
        "split": manifest.split,
        "samples": manifest.samples,
        "classes": list(manifest.classes),
        "images": asdict(manifest.images),
        "index_sha256": manifest.index_sha256,
        "shards": [asdict(shard) for shard in manifest.shards],
    }


_REQUIRED = ("format", "classes", "images", "index_sha256", "shards")
_KNOWN = (*_REQUIRED, "split", "samples", "labels", "left_out")


def _from_json(path: Path, folder: Path, split: Split) -> Manifest:
    try:
        content = read_json(path, max_bytes=_MAX_MANIFEST_BYTES)
        if content.get("format") != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {shorten(content.get('format'))}")
        check_keys(str(path), content, known=_KNOWN, required=_REQUIRED)
        _check_types(path, content)
        shards = tuple(_shard(fields, f"{path}: shards[{number}]") for number, fields in enumerate(content["shards"]))
        samples = sum(shard.samples for shard in shards)
        check_integer(f"{path}: samples of all shards", samples, "[1, 4294967296]")
        for key, expected in (("split", split), ("samples", samples)):
            if content.get(key, expected) != expected:
                raise ValueError(f"{path}: {key} must be {expected!r}, got {shorten(content[key])}")
        return Manifest(
            folder=folder,
            split=split,
            shards=shards,
            classes=tuple(content["classes"]),
            images=_image_range(content["images"], f"{path}: images"),
            index_sha256=check_sha256(f"{path}: index_sha256", content["index_sha256"]),
            labels=content.get("labels", "cls"),
            left_out=content.get("left_out", {}),
        )
    except ValueError as error:
        raise ValueError(f"manifest {error}; {_remake_hint(folder)}") from error


def _check_types(path: Path, content: Mapping[str, Any]) -> None:
    classes = content["classes"]
    if not classes or not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: classes must be a list of names, got {shorten(classes)}")
    if not isinstance(content["shards"], list):
        raise ValueError(f"{path}: shards must be a list, got {shorten(content['shards'])}")
    labels, left_out = content.get("labels", "cls"), content.get("left_out", {})
    if not isinstance(labels, str) or not re.fullmatch(r"cls|none|json:.+", labels):
        raise ValueError(f"{path}: labels must be cls, json:FIELD or none, got {shorten(labels)}")
    if not isinstance(left_out, dict):
        raise ValueError(f"{path}: left_out must be a mapping of counts, got {shorten(left_out)}")
    for fault, count in left_out.items():
        check_integer(f"{path}: left_out[{shorten(fault)}]", count, "[0, 4294967296]")


def _shard(fields: object, where: str) -> Shard:
    """Builds a shard; ``build_dataclass`` takes too long for many shards."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where} must be a mapping, got {shorten(fields)}")
    if fields.keys() != {"name", "bytes", "samples", "sha256"}:
        names = ("name", "bytes", "samples", "sha256")
        check_keys(where, fields, known=names, required=names)
    try:
        return Shard(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _image_range(fields: object, where: str) -> ImageRange:
    made = build_dataclass(ImageRange, fields, where)
    for name, (low, high) in (("height", made.height), ("width", made.width)):
        check_integer(f"{where}.{name}", low, f"[1, {_MAX_SIDE}]")
        check_integer(f"{where}.{name}", high, f"[{low}, {_MAX_SIDE}]")
    if not made.channels or not set(made.channels) <= {1, 3, 4}:
        raise ValueError(f"{where}.channels must be some of 1, 3 and 4, got {shorten(made.channels)}")
    return ImageRange(*(tuple(sizes) for sizes in (made.height, made.width, made.channels)))  # type: ignore[arg-type]


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or path.name.startswith(".")) and name.isprintable()


def union(ranges: Sequence[ImageRange]) -> ImageRange:
    """Returns the range that holds all of some ranges, one at least."""
    return ImageRange(
        height=(min(r.height[0] for r in ranges), max(r.height[1] for r in ranges)),
        width=(min(r.width[0] for r in ranges), max(r.width[1] for r in ranges)),
        channels=tuple(sorted({channel for r in ranges for channel in r.channels})),
    )


def _remake_hint(folder: Path) -> str:
    return f"make it with `maskgit data index {folder}`"

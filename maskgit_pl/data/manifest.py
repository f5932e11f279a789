"""The manifest of a split, which makes its shards countable, checkable and readable by index.

A data folder contains ordinary WebDataset tars and, for each split, two files::

    train-000000.tar ...    samples: KEY.png|.jpg|.jpeg|.webp and KEY.cls (a decimal class number)
    train.json              format, shards (name, bytes, samples, sha256), class names, range of image sizes;
                            the source of the labels, if it is not .cls; counts of samples left out, if there are any;
                            size, type and sha256 of the vectors, if there are any
    train.npy               one row per sample, see INDEX_DTYPE; memory-mapped
    train-vectors.npy       one vector per sample, if the samples have KEY.npy; memory-mapped, see ``vectors``

Used by everything that reads data. Imports neither torch nor PIL, so that summaries are fast.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_integer, check_keys, check_sha256, shorten
from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.shard_facts import (
    ImageRange,
    Shard,
    VectorArray,
    describe_resizing,
    parse_image_range,
    parse_shard,
    parse_vector_array,
    union,
)
from maskgit_pl.data.tar import BLOCK, find_fault
from maskgit_pl.data.vectors import VectorKind, VectorReader, map_array, vectors_path
from maskgit_pl.files import read_json, sha256_of, sync, write_atomically, write_text

__all__ = [
    "INDEX_DTYPE",
    "DataSummary",
    "ImageRange",
    "Manifest",
    "Shard",
    "Split",
    "VectorArray",
    "check_shards",
    "check_vectors",
    "describe_resizing",
    "index_sha256",
    "load_manifest",
    "load_manifests",
    "read_manifest_summary",
    "save_manifest",
    "splits_of",
    "union",
]

Split = Literal["train", "val"]
_FORMAT = 1
_REQUIRED = ("format", "classes", "images", "index_sha256", "shards")
_KNOWN = (
    *_REQUIRED, "split", "samples", "labels", "left_out", "vector_dim", "vector_dtype", "vectors_sha256"
)  # fmt: skip
_MAX_MANIFEST_BYTES = 2**28  # enough for a million shards
_BLOCK_ROWS = 2**20  # rows of an index that are checked at a time
# Offset and size are those of the image's bytes inside the tar, so that one pread reads them.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])


@dataclass(frozen=True)
class Manifest:
    """The manifest of one split of a data folder.

    Args:
        folder: The data folder.
        split: ``"train"`` or ``"val"``.
        shards: The shards, in the order in which samples are numbered.
        classes: Class names; label i is ``classes[i]``.
        images: Range of the image sizes.
        index_sha256: Hash of the rows of the index file, hex.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``.
        left_out: Number of samples in the tars but not in the index, by kind of fault.
        vectors: The array of the vectors; None if the samples have none.
    """

    folder: Path
    split: Split
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    images: ImageRange
    index_sha256: str
    labels: str = "cls"
    left_out: Mapping[str, int] = field(default_factory=dict)
    vectors: VectorArray | None = None

    @property
    def samples(self) -> int:
        """The number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The SHA-256, hex, of the content of the manifest without the folder: equal for equal data."""
        content = json.dumps(_to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def index(self) -> npt.NDArray[np.void]:
        """Maps the index into memory and checks its shape and type.

        Returns:
            (samples,) INDEX_DTYPE, one row per sample.

        Raises:
            ValueError: if the file cannot be read, or has another shape or type.
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

    def vector_reader(self) -> VectorReader:
        """Returns a reader of the vectors, for data that have vectors."""
        assert self.vectors is not None
        path, hint = vectors_path(self.folder, self.split), _remake_hint(self.folder)
        return VectorReader(path, self.samples, self.vectors.kind, hint=hint)


@dataclass(frozen=True)
class DataSummary:
    """The facts about a data folder that recipes and commands use before torch is imported.

    Args:
        classes: Class names; label i is ``classes[i]``.
        samples: Number of samples of each split.
        images: Range of the image sizes over all splits.
        fingerprint: SHA-256, hex, of all manifests.
        vectors: Size and type of the vectors of the samples; None if they have none.
    """

    classes: tuple[str, ...]
    samples: Mapping[str, int]
    images: ImageRange
    fingerprint: str
    vectors: VectorKind | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """The number of channels to decode to: 1 if all images are grey, else 3."""
        return 1 if self.images.channels == (1,) else 3


def splits_of(folder: str | Path) -> tuple[Split, ...]:
    """Returns the splits of a data folder that have a manifest."""
    return tuple(split for split in get_args(Split) if (Path(folder) / f"{split}.json").is_file())


def read_manifest_summary(folder: str | Path) -> DataSummary:
    """Reads class names, counts and image sizes of a data folder from two small JSON files.

    Raises:
        FileNotFoundError: if the folder or its train manifest is missing.
        ValueError: if a manifest is invalid, or the splits have different classes.
    """
    # Without any manifest, reading that of train raises the right error.
    manifests = [load_manifest(folder, split, check=False) for split in splits_of(folder) or ("train",)]
    first = manifests[0]
    kinds = [None if manifest.vectors is None else manifest.vectors.kind for manifest in manifests]
    for other in manifests[1:]:
        if other.classes != first.classes:
            raise ValueError(f"data {folder}: both splits must have the same classes; {_remake_hint(Path(folder))}")
    if len(set(kinds)) > 1:
        raise ValueError(
            f"data {folder}: both splits must have vectors of the same size and type, got "
            f"{' and '.join(map(str, kinds))}; {_remake_hint(Path(folder))}"
        )
    return DataSummary(
        classes=first.classes,
        samples={manifest.split: manifest.samples for manifest in manifests},
        images=union([manifest.images for manifest in manifests]),
        fingerprint=hashlib.sha256("".join(manifest.fingerprint for manifest in manifests).encode()).hexdigest(),
        vectors=kinds[0],
    )


def load_manifest(folder: str | Path, split: Split, *, check: bool = True) -> Manifest:
    """Reads the manifest of a split and compares the files on disk with it.

    Args:
        folder: The data folder.
        split: ``"train"`` or ``"val"``.
        check: True calls ``check_shards``.

    Raises:
        FileNotFoundError: if the folder or the manifest is missing.
        ValueError: if the manifest is invalid, or index or shards differ from it.
    """
    folder = Path(folder)
    path = folder / f"{split}.json"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data folder {folder} does not exist; make it with `maskgit data make SOURCE --out {folder}`, "
            f"or get the default data with `maskgit data fetch fashion-mnist --out {folder}`"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"data folder {folder} has no manifest {path.name}; {_remake_hint(folder)} if it holds shards, or convert "
            f"images with `maskgit data make {folder} --out DIR`"
        )
    manifest = _from_json(path, folder, split)
    if check:
        check_shards(manifest)
    return manifest


def load_manifests(folder: str | Path, splits: Sequence[Split] = ("train", "val")) -> dict[Split, Manifest]:
    """Reads the manifests of some splits and compares all their files on disk with them.

    Args:
        folder: The data folder.
        splits: The splits; all their bad shards are listed in one error.

    Raises:
        FileNotFoundError: if the folder or a manifest is missing.
        ValueError: if a manifest is invalid, or index or shards differ from it.
    """
    manifests = {split: load_manifest(folder, split, check=False) for split in splits}
    check_shards(*manifests.values())
    return manifests


def check_shards(*manifests: Manifest) -> None:
    """Compares the files on disk with manifests: the whole index, and length, first and last header of each shard.

    This is fast enough for the start of each run; ``maskgit data verify`` reads everything.

    Raises:
        ValueError: if an index differs from its manifest, or a shard is missing, cannot be read, or has another length
            or another header. The message lists all such shards.
    """
    # All faults of all splits in one message, so that they can be repaired together.
    faults = [fault for manifest in manifests for fault in _faults(manifest)]
    if faults:
        folder, total = manifests[0].folder, sum(len(manifest.shards) for manifest in manifests)
        listed = "\n  ".join(faults)
        raise ValueError(
            f"data {folder}: {len(faults)} of {total} shards differ from the manifest:\n  {listed}\n"
            f"restore the shards, or, if they were changed on purpose, make the manifest again with "
            f"`maskgit data index {folder}`"
        )


def check_vectors(manifest: Manifest) -> None:
    """Compares the hash of the array of vectors with the manifest, in 0.5 to 1 s per GB.

    A changed value would not be noticed later. Runs that use the vectors call it at their start.

    Raises:
        ValueError: if it differs.
    """
    assert manifest.vectors is not None
    path = vectors_path(manifest.folder, manifest.split)
    actual = sha256_of(path)
    if actual != manifest.vectors.sha256:
        raise ValueError(
            f"vectors {path} changed since they were indexed: sha256 {manifest.vectors.sha256[:12]} expected, got "
            f"{actual[:12]}; {_remake_hint(manifest.folder)}"
        )


def save_manifest(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Writes the two files of a split, each atomically; the JSON last, when the index is on disk under its name.

    Args:
        manifest: The manifest.
        rows: (samples,) INDEX_DTYPE, the index.
    """
    folder, split = manifest.folder, manifest.split
    with write_atomically(folder / f"{split}.npy") as file:
        np.save(file, rows, allow_pickle=False)
    sync(folder)
    write_text(folder / f"{split}.json", json.dumps(_to_json(manifest), indent=1) + "\n")


def index_sha256(rows: npt.NDArray[np.void]) -> str:
    """Returns the SHA-256, hex, of the rows of an index, without copying a mapped index into memory."""
    return hashlib.sha256(np.ascontiguousarray(rows).view(np.uint8).data).hexdigest()


def _check_index(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Checks the rows of an index: their hash, and that each image lies inside its shard.

    Raises:
        ValueError: if they differ from the manifest.
    """
    path, hint = manifest.folder / f"{manifest.split}.npy", _remake_hint(manifest.folder)
    actual = index_sha256(rows)
    if actual != manifest.index_sha256:
        raise ValueError(
            f"index {path} changed since it was made: sha256 {manifest.index_sha256[:12]} expected, got "
            f"{actual[:12]}; {hint}"
        )
    # The hash protects against accidents; a hostile folder may have a matching hash, so check the ranges too.
    lengths = np.array([shard.bytes for shard in manifest.shards], np.uint64)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        shard, offset, size = block["shard"], block["offset"], block["size"]
        # A header precedes every payload; compare differences, since offset + size might overflow.
        bad = (shard >= len(lengths)) | (offset < BLOCK)
        bad |= offset > lengths[np.minimum(shard, len(lengths) - 1)]
        bad |= size > lengths[np.minimum(shard, len(lengths) - 1)] - np.where(bad, 0, offset)
        bad |= size > MAX_IMAGE_BYTES
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"index {path}: row {start + row} must lie inside one of {len(lengths)} shards, with at most "
                f"{MAX_IMAGE_BYTES} bytes, got {block[row]}; {hint}"
            )


def _faults(manifest: Manifest) -> Iterator[str]:
    rows, end = manifest.index(), 0
    _check_index(manifest, rows)
    if manifest.vectors is not None:
        try:
            manifest.vector_reader().array()
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
    for shard in manifest.shards:
        start, end = end, end + shard.samples
        fault = find_fault(manifest.folder / shard.name, shard.bytes, rows[start:end])
        if fault is not None:
            yield f"{shard.name}: {fault}"


def _to_json(manifest: Manifest) -> dict[str, Any]:
    # Written only if they differ from the default: the fingerprint of the data is made of these keys.
    unusual: dict[str, Any] = {}
    if manifest.labels != "cls":
        unusual["labels"] = manifest.labels
    if manifest.left_out:
        unusual["left_out"] = dict(manifest.left_out)
    if manifest.vectors is not None:
        kind, digest = manifest.vectors.kind, manifest.vectors.sha256
        unusual |= {"vector_dim": kind.dim, "vector_dtype": kind.dtype, "vectors_sha256": digest}
    return unusual | {
        "format": _FORMAT,
        "split": manifest.split,
        "samples": manifest.samples,
        "classes": list(manifest.classes),
        "images": asdict(manifest.images),
        "index_sha256": manifest.index_sha256,
        "shards": [asdict(shard) for shard in manifest.shards],
    }


def _from_json(path: Path, folder: Path, split: Split) -> Manifest:
    try:
        content = read_json(path, max_bytes=_MAX_MANIFEST_BYTES)
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path}: format must be {_FORMAT}, got {shorten(content.get('format'))}")
        check_keys(str(path), content, known=_KNOWN, required=_REQUIRED)
        _check_types(path, content)
        shards = tuple(
            parse_shard(fields, f"{path}: shards[{number}]") for number, fields in enumerate(content["shards"])
        )
        # The keys split and samples repeat other facts, for people who read the file; they must agree.
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
            images=parse_image_range(content["images"], f"{path}: images"),
            index_sha256=check_sha256(f"{path}: index_sha256", content["index_sha256"]),
            labels=content.get("labels", "cls"),
            left_out=content.get("left_out", {}),
            vectors=parse_vector_array(content, str(path)),
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


def _remake_hint(folder: Path) -> str:
    return f"make it with `maskgit data index {folder}`"

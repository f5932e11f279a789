"""The manifest of a split, which makes its shards countable, checkable and readable by index.

A data folder contains ordinary WebDataset tars and, for each split, two files::

    train-000000.tar ...    samples: KEY.png|.jpg|.jpeg|.webp and KEY.cls (a decimal class number)
    train.json              format, shards (name, bytes, samples, sha256), class names, range of image sizes;
                            counts of samples left out, if there are any
    train.npy               one row per sample, see INDEX_DTYPE; memory-mapped

``ShardReader`` needs one ``pread`` per image, without walking a tar. It may be forked or pickled into
workers: it shares no file position, and each process opens its own files.

Used by everything that reads data. Imports neither torch nor PIL, so that summaries are fast.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import ImageSize, build_dataclass, height_width, pixels_text, plain_size
from maskgit_pl.data.arrays import check_unchanged, map_array
from maskgit_pl.data.tar import BLOCK, member_label, parse_header
from maskgit_pl.errors import DataChangedError
from maskgit_pl.files import open_regular, read_json, sync, write_atomically, write_text

Split = Literal["train", "val"]
DESCRIPTION_FILE = "store.json"
"""The description of a token store, see ``token_store``."""
_FORMAT = 1
_MAX_MANIFEST_BYTES = 2**28  # enough for a million shards
_MAX_OPEN = 64  # shards open at a time, far below the usual limit of 1,024 files per process
# Offset and size are those of the image's bytes inside the tar, so that one pread reads them.
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """A tar in a manifest."""

    name: str  # path inside the data folder
    bytes: int  # length of the file
    samples: int  # number of samples in it
    sha256: str  # of the whole file, hex


@dataclass(frozen=True)
class ImageRange:
    """The range of image sizes in a split."""

    height: tuple[int, int]  # smallest and largest, in pixels, after the EXIF orientation
    width: tuple[int, int]
    channels: tuple[int, ...]  # that occur, sorted: 1 and 3; alpha is not counted


@dataclass(frozen=True)
class Manifest:
    """The manifest of one split of a data folder."""

    folder: Path
    split: Split
    shards: tuple[Shard, ...]  # in the order in which samples are numbered
    classes: tuple[str, ...]  # label i is ``classes[i]``
    images: ImageRange
    index_sha256: str  # of the rows of the index file, hex
    left_out: Mapping[str, int] = field(default_factory=dict)  # samples that are not in the index, by kind of fault

    @property
    def samples(self) -> int:
        """The number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """The SHA-256, hex, of the content of the manifest without the folder: equal for equal data."""
        content = json.dumps(_to_json(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def index(self, *, check: bool = False) -> npt.NDArray[np.void]:
        """Maps the index, (samples,) INDEX_DTYPE, into memory; ``check`` compares all rows with hash and classes."""
        path, hint = self.folder / f"{self.split}.npy", _remake_hint(self.folder)
        rows = map_array(path, (self.samples,), INDEX_DTYPE, hint=hint)
        if check:
            check_unchanged(path, index_sha256(rows), expected=self.index_sha256, hint=hint)
            if (largest := rows["label"].max(initial=-1)) >= len(self.classes):
                raise ValueError(
                    f"manifest {path.with_suffix('.json')}: classes must have a name for each label up to {largest}, "
                    f"got {len(self.classes)}; {hint}"
                )
        return rows


@dataclass(frozen=True)
class DataSummary:
    """The facts about a data folder that recipes and commands use before torch is imported, from its manifests."""

    manifests: Mapping[Split, Manifest] = field(repr=False, compare=False)  # they name the folder
    classes: tuple[str, ...]  # label i is ``classes[i]``
    samples: Mapping[Split, int]  # number of samples of each split
    images: ImageRange | None  # over all splits; None for a token store
    fingerprint: str  # SHA-256, hex, of all manifests
    tokens: tuple[tuple[int, ...], int] | None = None  # grid and codebook size of a token store; None for images

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """The number of channels to decode to: 1 if all images are grey, else 3."""
        return 1 if self.images is not None and self.images.channels == (1,) else 3

    def manifest(self, split: Split) -> Manifest:
        """Returns the manifest of a split; for one that the folder does not have, see ``load_manifest``."""
        folder = next(iter(self.manifests.values())).folder
        return self.manifests.get(split) or load_manifest(folder, split)


def splits_of(folder: str | Path) -> tuple[Split, ...]:
    """Returns the splits of a data folder that have a manifest; train if none has one, whose error says the way out."""
    return tuple(split for split in get_args(Split) if (Path(folder) / f"{split}.json").is_file()) or ("train",)


def read_manifest_summary(folder: str | Path) -> DataSummary:
    """Reads class names, counts and image sizes of a data folder from two small JSON files; see ``load_manifest``."""
    by_split = {split: load_manifest(folder, split) for split in splits_of(folder)}
    manifests = list(by_split.values())
    return DataSummary(
        manifests=by_split,
        classes=manifests[0].classes,
        samples={manifest.split: manifest.samples for manifest in manifests},
        images=union([manifest.images for manifest in manifests]),
        fingerprint=hashlib.sha256("".join(manifest.fingerprint for manifest in manifests).encode()).hexdigest(),
    )


def union(ranges: Sequence[ImageRange]) -> ImageRange:
    """Returns the smallest range that contains all given ranges, at least one."""
    return ImageRange(
        height=(min(r.height[0] for r in ranges), max(r.height[1] for r in ranges)),
        width=(min(r.width[0] for r in ranges), max(r.width[1] for r in ranges)),
        channels=tuple(sorted({channel for r in ranges for channel in r.channels})),
    )


def describe_enlarging(images: ImageRange, image_size: ImageSize) -> str | None:
    """Describes in a sentence that all images are enlarged for a model, and how to avoid it; None if they are not."""
    size, largest = height_width(image_size), (images.height[1], images.width[1])
    # An image is resized by the larger of the two ratios, and the rest of it is cropped.
    if all(side >= model_side for side, model_side in zip(largest, size, strict=True)):
        return None
    return (
        f"images of at most {pixels_text(largest)} pixels are enlarged to {pixels_text(size)}, which adds no detail; "
        f"set data.image_size of the tokenizer to at most {plain_size(largest)}, or make the data from larger images"
    )


def is_store(folder: str | Path) -> bool:
    """Returns whether a data folder is a finished token store, which stage 2 reads without images and tokenizer."""
    return (Path(folder) / DESCRIPTION_FILE).is_file()


def load_manifest(folder: str | Path, split: Split) -> Manifest:
    """Reads the manifest of a split without a look at its other files; see ``load_manifests``."""
    folder = Path(folder)
    path = folder / f"{split}.json"
    if not path.exists():
        if is_store(folder):
            raise ValueError(f"data {folder} must be a data folder with images, got a token store")
        raise FileNotFoundError(
            f"data folder {folder} has no manifest {path.name}; {_remake_hint(folder)} if it holds shards, or convert "
            f"images with `maskgit data make SOURCE --out {folder}`"
        )
    content = read_json(path, max_bytes=_MAX_MANIFEST_BYTES)
    if content.pop("format", None) != _FORMAT:
        raise ValueError(f"manifest {path} must have format {_FORMAT}; {_remake_hint(folder)}")
    content.pop("samples", None)  # for people who read the file, as is the split
    return build_dataclass(Manifest, {**content, "folder": folder, "split": split}, str(path))


def load_manifests(folder: str | Path, splits: Sequence[Split] = ("train", "val")) -> dict[Split, Manifest]:
    """Reads the manifests of some splits, and compares the files on disk with them; see ``check_shards``."""
    manifests = {split: load_manifest(folder, split) for split in splits}
    check_shards(manifests.values())
    return manifests


def check_shards(manifests: Collection[Manifest]) -> None:
    """Compares the files of a data folder on disk with its manifests; lists all bad shards in one error.

    Compares the whole index, and length, first and last header of each shard, which is fast enough for the
    start of each run; ``maskgit data verify`` reads everything.
    """
    if faults := [fault for manifest in manifests for fault in _faults(manifest)]:
        total, listed = sum(len(manifest.shards) for manifest in manifests), "\n  ".join(faults)
        folder = next(iter(manifests)).folder
        raise ValueError(
            f"data {folder}: {len(faults)} of {total} shards differ from the manifest:\n  {listed}\n"
            f"restore the shards, or, if they were changed on purpose, make the manifest again with "
            f"`maskgit data index {folder}`"
        )


class ShardReader:
    """A reader with random access to the samples of a split."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, most recently used last

    def __len__(self) -> int:
        return self.manifest.samples

    @cached_property
    def index(self) -> npt.NDArray[np.void]:
        """The rows of the index, (n,) INDEX_DTYPE, mapped into memory at first use in each process."""
        return self.manifest.index()

    def labels(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the labels, (B,) int64 in [0, num_classes), of samples, (B,) int64 in [0, len(self))."""
        labels: npt.NDArray[np.int64] = self.index["label"][indices].astype(np.int64)
        return labels

    def read(self, index: int) -> bytes:
        """Reads the bytes of a sample's image file; ``index`` is its number in the split, in [0, len(self))."""
        shard, offset, size, _ = self.index[index].item()
        return self._pread(shard, size, offset)

    def name(self, index: int) -> str:
        """Returns the name of a sample for error messages: ``SHARD:MEMBER``, with the member's name from the tar."""
        shard, offset, _, _ = self.index[index].item()
        return member_label(self.manifest.shards[shard].name, self._pread(shard, BLOCK, offset - BLOCK), offset)

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self._file(number), size, offset)
            if len(data) != size:
                raise OSError(f"{size} bytes expected at byte {offset}, got {len(data)}")
        except OSError as error:
            folder, name = self.manifest.folder, self.manifest.shards[number].name
            raise DataChangedError(
                f"data {folder}: {name} changed while it was in use: {error}; restore it, or regenerate the manifest "
                f"with `maskgit data index {folder}`; `maskgit data verify {folder}` lists all changed files"
            ) from error
        return data

    def _file(self, number: int) -> int:
        if number not in self._files:
            shard = self.manifest.shards[number]
            descriptor = open_regular(self.manifest.folder / shard.name)
            if (length := os.fstat(descriptor).st_size) != shard.bytes:
                os.close(descriptor)
                raise OSError(f"{shard.bytes} bytes expected, got {length}")
            self._files[number] = descriptor
            if len(self._files) > _MAX_OPEN:
                # The first is the least recently used.
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors and maps are not valid in another process.
        return {"manifest": self.manifest, "_files": OrderedDict()}

    # At the exit of the interpreter, ``os`` may be gone; without its arguments, a reader has no files.
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            close(descriptor)


def save_manifest(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Writes the index, (samples,) INDEX_DTYPE, and then the manifest, each atomically."""
    folder, split = manifest.folder, manifest.split
    with write_atomically(folder / f"{split}.npy") as file:
        np.save(file, rows, allow_pickle=False)
    sync(folder)
    write_text(folder / f"{split}.json", json.dumps(_to_json(manifest), indent=1) + "\n")


def index_sha256(rows: npt.NDArray[np.void]) -> str:
    """Returns the SHA-256, hex, of the rows of an index, without copying a mapped index into memory."""
    return hashlib.sha256(np.ascontiguousarray(rows).view(np.uint8).data).hexdigest()


def _faults(manifest: Manifest) -> Iterator[str]:
    rows, end = manifest.index(check=True), 0
    for shard in manifest.shards:
        start, end = end, end + shard.samples
        if (fault := _fault_of(manifest.folder / shard.name, shard, rows[start:end])) is not None:
            yield f"{shard.name}: {fault}"


def _fault_of(path: Path, shard: Shard, rows: npt.NDArray[np.void]) -> str | None:
    """Compares the length of a shard, and the headers of its first and last image."""
    images = {int(row["offset"]) - BLOCK: int(row["size"]) for row in (*rows[:1], *rows[-1:])}
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            headers = {offset: parse_header(os.pread(file.fileno(), BLOCK, offset)) for offset in images}
    except OSError as error:
        return f"{shard.bytes} bytes expected, {error.strerror}"
    if length != shard.bytes:
        return f"{shard.bytes} bytes expected, {length} found"
    for offset, header in headers.items():
        # A valid checksum, and the length of the payload in the index.
        if header is None or header[1] != images[offset]:
            actual = "none" if header is None else f"one of {header[1]} bytes"
            member = f"a member of {images[offset]} bytes expected at byte {offset}"
            return f"{member}, {actual} found; changed after indexing"
    return None


def _to_json(manifest: Manifest) -> dict[str, Any]:
    # Written only if they differ from the default: the fingerprint of the data is made of these keys.
    unusual: dict[str, Any] = {"left_out": dict(manifest.left_out)} if manifest.left_out else {}
    return unusual | {
        "format": _FORMAT,
        "split": manifest.split,
        "samples": manifest.samples,
        "classes": list(manifest.classes),
        "images": asdict(manifest.images),
        "index_sha256": manifest.index_sha256,
        "shards": [asdict(shard) for shard in manifest.shards],
    }


def _remake_hint(folder: Path) -> str:
    return f"make it with `maskgit data index {folder}`"

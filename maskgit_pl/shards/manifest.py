"""What lies beside the shards: one manifest a split, so that shards can be counted, checked and read by index.

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
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from maskgit_pl.files import write_atomically
from maskgit_pl.shards.tar import BLOCK, header_size

__all__ = [
    "INDEX_DTYPE",
    "DataSummary",
    "ImageRange",
    "Manifest",
    "Shard",
    "Split",
    "check_shards",
    "data_fingerprint",
    "joined",
    "load_manifest",
    "load_manifests",
    "read_manifest_summary",
    "save_manifest",
    "splits_of",
]

Split = Literal["train", "val"]
FORMAT = 1
# offset and size of the image's bytes inside the tar, so that one pread fetches it
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """One tar: its path inside the data folder, its length, its samples and the sha256 of the whole file."""

    name: str
    bytes: int
    samples: int
    sha256: str


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
        return hashlib.sha256(_canonical(_as_json(self)).encode()).hexdigest()

    def index(self) -> npt.NDArray[np.void]:
        """The rows of the index, (samples,) INDEX_DTYPE, memory-mapped.

        Raises:
            ValueError: The file does not belong to this manifest.
        """
        path = self.folder / f"{self.split}.npy"
        try:
            rows: npt.NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"index {path}: cannot be read ({error}); {_way_out(self.folder)}") from error
        if rows.dtype != INDEX_DTYPE or rows.shape != (self.samples,):
            raise ValueError(
                f"index {path}: {self.samples} rows of {INDEX_DTYPE} are needed, got {rows.shape} of {rows.dtype}; "
                f"{_way_out(self.folder)}"
            )
        return rows


@dataclass(frozen=True)
class DataSummary:
    """What a recipe or a command needs to know of a data folder before torch is imported."""

    classes: tuple[str, ...]
    samples: Mapping[str, int]
    images: ImageRange
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """How many classes the labels name."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """1 if all images are grey, else 3."""
        return 1 if self.images.channels == (1,) else 3


def splits_of(folder: str | Path) -> tuple[Split, ...]:
    """The splits that a data folder has a manifest of."""
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
            raise ValueError(f"data {folder}: both splits must have the same classes; {_way_out(Path(folder))}")
    return DataSummary(
        classes=first.classes,
        samples={manifest.split: manifest.samples for manifest in manifests},
        images=joined([manifest.images for manifest in manifests]),
        fingerprint=_joint_fingerprint(manifests),
    )


def data_fingerprint(folder: str | Path) -> str:
    """One hash for all splits of a data folder, sha256 in hex; token stores are keyed by it."""
    return read_manifest_summary(folder).fingerprint


def load_manifest(folder: str | Path, split: Split, *, check: bool = True) -> Manifest:
    """Read a split's manifest and compare the shards on disk with it.

    Args:
        folder: The data folder.
        split: Which split.
        check: Compare the length of every shard with the manifest's.

    Raises:
        FileNotFoundError: No such folder or manifest.
        ValueError: The manifest is not one, or shards are missing or have another length.
    """
    folder = Path(folder)
    path = folder / f"{split}.json"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data folder {folder}: there is none; make it with `maskgit data make SOURCE --out {folder}`, "
            "or fetch the default data with `python data/fashion_mnist.py`"
        )
    if not path.is_file():
        raise FileNotFoundError(f"data folder {folder}: no manifest {path.name}; {_way_out(folder)}")
    manifest = _from_json(path, folder, split)
    if check:
        check_shards(manifest)
    return manifest


def load_manifests(folder: str | Path, splits: Sequence[Split] = ("train", "val")) -> dict[Split, Manifest]:
    """Read the manifests of some splits and compare all their shards on disk with them.

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
    """Compare the shards on disk with their manifests: length, and headers of the first and the last image.

    ``maskgit data verify`` reads everything; this is what there is time for before each run.

    Raises:
        ValueError: Names every shard that is missing, cannot be read, has another length or another header.
    """
    faults = [fault for manifest in manifests for fault in _faults(manifest)]
    if faults:
        folder, total = manifests[0].folder, sum(len(manifest.shards) for manifest in manifests)
        listed = "\n  ".join(faults)
        raise ValueError(
            f"data {folder}: {len(faults)} of {total} shards are not what the manifest says:\n  {listed}\n"
            f"bring the shards back, or, if they were changed on purpose, {_way_out(folder)}"
        )


def save_manifest(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Write the split's two files, each under a temporary name first; the JSON last, since it makes the split valid."""
    folder, split = manifest.folder, manifest.split
    with write_atomically(folder / f"{split}.npy") as file:
        np.save(file, rows, allow_pickle=False)
    with write_atomically(folder / f"{split}.json") as file:
        file.write((json.dumps(_as_json(manifest), indent=1) + "\n").encode())


def _faults(manifest: Manifest) -> Iterator[str]:
    rows, end = manifest.index(), 0
    for shard in manifest.shards:
        start, end = end, end + shard.samples
        fault = _fault(manifest.folder / shard.name, shard, rows[start:end])
        if fault is not None:
            yield f"{shard.name}: {fault}"


def _fault(path: Path, shard: Shard, rows: npt.NDArray[np.void]) -> str | None:
    try:
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != shard.bytes:
                return f"{shard.bytes} bytes expected, {actual} found"
            for offset, size in _ends(rows):
                found = header_size(os.pread(file.fileno(), BLOCK, offset))
                if found is None or size not in (None, found):
                    length = "" if size is None else f" of {size} bytes"
                    actual_length = "none" if found is None else f"one of {found} bytes"
                    return f"a member{length} expected at byte {offset}, {actual_length} found; changed after indexing"
    except OSError as error:
        return f"{shard.bytes} bytes expected, {error.strerror}"
    return None


def _ends(rows: npt.NDArray[np.void]) -> Iterator[tuple[int, int | None]]:
    """Places of member headers, and the payload's length where the index knows it: the first, first and last image."""
    yield 0, None
    for row in rows[[0, -1]] if len(rows) else ():
        yield int(row["offset"]) - BLOCK, int(row["size"])


def _as_json(manifest: Manifest) -> dict[str, Any]:
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


def _from_json(path: Path, folder: Path, split: Split) -> Manifest:
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} is needed, got {content['format']!r}")
        images = content["images"]
        height, width, channels = (tuple(map(int, images[name])) for name in ("height", "width", "channels"))
        return Manifest(
            folder=folder,
            split=split,
            shards=tuple(_shard(fields) for fields in content["shards"]),
            classes=tuple(map(str, content["classes"])),
            images=ImageRange(height=(height[0], height[1]), width=(width[0], width[1]), channels=channels),
            index_sha256=str(content["index_sha256"]),
            labels=str(content.get("labels", "cls")),
            left_out={str(fault): int(count) for fault, count in content.get("left_out", {}).items()},
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"manifest {path}: cannot be read ({error!r}); {_way_out(folder)}") from error


def _shard(fields: Mapping[str, Any]) -> Shard:
    shard = Shard(**fields)
    path = PurePosixPath(shard.name)
    if path.is_absolute() or ".." in path.parts or path.name.startswith(".") or not shard.name.isprintable():
        raise ValueError(f"shard name {shard.name!r}: a file inside the data folder is needed")
    return Shard(name=shard.name, bytes=int(shard.bytes), samples=int(shard.samples), sha256=str(shard.sha256))


def joined(ranges: Sequence[ImageRange]) -> ImageRange:
    """The range that holds all of some ranges, one at least."""
    return ImageRange(
        height=(min(r.height[0] for r in ranges), max(r.height[1] for r in ranges)),
        width=(min(r.width[0] for r in ranges), max(r.width[1] for r in ranges)),
        channels=tuple(sorted({channel for r in ranges for channel in r.channels})),
    )


def _joint_fingerprint(manifests: list[Manifest]) -> str:
    return hashlib.sha256("".join(manifest.fingerprint for manifest in manifests).encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _way_out(folder: Path) -> str:
    return f"make it with `maskgit data index {folder}`"

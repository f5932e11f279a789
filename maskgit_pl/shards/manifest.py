"""What lies beside the shards: one manifest a split, so that shards can be counted, checked and read by index.

A data folder holds ordinary WebDataset tars and, for each split, two files::

    train-000000.tar ...    samples: KEY.png|.jpg|.jpeg|.webp and KEY.cls (a decimal class number)
    train.json              format, shards (name, bytes, samples, sha256), class names, range of image sizes
    train.npy               one row a sample, see INDEX_DTYPE; memory-mapped

Used by everything that reads data. Imports neither torch nor PIL, so that a summary answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = [
    "INDEX_DTYPE",
    "DataSummary",
    "ImageRange",
    "Manifest",
    "Shard",
    "Split",
    "check_shards",
    "data_fingerprint",
    "load_manifest",
    "read_manifest_summary",
    "save_manifest",
    "splits_of",
    "write_atomically",
]

Split = Literal["train", "val"]
FORMAT = 1
# offset and size of the image's bytes inside the tar, so that one pread fetches it
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4")])


@dataclass(frozen=True)
class Shard:
    """One tar: its file name inside the data folder, its length, its samples and the sha256 of the whole file."""

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
    """

    folder: Path
    split: Split
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    images: ImageRange
    index_sha256: str

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
        rows: npt.NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != INDEX_DTYPE or rows.shape != (self.samples,):
            raise ValueError(
                f"index {path}: {self.samples} rows of {INDEX_DTYPE} are needed, got {rows.shape} of {rows.dtype}; "
                f"make it again with `maskgit data index {self.folder}`"
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
        images=_joined([manifest.images for manifest in manifests]),
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


def check_shards(manifest: Manifest) -> None:
    """Compare the shards on disk with the manifest, by length.

    Raises:
        ValueError: Names every shard that is missing, cannot be read or has another length.
    """
    faults = [fault for shard in manifest.shards if (fault := _fault(manifest.folder / shard.name, shard.bytes))]
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(
            f"data {manifest.folder}, split {manifest.split}: {len(faults)} of {len(manifest.shards)} shards are not "
            f"what the manifest says:\n  {listed}\nbring the shards back, or, if they were changed on purpose, "
            f"{_way_out(manifest.folder)}"
        )


def save_manifest(manifest: Manifest, rows: npt.NDArray[np.void]) -> None:
    """Write the split's two files, each under a temporary name first; the JSON last, since it makes the split valid."""
    folder, split = manifest.folder, manifest.split
    with write_atomically(folder / f"{split}.npy") as file:
        np.save(file, rows, allow_pickle=False)
    with write_atomically(folder / f"{split}.json") as file:
        file.write((json.dumps(_as_json(manifest), indent=1) + "\n").encode())


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write bytes to; it takes its name when all is written, and leaves nothing behind otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _fault(path: Path, expected: int) -> str | None:
    try:
        with open(path, "rb") as file:
            actual = os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{path.name}: {expected} bytes expected, {error.strerror}"
    return None if actual == expected else f"{path.name}: {expected} bytes expected, {actual} found"


def _as_json(manifest: Manifest) -> dict[str, Any]:
    return {
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
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"manifest {path}: cannot be read ({error!r}); {_way_out(folder)}") from error


def _shard(fields: Mapping[str, Any]) -> Shard:
    shard = Shard(**fields)
    if Path(shard.name).name != shard.name or shard.name.startswith("."):
        raise ValueError(f"shard name {shard.name!r}: a plain file name is needed")
    return Shard(name=shard.name, bytes=int(shard.bytes), samples=int(shard.samples), sha256=str(shard.sha256))


def _joined(ranges: list[ImageRange]) -> ImageRange:
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

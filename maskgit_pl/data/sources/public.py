"""Public data sets that ``maskgit data fetch`` downloads, checks and opens as sources of samples.

Fashion-MNIST is here, with the reader of the IDX files of MNIST and similar data. Each of the others is a
file of ``contrib`` with a subclass of ``Dataset`` and its objects ``DATASETS``. Imports neither torch nor NumPy:
each ``--help`` reads it.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import math
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.files import open_regular
from maskgit_pl.text import printable, size_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from maskgit_pl.data.manifest import Split
    from maskgit_pl.data.samples import Sample, Source

__all__ = ["Dataset", "FashionMNIST", "IdxFiles", "how_to_get", "public_datasets", "run_command"]

_CONTRIB = ("maskgit_pl.contrib.blue_marble", "maskgit_pl.contrib.emoji")  # each with ``DATASETS``
_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_FILES = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
# SHA-256 of images and labels, decompressed, since mirrors and Debian compress them differently
_HASHES: dict[Split, str] = {
    "train": "d9ef4273af5c2e360155dad0c06bd939447bf37a6620db007d69fc79e4732045",
    "val": "30214f3fe91405cb8ea60b11ecf0914a65dd6a6ca8e13c13a62eb434f2d9fe56",
}
_LARGEST = 47_040_016  # bytes of the largest file, decompressed
_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # checked by SHA-256, so http is enough
_MIRROR_SECONDS = 5  # without an answer; a blocked network gives no error
_APT_SECONDS = 120
_PACKAGE = "dataset-fashion-mnist"
_MAX_IDX_BYTES = 2**30  # of a decompressed file; EMNIST's largest has 640 MB
_IDX_SPLITS: dict[Split, str] = {"train": "train", "val": "t10k"}
_log = logging.getLogger(__name__)


class Dataset(ABC):
    """A public data set.

    Attributes:
        name: Name for the command line and for recipes.
        contents: Number and size of the images, classes and licence, in a few words.
    """

    name: str
    contents: str

    @abstractmethod
    def fetch(self, raw: Path) -> Path:
        """Downloads the files, unless they are there, and returns the path that ``open`` takes.

        Args:
            raw: Folder that keeps the downloaded files.

        Raises:
            FileNotFoundError: if no source can be reached. The message names the ways out.
        """

    @abstractmethod
    def open(self, path: Path) -> Source:
        """Checks the files and opens them.

        Raises:
            ValueError: if a file is missing or is not the known one.
        """


@cache
def public_datasets() -> dict[str, Dataset]:
    """Returns the data sets by name."""
    others = [dataset for name in _CONTRIB for dataset in import_module(name).DATASETS]
    return {dataset.name: dataset for dataset in (FashionMNIST(), *others)}


def how_to_get(name: str, folder: Path) -> str:
    """Returns the commands that make a data folder, for the error that it is missing.

    Args:
        name: Name of the data set of a run, a public one or another.
        folder: The data folder.
    """
    fetch = f"`maskgit data fetch {name} --out {folder}` or " if name in public_datasets() else ""
    return f"make it with {fetch}`maskgit data make IMAGES --out {folder}`"


class FashionMNIST(Dataset):
    """Fashion-MNIST, the default data: 60,000 + 10,000 product photos, 28 x 28 grey, 10 classes (MIT licence).

    Sources of the download: the mirror that torchvision uses, and the Debian package dataset-fashion-mnist.

    Source: Xiao, Rasul, Vollgraf, arXiv:1708.07747.
    """

    name = "fashion-mnist"
    contents = "60,000 + 10,000 product photos, 28 x 28 grey, 10 classes (MIT)"

    def fetch(self, raw: Path) -> Path:
        """Downloads the four files from the first source that has all of them, and returns their folder."""
        with suppress(ValueError):
            self.open(raw)
            return raw
        failures = []
        for title, source in (("its mirror", _from_mirror), ("the Debian package", _from_debian)):
            _log.info("Fashion-MNIST: trying %s", title)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    source(Path(folder))
                    self.open(Path(folder))
                except (OSError, http.client.HTTPException, ValueError) as error:
                    failures.append(f"{title}: {' '.join(str(error).split())}")
                    continue
                raw.mkdir(parents=True, exist_ok=True)
                for name in _FILES:
                    shutil.copyfile(Path(folder, name), raw / name)
                return raw
        raise FileNotFoundError(
            "Fashion-MNIST: no source answered (" + "; ".join(failures) + "). Connect to a network or an apt mirror; "
            f"or copy the four files {', '.join(_FILES)} (or unpacked) from another machine and pass --source FOLDER; "
            "or train on your own images: `maskgit data make FOLDER --out DIR`"
        )

    def open(self, path: Path) -> Source:
        """Opens the four files and checks their content."""
        source = IdxFiles(path, classes=_CLASSES)
        if source.hashes != _HASHES:
            raise ValueError(
                f"source {printable(path)} must have the four files of Fashion-MNIST, got other images or labels"
            )
        return source


class IdxFiles:
    """The four IDX files of MNIST, Fashion-MNIST and similar data, plain or gzipped; images become PNG.

    Samples keep the order of the files: sample i of val is image i of the official test set.

    Args:
        folder: Folder of ``train-images-idx3-ubyte[.gz]``, ``train-labels-idx1-ubyte[.gz]`` and the t10k pair.
        classes: Class names; None names the classes by their numbers.

    Raises:
        ValueError: if a file is missing, is not IDX, is larger than 1 GiB decompressed, or has another length
            than its header states.
    """

    left_out: tuple[str, ...] = ()
    has_splits = True

    def __init__(self, folder: Path, *, classes: Sequence[str] | None = None) -> None:
        from maskgit_pl.data.samples import number_classes

        self.folder = folder
        self._images: dict[Split, npt.NDArray[np.uint8]] = {}
        self._labels: dict[Split, npt.NDArray[np.uint8]] = {}
        self.hashes: dict[Split, str] = {}  # SHA-256 of images and labels, decompressed
        for split, name in _IDX_SPLITS.items():
            digest = hashlib.sha256()
            images = self._images[split] = _read_idx(folder, f"{name}-images?idx3-ubyte*", 3, digest)
            labels = self._labels[split] = _read_idx(folder, f"{name}-labels?idx1-ubyte*", 1, digest)
            self.hashes[split] = digest.hexdigest()
            if len(images) != len(labels):
                raise ValueError(
                    f"source {printable(folder)}: {split} must have {len(images)} labels for its images, got "
                    f"{len(labels)}"
                )
        largest = {int(labels.max()): f"source {printable(folder)}:{split}" for split, labels in self._labels.items()}
        self.classes, _ = number_classes(largest, classes, label_field="label")

    @property
    def counts(self) -> dict[Split, int]:
        """The number of images of each split."""
        return {split: len(labels) for split, labels in self._labels.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and the hash of each split."""
        return {"kind": "idx", "classes": list(self.classes), "files": self.hashes}

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Yields the images of a split at some places as PNG."""
        import torch

        from maskgit_pl.data import images, samples

        for number in places:
            pixels = torch.from_numpy(self._images[split][number].copy())[None]  # (1, H, W); the bytes are read-only
            label = int(self._labels[split][number])
            yield samples.Sample(images.encode_png(pixels), "png", label, f"{self.folder}:{split} image {number}")


def _read_idx(folder: Path, pattern: str, dimensions: int, digest: Any) -> npt.NDArray[np.uint8]:
    """Reads an IDX file, plain or gzipped, of 3 (images) or 1 (labels) dimensions, and updates a digest with its bytes.

    IDX: two zero bytes, type 8 (uint8), number of dimensions, each dimension as big-endian uint32, then the
    values. No more bytes are read than the header states, since a small gzip file may expand to any size.
    """
    import numpy as np

    if (path := min(folder.glob(pattern), default=None)) is None:
        raise ValueError(f"source {printable(folder)} must have the four IDX files, got no {pattern}")
    name = f"IDX file {printable(path)}"
    try:
        with open(open_regular(path), "rb") as file:
            is_packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_packed else open(path, "rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist()) if len(header) == 4 + 4 * dimensions else ()
            count = math.prod(shape)
            if header[:4] != bytes((0, 0, 8, dimensions)) or not shape or not 0 < count <= _MAX_IDX_BYTES:
                limit = size_text(_MAX_IDX_BYTES)
                raise ValueError(f"{name} must hold 1 byte to {limit} in {dimensions} dimensions, got {header[:16]!r}")
            values = stream.read(count + 1)  # one more, to notice a file that is too long
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} must be a complete file, got: {error}") from error
    if len(values) != count:
        got = "more" if len(values) > count else str(len(values))
        raise ValueError(f"{name} must hold the {count} values of {shape}, got {got}")
    digest.update(header)
    digest.update(values)
    return np.frombuffer(values, np.uint8).reshape(shape)


def _from_mirror(folder: Path) -> None:
    """Downloads the files from the mirror that torchvision uses."""
    for name in _FILES:
        with urllib.request.urlopen(f"{_MIRROR}{name}", timeout=_MIRROR_SECONDS) as answer:
            (folder / name).write_bytes(answer.read(_LARGEST))


def _from_debian(folder: Path) -> None:
    """Downloads the files from Debian's package, with lists and cache in a temporary folder, not in the system's."""
    for name in ("apt-get", "dpkg-deb"):
        if shutil.which(name) is None:
            raise FileNotFoundError(f"{name} is not installed (not a Debian or Ubuntu system?)")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    options = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}/cache", "Debug::NoLocking=1"]
    options += ["Acquire::http::Timeout=5", "Acquire::https::Timeout=5", "Acquire::Retries=0"]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    for command in ([*apt, "update"], [*apt, "download", _PACKAGE]):
        run_command(command, folder=folder, seconds=_APT_SECONDS)
    package = next(folder.glob("*.deb"))
    run_command(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], folder=folder, seconds=_APT_SECONDS)
    for path in (folder / "unpacked/usr/share/datasets/fashion-mnist").iterdir():
        path.rename(folder / path.name)


def run_command(command: Sequence[str], *, folder: Path, seconds: float) -> None:
    """Runs a command in a folder.

    Raises:
        OSError: if it fails or takes longer than ``seconds``. The end of its output is the message.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{Path(command[0]).name}: no answer in {seconds:g} s") from error
    if done.returncode:
        output = " ".join(done.stderr.split())[-300:]
        raise OSError(f"{' '.join([Path(command[0]).name, *command[-2:]])}: {output}")

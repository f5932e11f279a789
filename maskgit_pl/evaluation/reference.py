"""Statistics and features of real images, which generated images are compared with.

They are computed once per network and kept in files, or read from a file in the layout of ADM's evaluator:
``arr_0`` (n, H, W, 3) uint8 holds images and ``arr_1`` (n,) integers their labels; ``mu`` and ``sigma`` are
the statistics of Inception's pooled features, ``mu_s`` and ``sigma_s`` those of its spatial features. Such
files come from strangers: only plain numbers are read, never pickled objects.

Source: openai/guided-diffusion, evaluations/README.md and evaluator.py.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.checks import plain_size
from maskgit_pl.data import Batch, InOrder, ShardData, ShuffledStream
from maskgit_pl.data.loader import make_loader
from maskgit_pl.data.manifest import ShardReader, Split, load_manifests
from maskgit_pl.data.order import Order
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.extractors import (
    BATCH_SIZE,
    Extractor,
    ImageFeatures,
    extract,
    iter_image_batches,
    iter_row_batches,
)
from maskgit_pl.evaluation.ledger import digest_of, shorten_digest
from maskgit_pl.files import open_zip, sha256_of, write_atomically
from maskgit_pl.text import printable, size_text

_POOLED, _SPATIAL = 2048, 2023  # number of Inception's features that the statistics of ADM's files have
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_LOCAL_HEADER = 30  # bytes of a zip member's local header, before its name
_MAX_HEADER = 2**16  # bytes of an array's header; numpy parses at most 10,000 of them
_MAX_MEMBERS = 100  # arrays per file
# A compressed array may expand to 100 times the size of the file (images reach 10 times), or to 64 MiB.
_MAX_RATIO = 100
_ALWAYS_EXPANDED = 2**26
_log = logging.getLogger(__name__)


class ArrayFile:
    """The arrays of an ``.npz`` file of a stranger; objects are never unpickled.

    Args:
        path: Path of the file.
        thing: Kind of the file for error messages, e.g. ``"reference"``.
    """

    def __init__(self, path: Path | str, *, thing: str) -> None:
        self.path, self.thing = Path(path), thing
        if not self.path.is_file():
            raise ValueError(f"{thing} {path} must be an existing .npz file")
        with (
            self._refusing("the file"),
            open(self.path, "rb") as stream,
            open_zip(stream, max_entries=_MAX_MEMBERS) as archive,
        ):
            self._members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def error(self, name: str, why: str) -> ValueError:
        """Returns an error that names file and array."""
        return ValueError(f"{self.thing} {printable(str(self.path))}: array {name!r}: {why}")

    def read(self, name: str, shape: tuple[int | None, ...], numbers: type[Any]) -> npt.NDArray[Any]:
        """Reads an array; an uncompressed one is memory-mapped.

        Args:
            name: Name of the array, without ``.npy``.
            shape: Required shape; None stands for any size >= 1.
            numbers: Required kind of numbers, such as ``np.uint8``, or ``np.floating`` for any precision.
        """
        if name not in self._members:
            raise self.error(name, f"it is missing; the file holds {', '.join(map(printable, self._members))}")
        info = self._members[name]
        most = max(_ALWAYS_EXPANDED, _MAX_RATIO * self.path.stat().st_size)  # zipfile never reads more than file_size
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the others expand without a limit
            raise self.error(name, f"it must be stored or deflated, got compression type {info.compress_type}")
        if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > most:
            raise self.error(
                name, f"it must expand to at most {size_text(most)}, got {size_text(info.file_size)}; use np.savez"
            )
        with self._refusing(f"array {name!r}"), zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
            stream = io.BytesIO(member.read(_MAX_HEADER))  # the length that a header claims may be huge
            stored_shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
            header = stream.tell()
        fits = (
            size >= 1 if expected is None else size == expected
            for size, expected in zip(stored_shape, shape, strict=False)
        )
        if len(stored_shape) != len(shape) or not all(fits):
            expected = ", ".join("n" if size is None else str(size) for size in shape)
            raise self.error(name, f"the shape must be ({expected}), got {stored_shape}")
        # Objects, which are pickled, records and text are of other kinds.
        if not np.issubdtype(dtype, numbers):
            raise self.error(name, f"the dtype must be {numbers.__name__}, got {dtype}")
        if header + math.prod(stored_shape) * dtype.itemsize != info.file_size:
            raise self.error(name, f"its size does not match its shape {stored_shape}; the file is damaged")
        with self._refusing(f"array {name!r}"):
            if info.compress_type == zipfile.ZIP_STORED:
                # The member is a plain .npy file within the zip file, so that its values can be mapped. Its name and an
                # extra field follow its local header; their lengths may differ from those of the central directory.
                with open(self.path, "rb") as file:
                    file.seek(info.header_offset)
                    name_length, extra_length = struct.unpack("<26xHH", file.read(_LOCAL_HEADER))
                start = info.header_offset + _LOCAL_HEADER + name_length + extra_length + header
                return np.memmap(self.path, dtype, "r", start, stored_shape, "F" if is_fortran else "C")
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                return np.lib.format.read_array(member, allow_pickle=False)

    @contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Turns any error of zipfile, zlib or numpy, which a damaged file may raise, into a ``ValueError``."""
        try:
            yield
        except Exception as error:
            # Python's parser, which numpy reads headers with, gives no text for some.
            why = printable(error) or type(error).__name__
            raise ValueError(f"{self.thing} {printable(str(self.path))}: {what} cannot be read: {why}") from error


@dataclass(frozen=True)
class SampleFile:
    """The images of a file, read in parts."""

    images: npt.NDArray[np.uint8]  # (n, H, W, 3), memory-mapped if the file is not compressed
    labels: Tensor | None  # (n,) int64
    channels: int  # 1 or 3: grey images have three equal ones in the file

    def read(self, rows: range | Tensor) -> Tensor:
        """Returns the (b, C, H, W) uint8 images of a range of rows, or of (b,) int64 rows in any order."""
        chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else rows.numpy()
        return rearrange(torch.from_numpy(np.array(self.images[chosen])), "b h w c -> b c h w")[:, : self.channels]


def open_samples(file: ArrayFile | Path | str, *, channels: int = 3) -> SampleFile:
    """Opens the images of a file, and their labels if there are any."""
    arrays = file if isinstance(file, ArrayFile) else ArrayFile(file, thing="samples")
    images = arrays.read("arr_0", (None, None, None, 3), np.uint8)
    labels = None
    if "arr_1" in arrays:
        labels = torch.from_numpy(arrays.read("arr_1", (len(images),), np.integer).astype(np.int64))
    return SampleFile(images, labels, channels)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64, unbiased

    @classmethod
    def from_features(cls, features: Tensor) -> Statistics:
        """Computes mean and covariance of (n, D) float features, n >= 2."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (n, D) with n >= 2 for a covariance, got {tuple(features.shape)}")
        mean = features.double().mean(0)
        centred = features.double() - mean  # (n, D)
        return cls(mean, centred.T @ centred / (len(features) - 1))


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images in one network."""

    pooled: Statistics
    spatial: Statistics | None  # None if the network has no spatial features
    features: ImageFeatures | None  # pooled features and logits of each image; None if only statistics are known
    digest: str = ""  # SHA-256 in hex of the file, or of the settings that determine the pixels of the split
    split: str = ""  # that the images are from, or empty
    file: str = ""  # name of the file that they are from, or empty

    @classmethod
    def from_features(cls, features: ImageFeatures) -> Reference:
        """Returns the reference of at least two images; the spatial features are kept as statistics only."""
        spatial = None if features.spatial is None else Statistics.from_features(features.spatial)
        return cls(Statistics.from_features(features.pooled), spatial, replace(features, spatial=None))


def draw_images(data: ShardData, split: Split, num_images: int | None = None) -> tuple[Order, int]:
    """Returns an order that begins with random samples of a split, the same in every call, and their number.

    If there are not more samples, or for None, these are all samples in their own order.
    """
    available = data.summary.samples[split]
    if num_images is None or num_images >= available:
        return InOrder(available), available
    return ShuffledStream(available, seed=0), num_images


def iter_real_batches(
    data: ShardData,
    split: Split,
    *,
    num_images: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """Yields this rank's batches of random real images, see ``draw_images``; the ranks take whole batches in turn."""
    order, count = draw_images(data, split, num_images)
    yield from make_loader(
        data.batches(split, order),
        cast("Sampler[range]", list(iter_row_batches(count, batch_size=batch_size))),  # a loader takes any iterable
        num_workers=data.config.num_workers,
        unreadable_budget=data.config.unreadable_budget,
    )


def read_real_labels(data: ShardData) -> Tensor:
    """Reads the (n,) int64 classes of the val split in order, from the index only."""
    reader = ShardReader(load_manifests(data.config.path, ("val",))["val"])
    return torch.from_numpy(reader.labels(np.arange(len(reader))))


def obtain_references(
    folder: Path,
    data: ShardData,
    extractors: Sequence[Extractor],
    *,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, Reference]:
    """Returns the references of the val split by label, read from ``folder`` if possible, else computed and written.

    Several data sets and networks may share the folder.
    """
    batches = ((batch.content, batch.position) for batch in iter_real_batches(data, "val"))
    origin = {"digest": split_digest(data, "val"), "split": "val"}
    return _obtain(folder, _split_key(data, "val"), extractors, batches, origin, on_images)


def read_references(
    path: Path | str,
    extractors: Sequence[Extractor],
    *,
    folder: Path,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, Reference]:
    """Returns the references of a file in the layout of ADM, by label of the network.

    Statistics in the file belong to Inception and give FID and sFID; images in the file give all metrics.

    Args:
        path: Path such as ``VIRTUAL_imagenet256_labeled.npz``.
        extractors: Networks with different labels.
        folder: Folder that keeps the features of the file's images.
        on_images: Called after each batch with its number of images.
    """
    file = ArrayFile(path, thing="reference")
    origin = {"digest": sha256_of(file.path), "file": file.path.name}
    statistics = _read_inception_statistics(file, origin)
    # A file without images has only Inception's statistics, which serve no other network.
    if "arr_0" not in file and statistics and {extractor.label for extractor in extractors} == {"inception"}:
        return {"inception": statistics}
    samples = open_samples(file)
    batches = iter_image_batches(samples.read, len(samples.images))
    references = _obtain(folder, {"data": origin["digest"], "split": "file"}, extractors, batches, origin, on_images)
    if statistics and "inception" in references:
        # The published statistics take precedence over those of the images in the file.
        of_images = references["inception"]
        spatial = statistics.spatial or of_images.spatial
        references["inception"] = replace(of_images, pooled=statistics.pooled, spatial=spatial)
    return references


def split_digest(data: ShardData, split: Split) -> str:
    """Returns the SHA-256 in hex of the settings that determine the pixels of a split."""
    return digest_of(_split_key(data, split))


def _split_key(data: ShardData, split: Split) -> dict[str, Any]:
    return {
        "data": data.summary.fingerprint,
        "split": split,
        "num_images": None,  # all
        "image_size": plain_size(data.config.image_size),
        "in_channels": data.config.in_channels,
    }


def _obtain(
    folder: Path,
    key: Mapping[str, Any],
    extractors: Sequence[Extractor],
    batches: Iterable[tuple[Tensor, Tensor]],
    origin: Mapping[str, Any],
    on_images: Callable[[int], object],
) -> dict[str, Reference]:
    """Returns references that are read from the folder if possible, else computed in one pass over the batches.

    ``key`` holds the settings that determine the pixels of the images; ``batches`` are those of this rank.
    """
    files = {}
    for each in extractors:
        whole_key = {**key, "weights": each.digest, "knows_classes": each.knows_classes}
        name = re.sub("[^A-Za-z0-9_.]+", "-", f"{key['split']}-{each.label}")
        files[each.label] = folder / f"{name}-{shorten_digest(digest_of(whole_key))}.npz"
    # Extraction is collective: all ranks compute what any of them does not have.
    kept = on_all_ranks(lambda: [label for label, file in files.items() if file.exists()])
    found = {label: _read(label, file) for label, file in files.items() if all(label in labels for labels in kept)}
    missing = [each for each in extractors if each.label not in found]
    features = extract(missing, batches, on_images=on_images) if missing else {}
    made = {label: Reference.from_features(each) for label, each in features.items()}

    def write() -> None:
        for label, reference in made.items() if rank_and_world()[0] == 0 else ():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with write_atomically(files[label]) as stream:
                    np.savez(stream, **_to_arrays(reference))
            except OSError as error:  # such as a run folder of somebody else
                _log.warning("%s cannot be written (%s); it is computed again each time", files[label], error)

    on_all_ranks(write)
    return {label: replace((found | made)[label], **origin) for label in files}


def _to_arrays(reference: Reference) -> dict[str, Any]:
    features = reference.features
    assert features is not None
    tensors = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance, "pooled": features.pooled}
    if reference.spatial is not None:
        tensors |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if features.logits is not None:
        tensors["logits"] = features.logits
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _read(label: str, file: Path) -> Reference:
    try:
        with file.open("rb") as stream:
            tensors = {name: torch.from_numpy(array) for name, array in np.load(stream).items()}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and it is made again") from error
    spatial = Statistics(tensors["mu_s"], tensors["sigma_s"]) if "mu_s" in tensors else None
    features = ImageFeatures(label, tensors["pooled"], tensors.get("logits"))
    return Reference(Statistics(tensors["mu"], tensors["sigma"]), spatial, features)


def _read_inception_statistics(file: ArrayFile, origin: Mapping[str, Any]) -> Reference | None:
    if not any(name in file for name in ("mu", "sigma", "mu_s", "sigma_s")):
        return None
    spatial = _read_statistics(file, "_s", _SPATIAL) if "mu_s" in file or "sigma_s" in file else None
    return Reference(_read_statistics(file, "", _POOLED), spatial, None, **origin)


def _read_statistics(file: ArrayFile, suffix: str, width: int) -> Statistics:
    mean = file.read(f"mu{suffix}", (width,), np.floating)
    covariance = file.read(f"sigma{suffix}", (width, width), np.floating)
    return Statistics(*(torch.from_numpy(np.array(array, np.float64)) for array in (mean, covariance)))

"""Statistics and features of real images, which generated images are compared with.

They are computed once per network and kept in files, or read from a file in the layout of ADM. ``opening`` opens
them for the ``Evaluator``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.checks import plain_size
from maskgit_pl.data import Batch, InOrder, ShardData, ShuffledStream
from maskgit_pl.data.batches import ImageBatches, make_loader
from maskgit_pl.data.manifest import Split, load_manifest
from maskgit_pl.data.order import Order
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.features import (
    BATCH_SIZE,
    Extractor,
    ImageFeatures,
    digest_of,
    extract,
    iter_image_batches,
    iter_row_batches,
    shorten_digest,
)
from maskgit_pl.evaluation.npz import ArrayFile, open_samples
from maskgit_pl.files import sha256_of, write_atomically
from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "Reference",
    "ReferenceOrigin",
    "Statistics",
    "draw_order",
    "iter_real_batches",
    "obtain_references",
    "read_real_labels",
    "read_real_vectors",
    "read_references",
]

_FORMAT, _VERSION = "maskgit_pl.reference", 1
_POOLED, _SPATIAL = 2048, 2023  # number of Inception's features that the statistics of ADM's files have
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of features.

    Args:
        mean: (D,) float64.
        covariance: (D, D) float64, unbiased.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def from_features(cls, features: Tensor) -> Statistics:
        """Computes mean and covariance.

        Args:
            features: (n, D) float, n >= 2.

        Raises:
            ValueError: if ``features`` is not a matrix, or n < 2.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (n, D) with n >= 2 for a covariance, got {tuple(features.shape)}")
        mean = features.double().mean(0)
        centred = features.double() - mean  # (n, D)
        return cls(mean, centred.T @ centred / (len(features) - 1))


@dataclass(frozen=True)
class ReferenceOrigin:
    """The source of a reference: a split of a data set, or a file.

    Args:
        digest: SHA-256 in hex of the file, or of the settings that determine the pixels of the split.
        split: Name of the split; empty for a file.
        file: Name of the file; empty for a split.
    """

    digest: str
    split: str = ""
    file: str = ""

    @classmethod
    def from_split(cls, data: ShardData, split: Split, *, num_images: int | None = None) -> ReferenceOrigin:
        """Returns the origin of the first ``num_images`` images of a split; None is all of them."""
        return cls(digest_of(_split_key(data, split, num_images)), split=split)


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images in one network.

    Args:
        label: Label of the network.
        pooled: Statistics of the pooled features.
        spatial: Statistics of the spatial features; None if there are none.
        features: Pooled features and logits of each image; None if only statistics are known.
        origin: Source of the images; None if it is not recorded.
    """

    label: str
    pooled: Statistics
    spatial: Statistics | None
    features: ImageFeatures | None
    origin: ReferenceOrigin | None = None

    @classmethod
    def from_features(cls, features: ImageFeatures) -> Reference:
        """Returns the reference of images; the spatial features are kept as statistics only.

        Args:
            features: Features of at least two images.

        Raises:
            ValueError: if there are fewer than two images.
        """
        spatial = None if features.spatial is None else Statistics.from_features(features.spatial)
        return cls(features.label, Statistics.from_features(features.pooled), spatial, replace(features, spatial=None))


def draw_order(available: int, count: int) -> Order:
    """Returns an order whose first ``count`` positions are random samples, the same in every call.

    Args:
        available: Number of samples of the split.
        count: Number of samples to draw. If it is not less than ``available``, the samples keep their own order.
    """
    return InOrder(available) if count >= available else ShuffledStream(available, seed=0)


def iter_real_batches(
    data: ShardData,
    split: Split,
    *,
    num_images: int | None = None,
    shuffled: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """Yields this rank's batches of real images; whole batches are assigned to the ranks in turn.

    Args:
        data: The real images.
        split: Split of the images.
        num_images: Maximum number of images of all ranks; None is all.
        shuffled: True for images drawn at random, see ``draw_order``; False for the first ones.
        batch_size: Images per batch.

    Raises:
        ValueError: if the data are tokens.
    """
    available = data.summary.samples[split]
    count = available if num_images is None else min(num_images, available)
    dataset = data.batches(split, draw_order(available, count) if shuffled else InOrder(available))
    if not isinstance(dataset, ImageBatches):
        raise ValueError(f"data {data.config.path} must be images to measure distances, got tokens")
    yield from make_loader(
        dataset,
        cast("Sampler[range]", list(iter_row_batches(count, batch_size=batch_size))),  # a loader takes any iterable
        num_workers=data.config.num_workers,
        unreadable_budget=data.config.unreadable_budget,
    )


def read_real_vectors(data: ShardData, pipe: MaskGIT, *, num_images: int) -> Tensor | None:
    """Returns the vectors of the val images that ``Evaluator.read_real_images`` returns.

    Args:
        data: The real images.
        pipe: The model.
        num_images: Number of images; all of the split if it has fewer.

    Returns:
        (n, C) float32 on the model's device; None for a model without vectors.
    """
    if not pipe.transformer.network.config.condition_dim:
        return None
    samples = data.summary.samples["val"]
    index = draw_order(samples, num_images)(range(min(num_images, samples))).index
    return data.read_vectors("val", index.numpy()).to(pipe.device)


def read_real_labels(data: ShardData) -> Tensor:
    """Reads the (n,) int64 classes of the val split in order, from the index only."""
    reader = ShardReader(load_manifest(data.config.path, "val"))
    return torch.from_numpy(reader.labels(np.arange(len(reader))))


def obtain_references(
    folder: Path,
    data: ShardData,
    extractors: Sequence[Extractor],
    *,
    split: Split = "val",
    num_images: int | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, Reference]:
    """Returns the references of a split, read from ``folder`` if possible, else computed and written there.

    Args:
        folder: Folder of the reference files; several data sets and networks may share it.
        data: The real images.
        extractors: Networks with different labels.
        split: Split of the images.
        num_images: Number of images from the beginning of the split; None is all.
        on_images: Called after each batch with its number of images, for a progress bar.

    Returns:
        References by label of the network, the same on every rank.

    Raises:
        ValueError: if there are fewer than two images, or the data are tokens.
    """

    def features(missing: Sequence[Extractor]) -> dict[str, ImageFeatures]:
        batches = iter_real_batches(data, split, num_images=num_images)
        return extract(missing, ((batch.content, batch.position) for batch in batches), on_images=on_images)

    origin = ReferenceOrigin.from_split(data, split, num_images=num_images)
    return _obtain(folder, _split_key(data, split, num_images), extractors, features, origin)


def read_references(
    path: Path | str,
    extractors: Sequence[Extractor],
    *,
    folder: Path | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, Reference]:
    """Returns the references of a file in the layout of ADM.

    Statistics in the file belong to Inception and give FID and sFID; images in the file give all metrics.

    Args:
        path: Path such as ``VIRTUAL_imagenet256_labeled.npz``.
        extractors: Networks with different labels.
        folder: Folder that keeps the features of the file's images, see ``obtain_references``; None keeps nothing.
        on_images: Called after each batch with its number of images, for a progress bar.

    Returns:
        References by label of the network, the same on every rank.

    Raises:
        ValueError: if the file is missing, damaged or has another layout, or lacks the arrays that a network needs.
    """
    file = ArrayFile(path, thing="reference")
    origin = ReferenceOrigin(sha256_of(file.path), file=file.path.name)
    statistics = _read_inception_statistics(file)
    # A file without images has only Inception's statistics, which serve no other network.
    if "arr_0" not in file:
        if statistics is None:
            raise file.make_error("mu", "the file must have statistics (mu, sigma) or images (arr_0), got neither")
        for extractor in extractors:
            if extractor.label != "inception":
                raise file.make_error(
                    "arr_0",
                    f"the file must have images for the network {extractor.label!r}, got only Inception's statistics",
                )
        return {extractor.label: replace(statistics, origin=origin) for extractor in extractors}
    samples = open_samples(file)

    def features(missing: Sequence[Extractor]) -> dict[str, ImageFeatures]:
        return extract(missing, iter_image_batches(samples.read, len(samples)), on_images=on_images)

    made = _obtain(folder, {"data": origin.digest, "split": "file"}, extractors, features, origin)
    if statistics is None or "inception" not in made:
        return made
    # The published statistics take precedence over those of the images in the file.
    spatial = statistics.spatial if statistics.spatial is not None else made["inception"].spatial
    return {**made, "inception": replace(made["inception"], pooled=statistics.pooled, spatial=spatial)}


def _split_key(data: ShardData, split: Split, num_images: int | None) -> dict[str, Any]:
    """Returns the settings that determine the pixels of a split."""
    return {
        "data": data.summary.fingerprint,
        "split": split,
        "num_images": num_images,
        "image_size": plain_size(data.config.image_size),
        "in_channels": data.config.in_channels,
    }


def _obtain(
    folder: Path | None,
    key: Mapping[str, Any],
    extractors: Sequence[Extractor],
    features: Callable[[Sequence[Extractor]], dict[str, ImageFeatures]],
    origin: ReferenceOrigin,
) -> dict[str, Reference]:
    """Returns references from the folder, and computes the missing ones in one pass over the images.

    1. Each rank reads the files of the folder.
    2. A reference is missing if any rank could not read it; all ranks compute the missing ones together.
    3. The first rank writes the new ones.

    Args:
        folder: Folder of the reference files; None for no files.
        key: Settings that determine the pixels of the images.
        extractors: Networks with different labels.
        features: Extracts the features of all images with some of the networks.
        origin: Source of the images.
    """
    # The weights are part of the key: another network with the same label has another file.
    keys = {
        each.label: {**key, "network": each.label, "weights": each.digest, "knows_classes": each.knows_classes}
        for each in extractors
    }
    found: dict[str, Reference] = {}

    def read() -> list[str]:
        for label, own_key in keys.items():
            if folder is not None and (reference := _read(_cache_path(folder, own_key), own_key)) is not None:
                found[label] = reference
        return list(found)

    def write() -> None:
        if folder is not None and rank_and_world()[0] == 0:
            for label, reference in made.items():
                _write(_cache_path(folder, keys[label]), keys[label], reference)

    # 1.
    readable = on_all_ranks(read)
    # 2. A file may be readable on some ranks only; extraction is collective, so that all must agree on what is missing.
    missing = [extractor for extractor in extractors if not all(extractor.label in labels for labels in readable)]
    made = (
        {label: Reference.from_features(extracted) for label, extracted in features(missing).items()} if missing else {}
    )
    # 3.
    on_all_ranks(write)
    return {label: replace(made.get(label) or found[label], origin=origin) for label in keys}


def _cache_path(folder: Path, key: Mapping[str, Any]) -> Path:
    # The label is for people; the digest of the key makes the name unique.
    network = re.sub("[^A-Za-z0-9_.]+", "-", key["network"])
    return folder / f"{key['split']}-{network}-{shorten_digest(digest_of(key))}.npz"


def _encode_key(key: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": _FORMAT, "version": _VERSION, **key}, sort_keys=True).encode()


def _write(path: Path, key: Mapping[str, Any], reference: Reference) -> None:
    features = reference.features
    assert features is not None  # only references with features are written
    arrays: dict[str, Tensor] = {
        "key": torch.frombuffer(bytearray(_encode_key(key)), dtype=torch.uint8),
        "mu": reference.pooled.mean,
        "sigma": reference.pooled.covariance,
        "pooled": features.pooled,
    }
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if features.logits is not None:
        arrays["logits"] = features.logits
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        np.savez(file, **cast("dict[str, Any]", {name: tensor.numpy() for name, tensor in arrays.items()}))


def _read(path: Path, key: Mapping[str, Any]) -> Reference | None:
    """Reads a reference file; returns None if it is missing, and warns if it is damaged or has another key."""
    if not path.exists():
        return None
    try:
        file = ArrayFile(path, thing="reference")
        file.check()  # memory-mapped arrays have no other check
        if bytes(file.read("key", (None,), kinds="uint8")) != _encode_key(key):
            raise file.make_error("key", "it belongs to other images or another network")
        pooled = _read_tensor(file, "pooled", (None, None))
        logits = _read_tensor(file, "logits", (len(pooled), None)) if "logits" in file else None
        spatial = _read_statistics(file, "_s", None) if "mu_s" in file else None
        return Reference(
            key["network"],
            _read_statistics(file, "", pooled.shape[1]),
            spatial,
            ImageFeatures(key["network"], pooled.float(), None if logits is None else logits.float()),
        )
    except ValueError as error:
        _log.warning("%s; it will be computed again", error)
        return None


def _read_inception_statistics(file: ArrayFile) -> Reference | None:
    if not any(name in file for name in ("mu", "sigma", "mu_s", "sigma_s")):
        return None
    spatial = _read_statistics(file, "_s", _SPATIAL) if "mu_s" in file or "sigma_s" in file else None
    return Reference("inception", _read_statistics(file, "", _POOLED), spatial, None)


def _read_statistics(file: ArrayFile, suffix: str, width: int | None) -> Statistics:
    mean = _read_tensor(file, f"mu{suffix}", (width,))
    covariance = _read_tensor(file, f"sigma{suffix}", (len(mean), len(mean)))
    # A tolerance, because files may hold float32 statistics.
    if not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6) or bool((covariance.diagonal() < 0).any()):
        raise file.make_error(f"sigma{suffix}", "it must be a covariance: symmetric, with a diagonal >= 0")
    return Statistics(mean, covariance)


def _read_tensor(file: ArrayFile, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """Reads a copy of an array of floating-point numbers as float64.

    Raises:
        ValueError: see ``ArrayFile.read``; also if a value is non-finite.
    """
    array: npt.NDArray[np.float64] = np.array(file.read(name, shape, kinds="f"), dtype=np.float64)
    if not np.isfinite(array).all():
        raise file.make_error(name, "all values must be finite")
    return torch.from_numpy(array)

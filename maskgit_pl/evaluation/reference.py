"""The real images' side of every distance: statistics and features, made once and kept, or read from ADM's files."""

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

from maskgit_pl.data import Batch, InOrder, ShardData, ShuffledStream
from maskgit_pl.data.batches import ImageBatches, make_loader
from maskgit_pl.data.order import Order
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.evaluation.digests import digest_of, shorten_digest
from maskgit_pl.evaluation.features import (
    BATCH_SIZE,
    Extractor,
    ImageFeatures,
    extract,
    iter_image_batches,
    iter_row_batches,
)
from maskgit_pl.evaluation.npz import ArrayFile, open_samples
from maskgit_pl.files import sha256_of, write_atomically
from maskgit_pl.shards.manifest import Split, load_manifest
from maskgit_pl.shards.reader import ShardReader

__all__ = [
    "Reference",
    "ReferenceOrigin",
    "Statistics",
    "draw_order",
    "iter_real_batches",
    "obtain_references",
    "read_real_labels",
    "read_references",
]

_FORMAT, _VERSION = "maskgit_pl.reference", 1
_POOLED, _SPATIAL = 2048, 2023  # numbers of Inception's features, which foreign statistics are of
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
        """Computes the statistics of (n, D) features, n at least 2.

        Raises:
            ValueError: if there are fewer than two.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"features: (n, D) of at least 2 images are needed for a covariance, got {tuple(features.shape)}"
            )
        mean = features.double().mean(0)
        centred = features.double() - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


@dataclass(frozen=True)
class ReferenceOrigin:
    """The images or statistics that a reference was made from.

    Args:
        digest: sha256, hexadecimal: of a file, or of what decides the pixels of a split.
        split: Name of the split; empty for a file.
        file: Name of the file; empty for a split.
    """

    digest: str
    split: str = ""
    file: str = ""

    @classmethod
    def from_split(cls, data: ShardData, split: Split, *, num_images: int | None = None) -> ReferenceOrigin:
        """Returns the origin of a split's first ``num_images`` images, or of all of them."""
        return cls(digest_of(_split_key(data, split, num_images)), split=split)


@dataclass(frozen=True)
class Reference:
    """Real images as one network sees them.

    Args:
        label: Of the network.
        pooled: Statistics of the pooled features.
        spatial: Of the spatial ones; None where there are none.
        features: Pooled features and logits themselves; None where statistics are all that is known.
        origin: The images they are of; None where nobody asks, as for features of an experiment.
    """

    label: str
    pooled: Statistics
    spatial: Statistics | None
    features: ImageFeatures | None
    origin: ReferenceOrigin | None = None

    @classmethod
    def from_features(cls, features: ImageFeatures) -> Reference:
        """Makes a reference from features of at least two images.

        Raises:
            ValueError: if there are fewer than two.
        """
        spatial = None if features.spatial is None else Statistics.from_features(features.spatial)
        return cls(features.label, Statistics.from_features(features.pooled), spatial, replace(features, spatial=None))


def draw_order(there: int, count: int) -> Order:
    """Returns the order of ``count`` images drawn at random, always the same ones; of all that are there, their own."""
    return InOrder(there) if count >= there else ShuffledStream(there, seed=0)


def iter_real_batches(
    data: ShardData,
    split: Split,
    *,
    num_images: int | None = None,
    shuffled: bool = False,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """Yields this rank's batches of real images: whole batches, dealt out by their number.

    Args:
        data: The real images.
        split: Which of them.
        num_images: The first so many, or all that there are; None is all.
        shuffled: Whether they are drawn at random instead, always the same ones; all of them come in their order.
        batch_size: Images at a time.

    Raises:
        ValueError: if the data are tokens.
    """
    there = data.summary.samples[split]
    count = there if num_images is None else min(num_images, there)
    dataset = data.batches(split, draw_order(there, count) if shuffled else InOrder(there))
    if not isinstance(dataset, ImageBatches):
        raise ValueError(f"data {data.config.path}: images are needed to measure distances from, got tokens")
    yield from make_loader(
        dataset,
        cast("Sampler[range]", list(iter_row_batches(count, batch_size=batch_size))),  # any iterable serves
        num_workers=data.config.num_workers,
        unreadable_budget=data.config.unreadable_budget,
    )


def read_real_labels(data: ShardData) -> Tensor:
    """Returns the classes (n,) int64 of the val split's images, in their order; read from the index alone."""
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
    """Returns a split as each network sees it: read from ``folder``, or made and kept there where it is not.

    Args:
        folder: Where references are kept; several data sets and networks may share it.
        data: The real images.
        extractors: The networks.
        split: Which of the images.
        num_images: The first so many; None is all.
        on_images: Called with the number of images that are done, for a progress bar.

    Returns:
        By the networks' labels, the same on each rank.

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
    """Reads a file of ADM's layout as each network sees it.

    Statistics that the file holds are Inception's; they alone give fid and sfid, images give the rest.

    Args:
        path: E.g. ``VIRTUAL_imagenet256_labeled.npz``.
        extractors: The networks.
        folder: Where features of the file's images are kept, as of ``obtain_references``; None keeps none.
        on_images: Called with the number of images that are done, for a progress bar.

    Returns:
        By the networks' labels, the same on each rank.

    Raises:
        ValueError: if the file is missing, foreign or damaged, or does not hold what a network needs.
    """
    file = ArrayFile(path, thing="reference")
    origin = ReferenceOrigin(sha256_of(file.path), file=file.path.name)
    statistics = _read_inception_statistics(file)
    if "arr_0" not in file:
        if statistics is None:
            raise file.make_error("mu", "statistics (mu, sigma) or images (arr_0) are needed, got neither")
        for extractor in extractors:
            if extractor.label != "inception":
                raise file.make_error(
                    "arr_0",
                    f"images are needed for the network {extractor.label!r}, got the statistics of inception alone",
                )
        return {extractor.label: replace(statistics, origin=origin) for extractor in extractors}
    samples = open_samples(file)

    def features(missing: Sequence[Extractor]) -> dict[str, ImageFeatures]:
        return extract(missing, iter_image_batches(samples.read, len(samples)), on_images=on_images)

    made = _obtain(folder, {"data": origin.digest, "split": "file"}, extractors, features, origin)
    if statistics is None or "inception" not in made:
        return made
    spatial = statistics.spatial if statistics.spatial is not None else made["inception"].spatial
    return {**made, "inception": replace(made["inception"], pooled=statistics.pooled, spatial=spatial)}


def _split_key(data: ShardData, split: Split, num_images: int | None) -> dict[str, Any]:
    """Returns what decides the pixels of a split's images."""
    return {
        "data": data.summary.fingerprint,
        "split": split,
        "num_images": num_images,
        "image_size": data.config.image_size,
        "in_channels": data.config.in_channels,
    }


def _obtain(
    folder: Path | None,
    key: Mapping[str, Any],
    extractors: Sequence[Extractor],
    features: Callable[[Sequence[Extractor]], dict[str, ImageFeatures]],
    origin: ReferenceOrigin,
) -> dict[str, Reference]:
    """Returns what the folder holds, and the rest from one pass over the images, whose pixels ``key`` decides."""
    keys = {
        each.label: {**key, "network": each.label, "weights": each.digest, "knows_classes": each.knows_classes}
        for each in extractors
    }
    found = {label: None if folder is None else _read(_cache_path(folder, key), key) for label, key in keys.items()}
    here = on_all_ranks(lambda: [label for label, reference in found.items() if reference is not None])
    missing = [extractor for extractor in extractors if not all(extractor.label in labels for labels in here)]
    made = (
        {label: Reference.from_features(extracted) for label, extracted in features(missing).items()} if missing else {}
    )
    if folder is not None and rank_and_world()[0] == 0:
        for label, reference in made.items():
            _write(_cache_path(folder, keys[label]), keys[label], reference)
    kept = {label: reference for label, reference in found.items() if reference is not None}
    return {label: replace(made.get(label) or kept[label], origin=origin) for label in keys}


def _cache_path(folder: Path, key: Mapping[str, Any]) -> Path:
    network = re.sub("[^A-Za-z0-9_.]+", "-", key["network"])
    return folder / f"{key['split']}-{network}-{shorten_digest(digest_of(key))}.npz"


def _encode_key(key: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": _FORMAT, "version": _VERSION, **key}, sort_keys=True).encode()


def _write(path: Path, key: Mapping[str, Any], reference: Reference) -> None:
    features = reference.features
    assert features is not None  # it was made here
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
    """Reads what was kept; None, with a warning, where the file is not what this program wrote for the same key."""
    if not path.exists():
        return None
    try:
        file = ArrayFile(path, thing="reference")
        file.check()
        if bytes(file.read("key", (None,), kinds="uint8")) != _encode_key(key):
            raise file.make_error("key", "it is of something else")
        pooled = _read_tensor(file, "pooled", (None, None), kinds="f")
        logits = _read_tensor(file, "logits", (len(pooled), None), kinds="f") if "logits" in file else None
        spatial = _read_statistics(file, "_s", None) if "mu_s" in file else None
        return Reference(
            key["network"],
            _read_statistics(file, "", pooled.shape[1]),
            spatial,
            ImageFeatures(key["network"], pooled.float(), None if logits is None else logits.float()),
        )
    except ValueError as error:
        _log.warning("%s; it is made again", error)
        return None


def _read_inception_statistics(file: ArrayFile) -> Reference | None:
    if not any(name in file for name in ("mu", "sigma", "mu_s", "sigma_s")):
        return None
    spatial = _read_statistics(file, "_s", _SPATIAL) if "mu_s" in file or "sigma_s" in file else None
    return Reference("inception", _read_statistics(file, "", _POOLED), spatial, None)


def _read_statistics(file: ArrayFile, suffix: str, width: int | None) -> Statistics:
    mean = _read_tensor(file, f"mu{suffix}", (width,), kinds="f")
    covariance = _read_tensor(file, f"sigma{suffix}", (len(mean), len(mean)), kinds="f")
    if not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6) or bool((covariance.diagonal() < 0).any()):
        raise file.make_error(f"sigma{suffix}", "a covariance is needed, got a matrix that cannot be one")
    return Statistics(mean, covariance)


def _read_tensor(file: ArrayFile, name: str, shape: tuple[int | None, ...], *, kinds: str) -> Tensor:
    """Reads a copy, as float64.

    Raises:
        ValueError: see ``ArrayFile.read``, or a number is not finite.
    """
    array: npt.NDArray[np.float64] = np.array(file.read(name, shape, kinds=kinds), dtype=np.float64)
    if not np.isfinite(array).all():
        raise file.make_error(name, "finite numbers are needed")
    return torch.from_numpy(array)

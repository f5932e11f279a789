"""Feature networks, and the features of images, which the ranks extract together.

The ranks share the batches of images, and every rank gets the features of all images. The last bits of a
feature may depend on the other images of its batch. Batches are therefore cut by image index and not by rank:
with the same number of threads, the features are bit-exact for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskgit_pl.data import ShardData
from maskgit_pl.distributed import on_all_ranks, own_rows
from maskgit_pl.evaluation.classifier import find_classifier
from maskgit_pl.evaluation.options import CLASSIFIER, Spec
from maskgit_pl.networks.classifiers import FeatureOutput, weights_digest
from maskgit_pl.networks.features import ClassifierSpec, FeatureNetworkSpec, parse_feature_network

BATCH_SIZE = 16  # images, which fit into the caches of a CPU; part of the result, see the module docstring


@dataclass(frozen=True)
class Extractor:
    """A feature network with the label that its metrics are named after."""

    label: str  # suffix of metric names, e.g. ``inception`` for ``fid/inception``
    knows_classes: bool  # True if its classes are those of the images, so that an inception score is meaningful
    network: nn.Module  # (B, C, H, W) uint8 -> ``FeatureOutput``

    @classmethod
    def create(cls, spec: FeatureNetworkSpec, *, device: torch.device | str = "cpu") -> Extractor:
        """Loads a network that ``parse_feature_network`` has found."""
        network: Any = spec.create().eval().to(device)  # torch's stub lacks the memory format
        network.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        return cls(spec.label, spec.knows_classes, network)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of its layers and weights, in hex."""
        return weights_digest(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Extracts features of (B, C, H, W) uint8 images on any device: the tensors of ``ImageFeatures`` by name."""
        # A network without parameters runs on the device of the images.
        device = next((tensor.device for tensor in self.network.parameters()), images.device)
        images = images.to(device).contiguous(memory_format=torch.channels_last)  # the last bits depend on the layout
        # On a GPU: full float32 instead of TF32, and deterministic kernels.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            output: FeatureOutput = self.network(images)
        logits = output.logits if self.knows_classes else None
        columns = {"pooled": output.features, "logits": logits, "spatial": output.spatial}
        return {name: tensor.float().cpu() for name, tensor in columns.items() if tensor is not None}


@dataclass(frozen=True)
class ImageFeatures:
    """The features of n images in one network, ordered by image index, on the CPU."""

    label: str  # of the network
    pooled: Tensor  # (n, F) float32
    logits: Tensor | None = None  # (n, C) float32; None if the network does not know the classes of the images
    spatial: Tensor | None = None  # (n, S) float32; None if the network has no feature map, or if they are not kept

    def __len__(self) -> int:
        return len(self.pooled)


def gather_rows(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gathers the rows of all ranks, at least one, sorted by index; all ranks must call it.

    Args:
        batches: Columns by name of the batches of this rank, which may have none: ``index``, (b,) int64, the place of
            each row in the whole, and others, (b, ...), all on the CPU.

    Returns:
        The other columns. Their order does not depend on the number of ranks, so neither do sums over them.
    """
    everyones = [batch for of_rank in on_all_ranks(lambda: batches) for batch in of_rank]
    columns = {name: torch.cat([batch[name] for batch in everyones]) for name in everyones[0]}
    order = columns.pop("index").argsort()
    return {name: column[order] for name, column in columns.items()}


def extract(
    extractors: Sequence[Extractor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, ImageFeatures]:
    """Extracts the features of all ranks' images with each network, by label, the same on every rank.

    ``batches`` are those of this rank: (b, C, H, W) uint8 images and (b,) int64 indices. See ``iter_image_batches``.
    """
    extracted: dict[str, list[dict[str, Tensor]]] = {extractor.label: [] for extractor in extractors}
    for images, index in batches:
        for extractor in extractors:
            extracted[extractor.label].append({"index": index.cpu(), **extractor(images)})
        on_images(len(images))
    return {label: ImageFeatures(label, **gather_rows(rows)) for label, rows in extracted.items()}


def iter_row_batches(count: int, *, batch_size: int = BATCH_SIZE) -> Iterator[range]:
    """Yields the row ranges of this rank's batches of ``count`` rows; the ranks take whole batches in turn."""
    # Batch i belongs to rank i mod world_size; the last batch may be smaller.
    for number in own_rows(-(-count // batch_size)):
        yield range(count)[number * batch_size : (number + 1) * batch_size]


def iter_image_batches(read: Callable[[range], Tensor], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this rank's batches of ``count`` images, with the (b,) int64 indices of the images.

    ``read`` returns the (b, C, H, W) uint8 images of a range of rows.
    """
    for rows in iter_row_batches(count):
        yield read(rows), torch.arange(rows.start, rows.stop)


def open_extractors(
    classifier: Path, data: ShardData, features: Sequence[Spec], *, device: torch.device | str
) -> list[Extractor]:
    """Opens feature networks: names or mappings.

    ``classifier`` is the folder that the name ``classifier`` stands for; see ``find_classifier``.
    """
    specs = [
        ClassifierSpec(str(find_classifier(classifier, data))) if each == CLASSIFIER else parse_feature_network(each)
        for each in features
    ]
    return [Extractor.create(spec, device=device) for spec in specs]

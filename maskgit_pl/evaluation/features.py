"""Features of many images: each rank extracts whole batches of them, and all ranks get the same whole.

The last bits of a feature may depend on the batch it is computed in, so batches are cut by the number of the image, not
by rank: on as many threads, one rank and several get the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from maskgit_pl.distributed import gather_rows, on_all_ranks, own_rows
from maskgit_pl.networks.feature_network import FeatureOutput, weights_digest
from maskgit_pl.networks.features import FeatureNetworkSpec

__all__ = [
    "BATCH_SIZE",
    "Extractor",
    "FeatureCollector",
    "ImageFeatures",
    "extract",
    "iter_image_batches",
    "iter_row_batches",
]

BATCH_SIZE = 50


@dataclass(frozen=True)
class Extractor:
    """A feature network that measures.

    Args:
        label: After which numbers are named, e.g. ``inception``.
        knows_classes: Whether an inception score of its logits means something.
        network: (B, C, H, W) uint8 -> ``FeatureOutput``.
    """

    label: str
    knows_classes: bool
    network: nn.Module

    @classmethod
    def create(cls, spec: FeatureNetworkSpec, *, device: torch.device | str = "cpu") -> Extractor:
        """Loads a network.

        Args:
            spec: What ``parse_feature_network`` gives.
            device: Where the network works.

        Raises:
            ValueError: if its weights are missing or others.
        """
        network: Any = spec.create().eval().to(device)  # torch's stub does not know the memory format
        network.to(memory_format=torch.channels_last)  # twice as quick on a CPU
        return cls(spec.label, spec.knows_classes, network)

    @cached_property
    def digest(self) -> str:
        """Sha256 of its layers and weights."""
        return weights_digest(self.network)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> FeatureOutput:
        """Extracts features of (B, C, H, W) uint8 images on any device, as float32 on the CPU."""
        device = next((tensor.device for tensor in self.network.parameters()), images.device)
        images = images.to(device).contiguous(memory_format=torch.channels_last)  # the layout decides the last bits too
        # On a GPU: float32 in full, and the same every time.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            output: FeatureOutput = self.network(images)
        spatial = None if output.spatial is None else output.spatial.float().cpu()
        return FeatureOutput(output.features.float().cpu(), output.logits.float().cpu(), spatial)


@dataclass(frozen=True)
class ImageFeatures:
    """What one network says about n images, in the order of their numbers, on the CPU.

    Args:
        label: Of the network.
        pooled: (n, F) float32.
        logits: (n, C) float32; None where the network does not know the images' classes.
        spatial: (n, S) float32; None where the network has no feature map, or where they are not kept.
    """

    label: str
    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)


class FeatureCollector:
    """The features of the images that this rank is given, batch by batch.

    Args:
        extractor: The network.
    """

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self._outputs: list[tuple[Tensor | None, ...]] = []
        self._index: list[Tensor] = []

    def add(self, images: Tensor, index: Tensor) -> None:
        """Extracts the features of a batch.

        Args:
            images: (b, C, H, W) uint8.
            index: (b,) int64: their numbers among all images.
        """
        output = self.extractor(images)
        self._outputs.append((output.features, output.logits if self.extractor.knows_classes else None, output.spatial))
        self._index.append(index.cpu())

    def gather(self) -> ImageFeatures:
        """Gathers the features of all ranks' images, sorted by number; all ranks must call it, and get the same.

        Raises:
            ValueError: if no rank has any, or two images have the same number.
        """
        own = [None if part is None else part.shape[1] for part in self._outputs[0]] if self._outputs else None
        widths = next((each for each in on_all_ranks(lambda: own) if each is not None), None)  # a rank may have none
        if widths is None:
            raise ValueError(f"features of {self.extractor.label}: at least one image is needed, got none")
        index = torch.cat([torch.empty(0, dtype=torch.int64), *self._index])
        pooled, logits, spatial = (
            None if width is None else gather_rows(self._column(column, width), index)
            for column, width in enumerate(widths)
        )
        if not gather_rows(index, index).diff().all():
            raise ValueError(f"features of {self.extractor.label}: each image must come once, got some several times")
        assert pooled is not None
        return ImageFeatures(self.extractor.label, pooled, logits, spatial)

    def _column(self, column: int, width: int) -> Tensor:
        parts = [part for output in self._outputs if (part := output[column]) is not None]
        return torch.cat([torch.empty(0, width), *parts])


def extract(
    extractors: Sequence[Extractor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    on_images: Callable[[int], object] = lambda count: None,
) -> dict[str, ImageFeatures]:
    """Extracts the features of all ranks' images with each network.

    Args:
        extractors: The networks, each with a label of its own.
        batches: This rank's: (b, C, H, W) uint8 images and their (b,) int64 numbers; ``iter_image_batches`` makes them.
        on_images: Called with the number of images that are done, for a progress bar.

    Returns:
        By label, the same on each rank.

    Raises:
        ValueError: if two networks have one label, or there are no images.
    """
    collectors = {extractor.label: FeatureCollector(extractor) for extractor in extractors}
    if len(collectors) != len(extractors):
        raise ValueError(
            f"feature networks: each label at most once, got {[extractor.label for extractor in extractors]}"
        )
    if not collectors:
        return {}
    for images, index in batches:
        for collector in collectors.values():
            collector.add(images, index)
        on_images(len(images))
    return {label: collector.gather() for label, collector in collectors.items()}


def iter_row_batches(count: int, *, batch_size: int = BATCH_SIZE) -> Iterator[range]:
    """Yields the rows of ``count`` that this rank takes, batch by batch: whole batches, dealt out by their number."""
    for number in own_rows(-(-count // batch_size)):
        yield range(number * batch_size, min((number + 1) * batch_size, count))


def iter_image_batches(
    read: Callable[[range], Tensor], count: int, *, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this rank's batches of ``count`` images, with their numbers.

    Args:
        read: Rows of the whole -> (b, C, H, W) uint8; it may make them on the spot.
        count: All images.
        batch_size: Images at a time.
    """
    for rows in iter_row_batches(count, batch_size=batch_size):
        yield read(rows), torch.arange(rows.start, rows.stop)

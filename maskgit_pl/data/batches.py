"""Whole batches of images or tokens at some positions of the stream; uint8 or integer until they are on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.data.order import Order, Rows
from maskgit_pl.randomness import random_uniform
from maskgit_pl.shards.images import Crop, check_crop, load_square
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.tokens import TokenReader

__all__ = ["Batch", "ImageBatches", "StepLoader", "TokenBatches", "flip", "loader", "to_unit_range"]


class Batch(NamedTuple):
    """What one rank gets for one micro-batch.

    Args:
        content: Images (B, C, H, W) uint8, or tokens (B, N) int64.
        labels: (B,) int64, in [0, num_classes).
        index: (B,) int64, number of the sample in its split.
        epoch: (B,) int64, how often the stream had gone through the split before.
        position: (B,) int64, place in the stream: step * global batch + slot.
        valid: (B,) bool; False for a row that only fills up the last validation batch.
    """

    content: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor


class ImageBatches(Dataset[Batch]):
    """Whole batches of images, decoded and cropped in the worker.

    Args:
        reader: The split.
        order: How positions become samples.
        image_size: Side of the images in pixels.
        in_channels: 1 or 3.
        crop: ``"center"``, or ``"random"``: another crop of each sample in each epoch.
        seed: Decides the random crops.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        *,
        image_size: int,
        in_channels: int,
        crop: Crop = "center",
        seed: int = 0,
    ) -> None:
        check_crop(crop)
        self.reader = reader
        self.order = order
        self.image_size = image_size
        self.in_channels = in_channels
        self.crop = crop
        self.seed = seed

    def __getitems__(self, positions: range) -> Batch:
        """The batch at some positions; content is (B, in_channels, image_size, image_size) uint8."""
        rows = self.order(positions)
        indices = rows.index.numpy()
        images = [self._load(index, place) for index, place in zip(indices.tolist(), self._crops(rows), strict=True)]
        labels = torch.from_numpy(self.reader.labels(indices))
        return Batch(torch.stack(images), labels, *rows)

    def _load(self, index: int, crop: tuple[float, float] | None) -> Tensor:
        return load_square(
            self.reader.read(index),
            image_size=self.image_size,
            channels=self.in_channels,
            crop=crop,
            name=self.reader.name(index),
        )

    def _crops(self, rows: Rows) -> Sequence[tuple[float, float] | None]:
        if self.crop == "center":
            return [None] * len(rows.index)
        places = random_uniform("crop", seed=self.seed, index=rows.index, epoch=rows.epoch, count=2)
        return [(top, left) for top, left in places.tolist()]


class TokenBatches(Dataset[Batch]):
    """Whole batches of tokens, one gather from the memory-mapped store each.

    Args:
        reader: The split of the store.
        order: How positions become samples.
    """

    def __init__(self, reader: TokenReader, order: Order) -> None:
        self.reader = reader
        self.order = order

    def __getitems__(self, positions: range) -> Batch:
        """The batch at some positions; content is (B, N) int64."""
        rows = self.order(positions)
        tokens, labels = self.reader.read(rows.index.numpy())
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), *rows)


def _as_is(batch: Any) -> Any:
    """Collation of what is a batch already."""
    return batch


class StepLoader(DataLoader[Batch]):
    """A loader whose place is the Trainer's step; having a state tells Lightning that it can resume in mid-epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the sampler asks the Trainer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def loader(dataset: Dataset[Batch], order: Sampler[range], *, num_workers: int, pin_memory: bool = False) -> StepLoader:
    """A loader of whole batches: the order gives ranges of positions, the dataset the batch at them."""
    return StepLoader(
        dataset,
        batch_sampler=cast("Sampler[list[int]]", order),  # __getitems__ takes a range where others take a list
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def flip(images: Tensor, *, probability: float, seed: int, index: Tensor, epoch: Tensor) -> Tensor:
    """Mirror a share of the images, left to right; which ones depends on (seed, index, epoch) alone.

    Args:
        images: (B, C, H, W), any type, any device.
        probability: Share that is mirrored, in [0, 1].
        seed: Of the run.
        index: (B,) int64, of the batch.
        epoch: (B,) int64, of the batch.

    Returns:
        (B, C, H, W) of the same type.
    """
    chosen = random_uniform("flip", seed=seed, index=index, epoch=epoch)[:, 0] < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


def to_unit_range(images: Tensor) -> Tensor:
    """Uint8 pixels in [0, 255] -> float32 in [0, 1]."""
    return images.to(torch.float32) / 255

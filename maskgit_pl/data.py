"""Batches for training and validation, from shards of images or from a token store.

Which samples a step sees is a function of (seed, step): position p of the endless training stream lies in epoch
``p // n`` and is sample ``permutation(p % n)``; step s takes positions [s G, (s + 1) G) for a global batch G. Ranks,
workers and accumulation only share out that range. A run that resumes asks the Trainer for its step and is in place.
Everything stays ``uint8`` or integer until it is on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.randomness import permutation, random_uniform
from maskgit_pl.shards.images import Crop, check_crop, load_square
from maskgit_pl.shards.manifest import DataSummary, Split, load_manifest, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.tokens import (
    StoreDescription,
    TokenReader,
    TokenWriter,
    complete_store,
    is_complete,
    open_store,
)

__all__ = [
    "Batch",
    "GlobalOrder",
    "ImageBatches",
    "OnceThrough",
    "ShardData",
    "ShuffledStream",
    "SplitOrder",
    "TokenBatches",
    "flip",
    "split_batch",
    "to_unit_range",
    "tokenize",
]


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


def split_batch(global_batch: int, max_per_device: int, world_size: int) -> tuple[int, int]:
    """The largest micro-batch that fits a device, and how many of them make a step.

    Args:
        global_batch: Samples of a step, over all ranks.
        max_per_device: Most samples a device takes at once.
        world_size: Ranks.

    Returns:
        (per_device, accumulation) with per_device * accumulation * world_size = global_batch.

    Raises:
        ValueError: The ranks cannot share the batch evenly; the text names the nearest sizes that they can.
    """
    for name, value in (("global_batch", global_batch), ("max_batch_per_device", max_per_device)):
        if value < 1:
            raise ValueError(f"data.{name}: at least 1 is needed, got {value}")
    if global_batch % world_size:
        below = global_batch // world_size * world_size
        choices = " or ".join(str(size) for size in (below, below + world_size) if size)
        devices = [str(ranks) for ranks in range(1, min(global_batch, 4 * world_size) + 1) if global_batch % ranks == 0]
        raise ValueError(
            f"data.global_batch: {world_size} ranks must share it evenly, got {global_batch}; "
            f"use {choices}, or keep it and run on {', '.join(devices)} ranks"
        )
    per_rank = global_batch // world_size
    per_device = max(size for size in range(1, min(per_rank, max_per_device) + 1) if per_rank % size == 0)
    return per_device, per_rank // per_device


class Rows(NamedTuple):
    """Which samples some positions stand for; four (B,) tensors as in ``Batch``."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor


class Order(Protocol):
    """How positions become samples."""

    def __call__(self, positions: range) -> Rows:
        """The samples at some positions."""


@dataclass(frozen=True)
class ShuffledStream:
    """The endless training stream: each epoch another permutation of the split.

    A small split's permutation is worked out once an epoch and held; a large one's only at the positions asked for.
    Both give the same numbers.

    Args:
        num_samples: Samples of the split, n.
        seed: Decides the order.
        most_held: Largest n whose permutation is held (8 bytes a sample in each worker).
    """

    num_samples: int
    seed: int
    most_held: int = 2**20

    def __call__(self, positions: range) -> Rows:
        """Sample and epoch of each position."""
        position = torch.arange(positions.start, positions.stop)
        epoch, place = position // self.num_samples, position % self.num_samples
        if self.num_samples <= self.most_held:
            epochs = range(int(epoch[0]), int(epoch[-1]) + 1)
            index = torch.cat([self._held(number)[place[epoch == number]] for number in epochs])
        else:
            index = permutation(place, self.num_samples, stream="order", seed=self.seed, epoch=epoch)
        return Rows(index, epoch, position, torch.ones_like(position, dtype=torch.bool))

    def _held(self, epoch: int) -> Tensor:
        return _whole_permutation(self.num_samples, self.seed, epoch)


@lru_cache(maxsize=2)
def _whole_permutation(size: int, seed: int, epoch: int) -> Tensor:
    """(size,) int64; in pieces that stay in the processor's cache."""
    pieces = [torch.arange(first, min(first + 2**14, size)) for first in range(0, size, 2**14)]
    return torch.cat([permutation(piece, size, stream="order", seed=seed, epoch=epoch) for piece in pieces])


@dataclass(frozen=True)
class OnceThrough:
    """Validation: position i is sample i; positions past the end repeat the last sample and are not valid."""

    num_samples: int

    def __call__(self, positions: range) -> Rows:
        """Sample of each position."""
        position = torch.arange(positions.start, positions.stop)
        index = position.clamp(max=self.num_samples - 1)
        return Rows(index, torch.zeros_like(position), position, position < self.num_samples)


class GlobalOrder(Sampler[range]):
    """The positions of one rank's micro-batches in the training stream, from the current step to the epoch's end.

    Micro-batch a of rank r takes slots [(a W + r) b, (a W + r + 1) b) of its step. An epoch is ceil(n / G) steps; the
    stream does not start again with it, so no sample is dropped or seen twice as often as another.

    Args:
        num_samples: Samples of the split, n.
        per_device: Samples of a micro-batch, b.
        accumulation: Micro-batches of a step on each rank.
        world_size: Ranks, W.
        rank: This rank.
        current_step: Asked for the step to start at whenever an iteration begins.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        per_device: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        current_step: Callable[[], int] = lambda: 0,
    ) -> None:
        self.per_device = per_device
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.current_step = current_step
        self.global_batch = per_device * accumulation * world_size
        self.steps_per_epoch = math.ceil(num_samples / self.global_batch)

    def __len__(self) -> int:
        """Micro-batches of an epoch on each rank."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[range]:
        start = self.current_step()  # read now, not at the first next()
        end = (start // self.steps_per_epoch + 1) * self.steps_per_epoch
        return (self._positions(step, micro) for step in range(start, end) for micro in range(self.accumulation))

    def _positions(self, step: int, micro: int) -> range:
        first = step * self.global_batch + (micro * self.world_size + self.rank) * self.per_device
        return range(first, first + self.per_device)


class SplitOrder(Sampler[range]):
    """The positions of one rank's validation batches: each sample once over all ranks, as many batches on every rank.

    Args:
        num_samples: Samples to go through.
        per_device: Samples of a batch.
        world_size: Ranks.
        rank: This rank.
        start: The first sample to visit.
    """

    def __init__(
        self, num_samples: int, *, per_device: int, world_size: int = 1, rank: int = 0, start: int = 0
    ) -> None:
        stride = per_device * world_size
        count = math.ceil((num_samples - start) / stride)
        firsts = [start + number * stride + rank * per_device for number in range(count)]
        self._batches = [range(first, first + per_device) for first in firsts]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[range]:
        return iter(self._batches)


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


def _loader(
    dataset: Dataset[Batch], order: Sampler[range], *, num_workers: int, pin_memory: bool = False
) -> StepLoader:
    return StepLoader(
        dataset,
        batch_sampler=cast("Sampler[list[int]]", order),  # __getitems__ takes a range where others take a list
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


class ShardData(LightningDataModule):
    """Training and validation batches over a data folder, of images or of the tokens made from them.

    Both sources give the same samples in the same order.

    Args:
        path: Data folder (data/README.md): shards with manifests.
        source: ``"images"`` decodes the shards, ``"tokens"`` reads a token store made from them.
        token_store: Folder of the token store; needed, and read, for ``"tokens"`` alone.
        image_size: Side of the images in pixels.
        in_channels: 1 for grey, 3 for RGB.
        crop: Where training crops lie in images that are not square: ``"center"`` or ``"random"``.
        global_batch: Samples of a step, over all ranks.
        max_batch_per_device: Most samples a device takes at once; micro-batch and accumulation follow from it.
        validation_batch: Samples of a validation batch on each rank.
        validation_samples: Validate on the first so many samples; None takes all.
        num_workers: Processes that read and decode, each rank; 0 reads in the training process.
        seed: Decides order and crops.
    """

    def __init__(
        self,
        path: str,
        *,
        source: Literal["images", "tokens"] = "images",
        token_store: str | None = None,
        image_size: int = 256,
        in_channels: int = 3,
        crop: Crop = "center",
        global_batch: int = 256,
        max_batch_per_device: int = 32,
        validation_batch: int = 64,
        validation_samples: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_crop(crop)
        if source not in ("images", "tokens"):
            raise ValueError(f"data.source: images or tokens is needed, got {source!r}")
        if source == "tokens" and token_store is None:
            raise ValueError("data.token_store: source tokens reads a token store, got none; `make tokenize` makes one")
        if source == "tokens" and crop != "center":
            raise ValueError(f"data.crop: tokens are of center crops, got {crop!r}; use source images")
        self.path = path
        self.source = source
        self.token_store = token_store if source == "tokens" else None
        self.image_size = image_size
        self.in_channels = in_channels
        self.crop: Crop = crop
        self.global_batch = global_batch
        self.max_batch_per_device = max_batch_per_device
        self.validation_batch = validation_batch
        self.validation_samples = validation_samples
        self.num_workers = num_workers
        self.seed = seed

    @cached_property
    def summary(self) -> DataSummary:
        """Class names, counts, image sizes and fingerprint of the data folder."""
        return read_manifest_summary(self.path)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names; label i is ``class_names[i]``."""
        return self.summary.classes

    @property
    def num_classes(self) -> int:
        """How many classes the labels name."""
        return self.summary.num_classes

    @property
    def store(self) -> StoreDescription | None:
        """What the token store holds; None for source images."""
        return None if self._tokens is None else self._tokens["train"].description

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the stream goes through the train split once."""
        return math.ceil(self.summary.samples["train"] / self.global_batch)

    def require_tokenizer(self, fingerprint: str) -> None:
        """Refuse a token store that another tokenizer made; nothing to do for source images.

        Raises:
            ValueError: It did; the text names both and the way out.
        """
        if self.token_store is not None:
            open_store(self.token_store, data=None, tokenizer=fingerprint)

    def setup(self, stage: str | None = None) -> None:
        """Check every shard's length, or whose the token store is, before the first step.

        Raises:
            FileNotFoundError: Data folder, manifest or store is missing.
            ValueError: Shards are not what the manifest says, the store is of other data, or the batch does not divide.
        """
        splits: tuple[Split, ...] = ("train", "val")
        for split in splits:
            load_manifest(self.path, split, check=self.source == "images")
        split_batch(self.global_batch, self.max_batch_per_device, self._world_size)
        _ = self.store

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches of this rank from the Trainer's step on."""
        samples = self.summary.samples["train"]
        per_device, accumulation = split_batch(self.global_batch, self.max_batch_per_device, self._world_size)
        order = GlobalOrder(
            samples,
            per_device=per_device,
            accumulation=accumulation,
            world_size=self._world_size,
            rank=self._rank,
            current_step=self._current_step,
        )
        dataset = self.batches("train", ShuffledStream(samples, self.seed), crop=self.crop)
        return _loader(dataset, order, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank of the val split, each sample once."""
        samples = self.summary.samples["val"]
        if self.validation_samples is not None:
            samples = min(samples, self.validation_samples)
        order = SplitOrder(samples, per_device=self.validation_batch, world_size=self._world_size, rank=self._rank)
        dataset = self.batches("val", OnceThrough(samples))
        return _loader(dataset, order, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())

    def batches(self, split: Split, order: Order, *, crop: Crop = "center") -> ImageBatches | TokenBatches:
        """The dataset of a split: ``__getitems__(range of positions)`` gives a ``Batch``."""
        if self._tokens is not None:
            return TokenBatches(self._tokens[split], order)
        reader = ShardReader(load_manifest(self.path, split))
        return ImageBatches(
            reader, order, image_size=self.image_size, in_channels=self.in_channels, crop=crop, seed=self.seed
        )

    @cached_property
    def _tokens(self) -> dict[Split, TokenReader] | None:
        if self.token_store is None:
            return None
        return open_store(self.token_store, data=self.summary.fingerprint, image_size=self.image_size)

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank


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


def tokenize(
    path: str | Path,
    store: str | Path,
    *,
    encode: Callable[[Tensor], Tensor],
    grid: tuple[int, int],
    num_codes: int,
    tokenizer: str,
    image_size: int,
    in_channels: int,
    batch_size: int = 256,
    num_workers: int = 0,
    on_rows: Callable[[Split, int], object] = lambda split, rows: None,
) -> bool:
    """Make the token store of a data folder; an interrupted one is gone on with.

    Args:
        path: The data folder.
        store: The folder of the store.
        encode: (B, C, H, W) uint8 images on the CPU -> (B, N) int64 tokens on any device.
        grid: Height and width of the token grid.
        num_codes: Codebook size.
        tokenizer: Fingerprint of the tokenizer's weights.
        image_size: Side of the images that ``encode`` is given.
        in_channels: Their channels, 1 or 3.
        batch_size: Images at a time.
        num_workers: Processes that decode.
        on_rows: Told the split and how many more rows are done, first those of an earlier run (for a progress bar).

    Returns:
        False if this very store is there already, True if it was made.
    """
    summary = read_manifest_summary(path)
    samples = cast("dict[Split, int]", dict(summary.samples))
    description = StoreDescription(
        grid, num_codes, image_size, tokenizer, summary.fingerprint, summary.classes, samples
    )
    if is_complete(store, description):
        return False
    for split, count in samples.items():
        reader = ShardReader(load_manifest(path, split))
        writer = TokenWriter(store, split, description, reader.labels(np.arange(count)))
        images = ImageBatches(reader, OnceThrough(count), image_size=image_size, in_channels=in_channels)
        left = SplitOrder(count, per_device=batch_size, start=writer.rows_done)
        on_rows(split, writer.rows_done)
        for batch in _loader(images, left, num_workers=num_workers):
            tokens = encode(batch.content).cpu()[batch.valid]
            writer.write(tokens.numpy())
            on_rows(split, len(tokens))
        writer.finish()
    complete_store(store, description)
    return True

"""The order of samples: a function of (seed, step), without any state to save or restore.

1. The training stream is endless. Position p lies in epoch ``p // n`` and is sample ``permutation(p % n)`` of
   the n samples, with another permutation in each epoch.
2. Step s takes positions [s G, (s + 1) G) for a global batch G.
3. Ranks, workers and micro-batches divide this range among themselves; they do not change it.

A split may have up to 2**32 samples: each position is computed independently, from (seed, epoch). Used by the
data modules, ``tokenize`` and the evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.randomness import permutation

BATCH_SIZE_RANGE = "[1, 16777216]"  # samples of a batch, at most 2**24
_MAX_CACHED = 2**20  # samples of a cached permutation: 8 MiB, at most two in each worker


def split_batch(global_batch: int, max_per_device: int, world_size: int) -> tuple[int, int]:
    """Returns the largest micro-batch that fits a device, and the number of micro-batches per step.

    Args:
        global_batch: Number of samples per step, over all ranks.
        max_per_device: Largest micro-batch of a device.
        world_size: Number of ranks.

    Returns:
        (per_device, accumulation) with per_device * accumulation * world_size = global_batch.

    Raises:
        ValueError: if the batch cannot be divided evenly among the ranks. The message names the nearest sizes that can.
    """
    if global_batch % world_size:
        below = global_batch // world_size * world_size
        choices = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise ValueError(
            f"data.global_batch must be a multiple of the {world_size} ranks, got {global_batch}; use {choices}"
        )
    per_rank = global_batch // world_size
    per_device = next(size for size in range(min(per_rank, max_per_device), 0, -1) if per_rank % size == 0)
    return per_device, per_rank // per_device


class Rows(NamedTuple):
    """The samples at some positions: four (B,) tensors; see ``Batch`` for their meaning."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor


class Order(Protocol):
    """A function from positions of a stream to samples."""

    def __call__(self, positions: range) -> Rows:
        """Returns the samples at some positions."""


@dataclass(frozen=True)
class ShuffledStream:
    """The endless training stream: another permutation of the split in each epoch.

    The permutation of a small split is computed once per epoch and cached. For a large split, only the
    requested positions are computed. Both give the same numbers.

    Args:
        num_samples: Number of samples in the split, n, at most 2**32.
        seed: Seed of the order, in [0, 2**32).
    """

    num_samples: int
    seed: int

    def __call__(self, positions: range) -> Rows:
        """Returns the sample and the epoch of each position; the positions may span several epochs."""
        position, count = torch.arange(positions.start, positions.stop), self.num_samples
        index, epoch = torch.empty_like(position), torch.empty_like(position)
        # Epochs are Python integers here: ten tensor operations would take longer than reading a batch of tokens.
        for number in range(positions.start // count, (positions.stop - 1) // count + 1):
            first = number * count
            places = range(max(positions.start - first, 0), min(positions.stop - first, count))
            rows = slice(first + places.start - positions.start, first + places.stop - positions.start)
            offsets = torch.arange(places.start, places.stop)
            if count <= _MAX_CACHED:
                index[rows] = _full_permutation(count, self.seed, number)[offsets]
            else:
                index[rows] = permutation(offsets, count, stream="order", seed=self.seed, index=0, epoch=number)
            epoch[rows] = number
        return Rows(index, epoch, position, torch.ones_like(position, dtype=torch.bool))


@lru_cache(maxsize=2)
def _full_permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Returns the whole permutation, (size,) int64, computed in pieces that fit the cache of the CPU."""
    pieces = [torch.arange(first, min(first + 2**14, size)) for first in range(0, size, 2**14)]
    return torch.cat([permutation(piece, size, stream="order", seed=seed, index=0, epoch=epoch) for piece in pieces])


@dataclass(frozen=True)
class InOrder:
    """The order of validation: position i is sample i. Positions past the end repeat the last sample as not valid.

    Args:
        num_samples: Number of samples in the split.
        epoch: Epoch of all samples, on which random augmentations depend.
    """

    num_samples: int
    epoch: int = 0

    def __call__(self, positions: range) -> Rows:
        """Returns the sample of each position."""
        position = torch.arange(positions.start, positions.stop)
        index = position.clamp(max=self.num_samples - 1)
        return Rows(index, torch.full_like(position, self.epoch), position, position < self.num_samples)


class TrainBatchSampler(Sampler[range]):
    """A sampler of one rank's micro-batches in the training stream, from the current step to the end of the epoch.

    Micro-batch a of rank r takes slots [(a W + r) b, (a W + r + 1) b) of its step. An epoch has ceil(n / G) steps. The
    stream does not restart with an epoch, so no sample is dropped and none is seen twice as often as another.

    Args:
        num_samples: Number of samples in the split, n.
        per_device: Number of samples in a micro-batch, b.
        accumulation: Number of micro-batches per step on each rank.
        world_size: Number of ranks, W.
        rank: This rank, in [0, W).
        current_step: Returns the step to start at; called at the start of each iteration.
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
        """Returns the number of micro-batches per epoch on each rank."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[range]:
        start = self.current_step()  # read now, not at the first next()
        # A resumed run finishes its epoch.
        end = (start // self.steps_per_epoch + 1) * self.steps_per_epoch
        firsts = (
            step * self.global_batch + (micro * self.world_size + self.rank) * self.per_device
            for step in range(start, end)
            for micro in range(self.accumulation)
        )
        return (range(first, first + self.per_device) for first in firsts)


def eval_batches(num_samples: int, *, per_device: int, world_size: int = 1, rank: int = 0) -> list[range]:
    """Returns one rank's evaluation batches: each sample once over all ranks, equally many batches on each rank.

    Positions past the end fill up the last batches; see ``InOrder``. For the arguments, see ``TrainBatchSampler``.
    """
    firsts = range(rank * per_device, num_samples + rank * per_device, per_device * world_size)
    return [range(first, first + per_device) for first in firsts]

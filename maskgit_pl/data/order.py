"""Which samples a step sees, as a function of (seed, step): no state to keep or to lose.

Position p of the endless training stream lies in epoch ``p // n`` and is sample ``permutation(p % n)``; step s takes
positions [s G, (s + 1) G) for a global batch G. Ranks, workers and accumulation only share out that range. A split may
have up to 2**32 samples: each position is computed by itself, from (seed, epoch) and, for windows, shard lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.checks import check_integer, shorten
from maskgit_pl.randomness import permutation

__all__ = [
    "BATCH_SIZE_RANGE",
    "EvalBatchSampler",
    "InOrder",
    "Order",
    "Rows",
    "ShuffledStream",
    "TrainBatchSampler",
    "WindowedStream",
    "check_window",
    "split_batch",
]

BATCH_SIZE_RANGE = "[1, 16777216]"  # of a batch: 2**24
_MAX_CACHED = 2**20  # 8 MiB, at most two of them in each worker


def split_batch(global_batch: int, max_per_device: int, world_size: int) -> tuple[int, int]:
    """Returns the largest micro-batch that fits a device, and how many of them make a step.

    Args:
        global_batch: Samples of a step, over all ranks.
        max_per_device: Most samples a device takes at once.
        world_size: Ranks.

    Returns:
        (per_device, accumulation) with per_device * accumulation * world_size = global_batch.

    Raises:
        ValueError: if a size is out of range, or the ranks cannot share the batch evenly; the message names the
            nearest sizes that they can.
    """
    check_integer("data.global_batch", global_batch, BATCH_SIZE_RANGE)
    check_integer("data.max_batch_per_device", max_per_device, BATCH_SIZE_RANGE)
    if global_batch % world_size:
        below = global_batch // world_size * world_size
        choices = " or ".join(str(size) for size in (below, below + world_size) if size)
        devices = [str(ranks) for ranks in range(1, min(global_batch, 4 * world_size) + 1) if global_batch % ranks == 0]
        raise ValueError(
            f"data.global_batch: {world_size} ranks must share it evenly, got {global_batch}; "
            f"use {choices}, or keep it and run on {', '.join(devices)} ranks"
        )
    per_rank = global_batch // world_size
    low = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
    per_device = max(size for size in (*low, *(per_rank // size for size in low)) if size <= max_per_device)
    return per_device, per_rank // per_device


def check_window(window: int | None) -> None:
    """Checks that a window has at least one shard.

    Raises:
        ValueError: if it has not.
    """
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(
            f"data.shuffle_window must be an integer >= 1, or null for the whole split, got {shorten(window)}"
        )


class Rows(NamedTuple):
    """Which samples some positions stand for; four (B,) tensors as in ``Batch``."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor


class Order(Protocol):
    """The samples at the positions of a stream."""

    def __call__(self, positions: range) -> Rows:
        """Returns the samples at some positions."""


@dataclass(frozen=True)
class ShuffledStream:
    """The endless training stream: each epoch another permutation of the split.

    A small split's permutation is worked out once an epoch and held; a large one's only at the positions asked for.
    Both give the same numbers.

    Args:
        num_samples: Samples of the split, n, at most 2**32.
        seed: Decides the order.
        max_cached: Largest n whose permutation is held (8 bytes a sample in each worker).
    """

    num_samples: int
    seed: int
    max_cached: int = _MAX_CACHED

    def __call__(self, positions: range) -> Rows:
        """Sample and epoch of each position."""
        return _make_rows(positions, self.num_samples, self._samples)

    def _samples(self, place: Tensor, epoch: int) -> Tensor:
        return _permute(place, self.num_samples, self.seed, epoch, cached=self.num_samples <= self.max_cached)


class WindowedStream:
    """The endless training stream for disks that are slow to seek: few shards are read at a time.

    In each epoch the shards come in another order; every ``window`` consecutive ones of that order are a window, and
    its samples are permuted. Each sample comes once an epoch; a position depends only on (seed, epoch, place).

    What it costs: a step sees samples of one window, two at its border, instead of the whole split. Where shards hold
    a random mixture, the batches are as good as with ``ShuffledStream``; where they are sorted (one class a shard), a
    batch has only the classes of ``window`` shards, and consecutive batches resemble each other until it ends.

    Args:
        shard_samples: Samples of each shard, in the order in which samples are numbered.
        window: Shards of a window, at least 1; the last window of an epoch has the rest.
        seed: Decides the order.
        max_cached: Largest window, in samples, whose permutation is held.

    Raises:
        ValueError: The window is below 1.
    """

    def __init__(self, shard_samples: Sequence[int], *, window: int, seed: int, max_cached: int = _MAX_CACHED) -> None:
        check_window(window)
        self.window = window
        self.seed = seed
        self.max_cached = max_cached
        self._sizes = torch.tensor(shard_samples, dtype=torch.int64)
        self._firsts = self._sizes.cumsum(0) - self._sizes
        self._layouts: dict[int, _Layout] = {}

    def __call__(self, positions: range) -> Rows:
        """Sample and epoch of each position."""
        return _make_rows(positions, int(self._sizes.sum()), self._samples)

    def _samples(self, place: Tensor, epoch: int) -> Tensor:
        layout = self._layout(epoch)
        window = torch.searchsorted(layout.window_ends, place, right=True)
        numbers = sorted(set(window.tolist()))  # places rise, and so do their windows
        return torch.cat(
            [self._samples_of_window(number, place[window == number], epoch, layout) for number in numbers]
        )

    def _samples_of_window(self, number: int, place: Tensor, epoch: int, layout: _Layout) -> Tensor:
        end = int(layout.window_ends[number])
        start = int(layout.window_ends[number - 1]) if number else 0
        size = end - start
        place = start + _permute(place - start, size, self.seed, epoch, window=number, cached=size <= self.max_cached)
        slot = torch.searchsorted(layout.shard_ends, place, right=True)
        shard = layout.shards[slot]
        return self._firsts[shard] + place - (layout.shard_ends[slot] - self._sizes[shard])

    def _layout(self, epoch: int) -> _Layout:
        if epoch not in self._layouts:
            while len(self._layouts) > 1:  # the epoch that ends and the one that begins
                del self._layouts[min(self._layouts)]
            count = len(self._sizes)
            shards = permutation(torch.arange(count), count, stream="order/shards", seed=self.seed, epoch=epoch)
            ends = self._sizes[shards].cumsum(0)
            last = torch.arange(self.window - 1, count + self.window - 1, self.window).clamp(max=count - 1)
            self._layouts[epoch] = _Layout(shards, ends, ends[last])
        return self._layouts[epoch]


class _Layout(NamedTuple):
    """An epoch of a ``WindowedStream``: its shards in order, and the places at which they and the windows end."""

    shards: Tensor
    shard_ends: Tensor
    window_ends: Tensor


def _make_rows(positions: range, num_samples: int, samples: Callable[[Tensor, int], Tensor]) -> Rows:
    """Returns the rows at some positions; ``samples(places, epoch)`` are the samples at rising places of one epoch."""
    position = torch.arange(positions.start, positions.stop)
    index, epoch = torch.empty_like(position), torch.empty_like(position)
    # Numbers, not tensors, up to here: a batch of tokens takes less time to read than ten operations on its rows.
    for number in range(positions.start // num_samples, (positions.stop - 1) // num_samples + 1):
        first = number * num_samples
        places = range(max(positions.start - first, 0), min(positions.stop - first, num_samples))
        rows = slice(first + places.start - positions.start, first + places.stop - positions.start)
        index[rows] = samples(torch.arange(places.start, places.stop), number)
        epoch[rows] = number
    return Rows(index, epoch, position, torch.ones_like(position, dtype=torch.bool))


def _permute(place: Tensor, size: int, seed: int, epoch: int, *, window: int = 0, cached: bool) -> Tensor:
    if cached:
        return _full_permutation(size, seed, epoch, window)[place]
    return permutation(place, size, stream="order", seed=seed, index=window, epoch=epoch)


@lru_cache(maxsize=2)
def _full_permutation(size: int, seed: int, epoch: int, window: int) -> Tensor:
    """(size,) int64; in pieces that stay in the processor's cache."""
    pieces = [torch.arange(first, min(first + 2**14, size)) for first in range(0, size, 2**14)]
    return torch.cat([_permute(piece, size, seed, epoch, window=window, cached=False) for piece in pieces])


@dataclass(frozen=True)
class InOrder:
    """Validation: position i is sample i; positions past the end repeat the last sample and are not valid."""

    num_samples: int

    def __call__(self, positions: range) -> Rows:
        """Sample of each position."""
        position = torch.arange(positions.start, positions.stop)
        index = position.clamp(max=self.num_samples - 1)
        return Rows(index, torch.zeros_like(position), position, position < self.num_samples)


class TrainBatchSampler(Sampler[range]):
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


class EvalBatchSampler(Sampler[range]):
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
        self.per_device = per_device
        self.stride = per_device * world_size
        self._starts = range(start, num_samples, self.stride)  # of the batches of all ranks
        self._own = rank * per_device

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[range]:
        firsts = (start + self._own for start in self._starts)
        return (range(first, first + self.per_device) for first in firsts)

"""Several processes that measure together: each takes a share of the rows, and all see the same whole.

What is measured a row at a time is gathered and put into the order of the rows before anything is summed, so a number
is the same to the last bit on any number of ranks.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

__all__ = ["barrier", "gather_rows", "mean_over_ranks", "own_rows", "process_group", "rank_and_world"]

_TIMEOUT = datetime.timedelta(days=7)  # one rank may train a classifier while the others wait


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the processes that ``torchrun`` started (RANK, WORLD_SIZE ...); yields whether there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield rank_and_world()[1] > 1
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)  # what is gathered lies on the CPU
    try:
        yield True
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for the other ranks; alone, does nothing."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def own_rows(count: int) -> range:
    """The rows of ``count`` that this rank measures: rank, rank + world size, ..."""
    rank, world_size = rank_and_world()
    return range(rank, count, world_size)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """The rows of all ranks in the order of their index, the same on each rank.

    Args:
        rows: (n, ...) of this rank, on the CPU, n at least 0.
        index: (n,) int64: which row of the whole each is, no two alike.

    Returns:
        (sum of n, ...), sorted by index.
    """
    if rank_and_world()[1] > 1:
        rows, index = (torch.cat(gather_all_tensors(part.contiguous())) for part in (rows, index))
    return rows[index.argsort()]


def mean_over_ranks(value: Tensor) -> Tensor:
    """Computes the mean of a tensor over all ranks, without a gradient; ``value`` may be overwritten."""
    world_size = rank_and_world()[1]
    if world_size == 1:
        return value
    dist.all_reduce(value)
    return value / world_size

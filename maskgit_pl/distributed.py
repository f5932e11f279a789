"""The ranks of a process group.

Collectives: sums, means, gathered rows, and errors that all ranks raise. Without a process group, each
function behaves as for a single process, so callers do not check whether there is one. Measurements gather
their rows and sort them before they sum, so a result is bit-exact on any number of ranks.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_TIMEOUT = datetime.timedelta(days=7)  # one rank may train a classifier while the others wait

_Result = TypeVar("_Result")


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of ranks; (0, 1) outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the processes that ``torchrun`` started (RANK, WORLD_SIZE ...); yields True if there are several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield rank_and_world()[1] > 1
        return
    # gloo, since gathered tensors are on the CPU.
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield True
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Waits for the other ranks, if there are any."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def new_group() -> dist.ProcessGroup | None:
    """Makes a group of all ranks for another thread, whose collectives may run beside those of the default group.

    Must be called on all ranks. None for one process.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if rank_and_world()[1] > 1 else None


def on_all_ranks(work: Callable[[], _Result], group: dist.ProcessGroup | None = None) -> list[_Result]:
    """Calls a function on each rank; returns the results of all, which are pickled, in the order of the ranks.

    The OSError or ValueError of the lowest failed rank is raised on all; else the others would wait forever.
    ``group`` has all ranks; None is the default group.
    """
    world_size = rank_and_world()[1]
    if world_size == 1:
        return [work()]
    outcome: tuple[_Result | None, OSError | ValueError | None]
    try:
        outcome = work(), None
    except (OSError, ValueError) as error:
        outcome = None, error
    # Errors travel as values, so that every rank reaches the collective.
    outcomes: list[Any] = [None] * world_size
    dist.all_gather_object(outcomes, outcome, group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum of tensors of the same shape over the ranks, differentiable; the tensor for one process."""
    if rank_and_world()[1] == 1:
        return value
    total: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]  # torch: untyped
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of tensors of the same shape over the ranks, differentiable; the tensor for one process."""
    world_size = rank_and_world()[1]
    return value if world_size == 1 else sum_over_ranks(value) / world_size


def max_over_ranks(value: Tensor) -> Tensor:
    """Returns the elementwise maximum of a tensor of the same shape over the ranks, without a gradient."""
    if rank_and_world()[1] == 1:
        return value
    largest = value.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def own_rows(count: int) -> range:
    """Returns the rows of ``count`` that this rank measures: rank, rank + world size, ..."""
    rank, world_size = rank_and_world()
    return range(rank, count, world_size)


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks. Its gradient is the sum over the ranks of the incoming gradients.

    torch's ``distributed.nn.functional.all_reduce`` does the same, but is deprecated without a public successor.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total

"""Collectives over the ranks of a process group: rank, sums, gathered rows, and errors that all ranks raise.

Without a process group, each function behaves as for a single process, so callers do not check whether there is one.
Measurements gather their rows and sort them before they sum, so a result is bit-exact on any number of ranks.
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

__all__ = [
    "barrier",
    "gather_rows",
    "max_over_ranks",
    "mean_over_ranks",
    "on_all_ranks",
    "own_rows",
    "process_group",
    "rank_and_world",
    "sum_over_ranks",
]

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


def on_all_ranks(work: Callable[[], _Result]) -> list[_Result]:
    """Calls a function on each rank and returns the results of all, in the order of the ranks.

    An error of one rank is raised on all ranks; otherwise the others would wait for it forever.

    Args:
        work: Called once on each rank. Its result is pickled if there are several ranks.

    Raises:
        OSError: the error of the lowest rank that failed.
        ValueError: the same.
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
    dist.all_gather_object(outcomes, outcome)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def sum_over_ranks(value: Tensor) -> Tensor:
    """Returns the sum of a tensor over the ranks, differentiable; the tensor itself for a single process.

    Args:
        value: Tensor with the same shape on each rank; it is not changed.
    """
    if rank_and_world()[1] == 1:
        return value
    total: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call]  # torch: untyped
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Returns the mean of a tensor over the ranks, differentiable; the tensor itself for a single process.

    Args:
        value: Tensor with the same shape on each rank; it is not changed.
    """
    world_size = rank_and_world()[1]
    return value if world_size == 1 else sum_over_ranks(value) / world_size


def max_over_ranks(value: Tensor) -> Tensor:
    """Returns the elementwise maximum of a tensor over the ranks, without a gradient.

    Args:
        value: Tensor with the same shape on each rank; it is not changed.
    """
    if rank_and_world()[1] == 1:
        return value
    largest = value.detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


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


def own_rows(count: int) -> range:
    """Returns the rows of ``count`` that this rank measures: rank, rank + world size, ..."""
    rank, world_size = rank_and_world()
    return range(rank, count, world_size)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Returns the rows of all ranks in the order of their index, the same on each rank.

    Args:
        rows: (n, ...) on the CPU, the rows of this rank, n >= 0. Ranks may have different n.
        index: (n,) int64, place of each row in the whole; all different.

    Returns:
        (sum of n, ...), sorted by index.
    """
    if rank_and_world()[1] > 1:
        from torchmetrics.utilities.distributed import gather_all_tensors  # inference needs no torchmetrics

        rows, index = (torch.cat(gather_all_tensors(part.contiguous())) for part in (rows, index))
    # The order of rows does not depend on the number of ranks, so neither do sums over them.
    return rows[index.argsort()]

"""Counts the bytes that a step sends in the collectives of DDP and FSDP2, also on torch's ``fake`` backend.

``scaling.py`` and the tests of ``maskgit_pl/estimates`` compare them with the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from maskgit_pl.estimates.sharding import Traffic, all_reduce_bytes

__all__ = ["CountedCollectives"]

_KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
}


class CountedCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch: untyped
    """A dispatch mode that sums the bytes of all collectives, each with the size of the whole tensor.

    Attributes:
        sizes: Bytes by kind: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast``.
        calls: Number of collectives by kind.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch: untyped
        self.sizes = dict.fromkeys(_KINDS.values(), 0)
        self.calls = dict.fromkeys(_KINDS.values(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, and counts it if it is a collective."""
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            kind = _KINDS.get(name.partition(".")[0])
            assert kind is not None, f"{func.name()} is not counted"
            self.calls[kind] += 1
            # The larger of input and output is the whole tensor: the gathered one, or the one to scatter.
            self.sizes[kind] += max(_bytes(argument) for argument in args)
        return func(*args, **(kwargs or {}))

    def follow(self, wrapped: DistributedDataParallel) -> None:
        """Counts the all-reduces of DDP, which bypass dispatch modes, instead of running them."""
        wrapped.register_comm_hook(self, lambda counted, bucket: _count_bucket(counted, bucket))

    def traffic(self, ranks: int) -> Traffic:
        """Returns the bytes that each rank sends for the collectives in a ring; a broadcast counts with its size."""
        share = (ranks - 1) / ranks
        return Traffic(
            all_reduce=all_reduce_bytes(self.sizes["all_reduce"], ranks),
            all_gather=share * self.sizes["all_gather"],
            reduce_scatter=share * self.sizes["reduce_scatter"],
            broadcast=float(self.sizes["broadcast"]),
        )


def _count_bucket(counted: CountedCollectives, bucket: Any) -> Future[Tensor]:
    counted.sizes["all_reduce"] += _bytes(bucket.buffer())
    counted.calls["all_reduce"] += 1
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.ScriptObject):  # the process group argument
        return 0
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0

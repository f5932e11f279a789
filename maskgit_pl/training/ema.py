"""The exponential moving average of a network's weights, kept as a frozen copy of the network.

The copy is a submodule, so that it is sharded, moved and saved as the rest of a LightningModule is. Evaluation, sample
pictures and exports use it.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

__all__ = ["frozen_copy", "update_ema"]

Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(network: Network) -> Network:
    """Returns a deep copy that is not trained and stays in evaluation mode."""
    duplicate = copy.deepcopy(network).requires_grad_(requires_grad=False).eval()
    duplicate.train = lambda mode=True: duplicate  # type: ignore[method-assign]  # Lightning calls train() on all
    return duplicate


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, *, decay: float, step: int) -> None:
    """Updates the average: ema <- d ema + (1 - d) source, with d = min(decay, (1 + step) / (10 + step)).

    Buffers are copied. Works on the local shards of sharded parameters.

    Args:
        ema: The average, made by ``frozen_copy`` from ``source``.
        source: The trained network.
        decay: Upper bound of d, in [0, 1).
        step: Number of steps before this one. The ramp makes early averages forget the initial weights.
    """
    _reshard(ema)
    weight = 1 - min(decay, (1 + step) / (10 + step))
    averaged = [_local(parameter) for parameter in ema.parameters()]
    torch._foreach_lerp_(averaged, [_local(parameter) for parameter in source.parameters()], weight)
    for kept, new in zip(ema.buffers(), source.buffers(), strict=True):
        kept.copy_(new)


def _reshard(network: nn.Module) -> None:
    """Shards the root's parameters again, which FSDP2 leaves whole after a forward without a backward (validation)."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()

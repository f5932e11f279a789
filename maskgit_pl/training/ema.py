"""Exponential moving average (EMA) of the weights of a network, kept as a frozen copy of the network.

The copy is a submodule, so that it is sharded, moved and saved with the rest of the LightningModule. Validation, sample
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
    """Returns a deep copy that requires no gradients and stays in evaluation mode."""
    duplicate = copy.deepcopy(network).requires_grad_(requires_grad=False).eval()
    duplicate.train = lambda mode=True: duplicate  # type: ignore[method-assign]  # Lightning calls train() on every submodule
    return duplicate


@torch.no_grad()
def update_ema(ema: nn.Module, source: nn.Module, *, decay: float, step: int) -> None:
    """Updates the moving average in place.

        ema <- d ema + (1 - d) source,  d = min(decay, (1 + step) / (10 + step))

    Buffers are copied. Sharded parameters are updated shard by shard, without communication.

    Args:
        ema: The average, made by ``frozen_copy`` from ``source``.
        source: The trained network.
        decay: Upper bound of d, in [0, 1).
        step: Number of steps before this one, >= 0. The ramp lets early averages forget the initial weights.
    """
    _reshard(ema)
    weight = 1 - min(decay, (1 + step) / (10 + step))
    # lerp: ema + (1 - d) (source - ema), in one kernel for many tensors.
    averaged = [_local(parameter) for parameter in ema.parameters()]
    torch._foreach_lerp_(averaged, [_local(parameter) for parameter in source.parameters()], weight)
    for kept, new in zip(ema.buffers(), source.buffers(), strict=True):
        kept.copy_(new)


def _reshard(network: nn.Module) -> None:
    """Frees gathered parameters: FSDP2 keeps those of the root after a forward pass without a backward pass."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()

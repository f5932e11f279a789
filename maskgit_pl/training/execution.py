"""How a network's blocks are executed in training: what they keep for the backward pass, and who runs their kernels.

Neither changes what is learned. Both replace the blocks' ``forward`` in place: names in a state dict stay as they are,
and the hooks with which DDP and FSDP2 follow a block stay outside, neither compiled nor run a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskgit_pl.registry import nearest

__all__ = ["ActivationCheckpointing", "Compiled", "prepare_blocks"]

ActivationCheckpointing = Literal["none", "blocks"]
Compiled = Literal["none", "blocks"]


def prepare_blocks(
    blocks: Iterable[nn.Module],
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    compiled: Compiled = "none",
) -> None:
    """Has blocks run as a recipe says; called once, before they are sharded, on the network that is trained alone.

    Args:
        blocks: Whose ``forward`` gets tensors and gives one.
        activation_checkpointing: ``blocks``: each keeps its inputs alone for the backward pass, which runs it again,
            with the same dropout. Losses and gradients are the same to the last bit.
        compiled: ``blocks``: each is compiled when it first runs, by ``torch.compile``; products and sums are rounded
            in another order then, and dropout draws other numbers.

    Raises:
        ValueError: Another word.
    """
    for name, value, words in (
        ("activation_checkpointing", activation_checkpointing, get_args(ActivationCheckpointing)),
        ("compiled", compiled, get_args(Compiled)),
    ):
        if value not in words:
            raise ValueError(f"model.{name} {value!r}: {nearest(value, words)}")
    for block in blocks:
        if compiled == "blocks":
            block.forward = torch.compile(block.forward)
        if activation_checkpointing == "blocks":  # around the compiled one: the other way round nothing is compiled
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

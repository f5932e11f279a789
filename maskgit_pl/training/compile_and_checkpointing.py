"""Execution of a network's blocks in training: activation checkpointing and ``torch.compile``.

Neither changes what is learned. Both replace the blocks' ``forward`` in place: the names in a state dict stay as they
are, and the hooks with which DDP and FSDP2 follow a block stay outside, neither compiled nor run a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ActivationCheckpointing", "Compiled", "prepare_blocks"]

ActivationCheckpointing = Literal["none", "blocks"]
Compiled = Literal["none", "blocks"]


def prepare_blocks(
    blocks: Iterable[nn.Module],
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    compiled: Compiled = "none",
) -> None:
    """Sets how blocks are executed; called once on the trained network only, before it is sharded.

    Args:
        blocks: Modules whose ``forward`` takes tensors and returns one.
        activation_checkpointing: ``blocks`` keeps only the inputs of each block for the backward pass, which runs the
            block again, with the same dropout. Losses and gradients are bit-exact.
        compiled: ``blocks`` compiles each block with ``torch.compile`` when it first runs. Products and sums are then
            rounded in a different order, and dropout draws other numbers.
    """
    for block in blocks:
        if compiled == "blocks":
            block.forward = torch.compile(block.forward)
        if activation_checkpointing == "blocks":  # around the compiled forward: the other way round compiles nothing
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

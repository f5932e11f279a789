"""Activation checkpointing and compilation of the blocks of a network.

Both replace the ``forward`` of the blocks in place instead of wrapping the blocks. The names in a state dict do not
change, and the hooks of DDP and FSDP2 are neither compiled nor run a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ActivationCheckpointing = Literal["none", "blocks"]
Compiled = Literal["none", "blocks"]


def prepare_blocks(
    blocks: Iterable[nn.Module],
    *,
    activation_checkpointing: ActivationCheckpointing = "none",
    compiled: Compiled = "none",
) -> None:
    """Applies activation checkpointing and compilation to blocks.

    Must be called once, on the trained network and not on its average, before it is sharded.

    Args:
        blocks: Modules whose ``forward`` takes tensors and returns one.
        activation_checkpointing: ``blocks`` keeps only the inputs of each block for the backward pass, which
            runs the block again with the same dropout mask. Losses and gradients are bit-exact.
        compiled: ``blocks`` compiles each block with ``torch.compile`` at its first call. Sums are then
            rounded in a different order, and dropout draws different numbers.
    """
    for block in blocks:
        if compiled == "blocks":
            block.forward = torch.compile(block.forward)
        # Checkpointing goes around the compiled forward; in the other order, nothing would be compiled.
        if activation_checkpointing == "blocks":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

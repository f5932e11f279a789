"""What lies on each rank and what travels between ranks in a step, under ``ddp`` and under ``fsdp`` (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

__all__ = [
    "FLOAT",
    "HALF",
    "Group",
    "Strategy",
    "Traffic",
    "all_reduce_bytes",
    "ddp_traffic",
    "fsdp_traffic",
    "group_of",
]

Strategy = Literal["auto", "ddp", "fsdp"]

FLOAT = 4
"""Bytes of a weight, a gradient, a moment: both precisions of the recipes keep them in float32."""
HALF = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Group:
    """Trained tensors that FSDP2 gathers and scatters in one collective: a block, or what is in no block (the root).

    Attributes:
        shapes: Of each tensor; the first dimension is the one that is sharded.
    """

    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    def shard(self, ranks: int, rank: int = 0) -> int:
        """Numbers that lie on a rank; rank 0 has the most.

        FSDP2 cuts each tensor along its rows, as ``torch.chunk``: with c = ceil(rows / n), rank r holds rows
        [r c, (r + 1) c), as far as there are any. With more ranks than rows the last ranks hold none.
        """
        return sum(_rows(shape[0], ranks, rank) * math.prod(shape[1:]) for shape in self.shapes)

    def padded(self, ranks: int) -> int:
        """Numbers that a collective moves for this group, all ranks together: n times rank 0's shard.

        Collectives want equal parts: ranks with fewer rows send zeros for the rest. At 512 ranks a bias of 768 counts
        as 1024.
        """
        return ranks * self.shard(ranks)


def _rows(rows: int, ranks: int, rank: int) -> int:
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk))


def group_of(modules: Iterable[nn.Module]) -> Group:
    """The trained tensors of modules, which may be on the meta device."""
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return Group(tuple(tuple(parameter.shape) for parameter in trained))


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in a step, of one global batch; it receives as many.

    Attributes:
        all_reduce: Gradients under DDP, and what ranks agree on.
        all_gather: Weights under FSDP2, forward and backward.
        reduce_scatter: Gradients under FSDP2.
        broadcast: Buffers that DDP takes from rank 0 before each forward pass; only rank 0's tree sends them.
    """

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    broadcast: float = 0.0

    @property
    def total(self) -> float:
        """Bytes."""
        return self.all_reduce + self.all_gather + self.reduce_scatter + self.broadcast


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Bytes that each of n ranks sends when they all-reduce ``size`` bytes in a ring: 2 (n - 1) / n size.

    A reduce-scatter and an all-gather, each of n - 1 rounds in which every rank passes size / n on.
    """
    return 2 * (ranks - 1) / ranks * size


def ddp_traffic(groups: Sequence[Group], ranks: int, *, buffers: int = 0, micro_batches: int = 1) -> Traffic:
    """DDP: gradients are all-reduced once a step, in the last micro-batch; buffers are broadcast before each.

    Args:
        groups: All that is trained.
        ranks: n.
        buffers: Bytes of the buffers of what DDP wraps.
        micro_batches: Forward passes of a step on each rank.
    """
    if ranks == 1:
        return Traffic()
    gradients = FLOAT * sum(group.numel for group in groups)
    return Traffic(all_reduce=all_reduce_bytes(gradients, ranks), broadcast=float(micro_batches * buffers))


def fsdp_traffic(
    blocks: Sequence[Group], root: Group, ranks: int, *, micro_batches: int = 1, weight: int = FLOAT
) -> Traffic:
    """FSDP2: in each micro-batch a block is gathered twice and the root once, and each gradient is scattered once.

    A block's weights are given up after its forward pass and gathered again for its backward pass; the root's, the tied
    word table among them, stay from the one to the other. In a ring, a collective over padded size s makes each rank
    send (n - 1) / n s. Recomputing a block's activations gathers nothing more: its weights are there by then. Gradients
    are scattered in every micro-batch, since Lightning suspends that for DDP alone.

    Args:
        blocks: Each sharded as a group of its own.
        root: The rest.
        ranks: n.
        micro_batches: Forward and backward passes of a step on each rank.
        weight: Bytes in which a weight travels: ``HALF`` under bf16-mixed. Gradients travel in float32.
    """
    share = (ranks - 1) / ranks * micro_batches
    in_blocks = sum(block.padded(ranks) for block in blocks)
    in_root = root.padded(ranks)
    return Traffic(
        all_gather=share * weight * (2 * in_blocks + in_root), reduce_scatter=share * FLOAT * (in_blocks + in_root)
    )

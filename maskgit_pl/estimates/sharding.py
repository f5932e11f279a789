"""Parameters per rank, and traffic between ranks in a step, with ``ddp`` and with ``fsdp`` (FSDP2)."""

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
"""Bytes of a weight, a gradient or a moment: float32 in both precisions."""
HALF = 2
"""Bytes of a bfloat16 number."""


@dataclass(frozen=True)
class Group:
    """The trained tensors that FSDP2 handles in one collective: those of a block, or all others (the root).

    Attributes:
        shapes: Shape of each tensor; the first dimension is sharded.
    """

    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def shard(self, ranks: int, rank: int = 0) -> int:
        """Returns the number of parameters that a rank holds; rank 0 holds the most.

        FSDP2 splits each tensor along its first dimension, as ``torch.chunk`` does: with n ranks and
        c = ceil(rows / n), rank r holds the existing rows of [r c, (r + 1) c). With more ranks than rows, the last
        ranks hold none.
        """
        return sum(_rows(shape[0], ranks, rank) * math.prod(shape[1:]) for shape in self.shapes)

    def padded_numel(self, ranks: int) -> int:
        """Returns the number of parameters that a collective moves over all n ranks: n times the shard of rank 0.

        Collectives need equal parts, so ranks with fewer rows send padding. With 512 ranks, a bias of 768 counts as
        1024.
        """
        return ranks * self.shard(ranks)


def _rows(rows: int, ranks: int, rank: int) -> int:
    chunk = -(-rows // ranks)  # rounded up
    return max(0, min(chunk, rows - rank * chunk))


def group_of(modules: Iterable[nn.Module]) -> Group:
    """Returns the group of the trained tensors of modules. They may be on the meta device."""
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return Group(tuple(tuple(parameter.shape) for parameter in trained))


@dataclass(frozen=True)
class Traffic:
    """The bytes that each rank sends in a step (one global batch); it receives the same number.

    Attributes:
        all_reduce: Gradients under DDP.
        all_gather: Weights under FSDP2, forward and backward.
        reduce_scatter: Gradients under FSDP2.
        broadcast: Buffers that DDP broadcasts from rank 0 before each forward pass, along a tree.
    """

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    broadcast: float = 0.0

    @property
    def total(self) -> float:
        """The sum over all collectives."""
        return self.all_reduce + self.all_gather + self.reduce_scatter + self.broadcast


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Returns the bytes that each of n ranks sends to all-reduce ``size`` bytes in a ring: 2 (n - 1) / n size.

    A ring all-reduce is a reduce-scatter and an all-gather. Each has n - 1 rounds in which every rank sends size / n.
    """
    return 2 * (ranks - 1) / ranks * size


def ddp_traffic(groups: Sequence[Group], ranks: int, *, buffers: int = 0, micro_batches: int = 1) -> Traffic:
    """Returns the traffic of DDP: one all-reduce of the gradients, and buffers broadcast before each micro-batch.

    Args:
        groups: All trained tensors.
        ranks: Number of ranks.
        buffers: Bytes of the buffers of the networks that DDP wraps.
        micro_batches: Micro-batches of a step on each rank.
    """
    if ranks == 1:
        return Traffic()
    # Only the last micro-batch of a step synchronizes gradients (no_sync in the others).
    gradients = FLOAT * sum(group.numel for group in groups)
    return Traffic(all_reduce=all_reduce_bytes(gradients, ranks), broadcast=float(micro_batches * buffers))


def fsdp_traffic(
    blocks: Sequence[Group], root: Group, ranks: int, *, micro_batches: int = 1, weight: int = FLOAT
) -> Traffic:
    """Returns the traffic of FSDP2.

    In each micro-batch, a block is gathered twice, since its weights are freed after the forward pass and gathered
    again for the backward pass. The root, which has the tied token embedding, is gathered once. Activation
    checkpointing adds no traffic: the weights are gathered by the time that a block is recomputed.

    Gradients are reduce-scattered in every micro-batch, since Lightning skips this only for DDP. In a ring, each rank
    sends (n - 1) / n s for a collective of padded size s.

    Args:
        blocks: Groups of the blocks.
        root: Group of all other parameters.
        ranks: Number of ranks.
        micro_batches: Micro-batches of a step on each rank.
        weight: Bytes of a weight in an all-gather: ``HALF`` under bf16-mixed. Gradients are sent in float32.
    """
    # Fraction of a collective that a rank sends in a ring, over all micro-batches.
    share = (ranks - 1) / ranks * micro_batches
    in_blocks = sum(block.padded_numel(ranks) for block in blocks)
    in_root = root.padded_numel(ranks)
    return Traffic(
        all_gather=share * weight * (2 * in_blocks + in_root), reduce_scatter=share * FLOAT * (in_blocks + in_root)
    )

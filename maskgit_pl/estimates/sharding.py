"""Parameters of each rank, and traffic between ranks in a step, under ``ddp`` and under ``fsdp`` (FSDP2)."""

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
"""Bytes of a weight, a gradient or a moment, which are float32 in both precisions."""
HALF = 2
"""Bytes of a bfloat16 number."""


@dataclass(frozen=True)
class Group:
    """Trained tensors that FSDP2 gathers and scatters in one collective: those of a block, or of no block (the root).

    Attributes:
        shapes: Shape of each tensor; the first dimension is sharded.
    """

    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def shard(self, ranks: int, rank: int = 0) -> int:
        """Returns the number of parameters that a rank holds; rank 0 holds the most.

        FSDP2 splits each tensor along its rows, as ``torch.chunk`` does: with c = ceil(rows / n), rank r holds the rows
        [r c, (r + 1) c) that exist. With more ranks than rows the last ranks hold none.
        """
        return sum(_rows(shape[0], ranks, rank) * math.prod(shape[1:]) for shape in self.shapes)

    def padded_numel(self, ranks: int) -> int:
        """Returns the number of parameters that a collective moves over all ranks: n times rank 0's shard.

        Collectives need equal parts: ranks with fewer rows send zeros for the rest. With 512 ranks a bias of 768 counts
        as 1024.
        """
        return ranks * self.shard(ranks)


def _rows(rows: int, ranks: int, rank: int) -> int:
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk))


def group_of(modules: Iterable[nn.Module]) -> Group:
    """Returns the group of the trained tensors of modules, which may be on the meta device."""
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return Group(tuple(tuple(parameter.shape) for parameter in trained))


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in a step of one global batch; it receives as many.

    Attributes:
        all_reduce: Gradients under DDP.
        all_gather: Weights under FSDP2, forward and backward.
        reduce_scatter: Gradients under FSDP2.
        broadcast: Buffers that DDP takes from rank 0 before each forward pass; they are sent along a tree.
    """

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0
    broadcast: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all collectives."""
        return self.all_reduce + self.all_gather + self.reduce_scatter + self.broadcast


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Returns the bytes that each of n ranks sends to all-reduce ``size`` bytes in a ring: 2 (n - 1) / n size.

    The ring is a reduce-scatter and an all-gather, each of n - 1 rounds in which every rank sends size / n.
    """
    return 2 * (ranks - 1) / ranks * size


def ddp_traffic(groups: Sequence[Group], ranks: int, *, buffers: int = 0, micro_batches: int = 1) -> Traffic:
    """Returns the traffic of DDP: gradients are all-reduced once a step, buffers broadcast before each micro-batch.

    Args:
        groups: All trained tensors.
        ranks: Number of ranks.
        buffers: Bytes of the buffers of the networks that DDP wraps.
        micro_batches: Micro-batches of a step on each rank.
    """
    if ranks == 1:
        return Traffic()
    gradients = FLOAT * sum(group.numel for group in groups)
    return Traffic(all_reduce=all_reduce_bytes(gradients, ranks), broadcast=float(micro_batches * buffers))


def fsdp_traffic(
    blocks: Sequence[Group], root: Group, ranks: int, *, micro_batches: int = 1, weight: int = FLOAT
) -> Traffic:
    """Returns the traffic of FSDP2: in each micro-batch a block is gathered twice, the root once, gradients scattered.

    A block's weights are freed after its forward pass and gathered again for its backward pass; the root's, with the
    tied token embedding, are kept from one to the other. In a ring, each rank sends (n - 1) / n s for a collective of
    padded size s. Recomputing a block's activations gathers nothing more, since its weights are gathered by then.
    Gradients are scattered in every micro-batch: Lightning suspends that only for DDP.

    Args:
        blocks: Groups that are sharded one by one.
        root: The rest.
        ranks: Number of ranks.
        micro_batches: Micro-batches of a step on each rank.
        weight: Bytes of a weight as it is sent: ``HALF`` under bf16-mixed. Gradients are sent in float32.
    """
    share = (ranks - 1) / ranks * micro_batches
    in_blocks = sum(block.padded_numel(ranks) for block in blocks)
    in_root = root.padded_numel(ranks)
    return Traffic(
        all_gather=share * weight * (2 * in_blocks + in_root), reduce_scatter=share * FLOAT * (in_blocks + in_root)
    )

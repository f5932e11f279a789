"""Memory of a rank with ``ddp`` and with ``fsdp`` (FSDP2), and checkpoints on disk, from the sizes of all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

__all__ = [
    "FLOAT",
    "HALF",
    "Activations",
    "Group",
    "Memory",
    "Strategy",
    "checkpoint_bytes",
    "estimate_memory",
    "group_of",
    "max_num_checkpoints",
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
        """Returns the number of parameters of a buffer that is gathered from n ranks: n times the shard of rank 0.

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
class Activations:
    """The memory of one micro-batch on a rank in bytes, without weights and gradients.

    Attributes:
        kept: Tensors that the forward pass keeps for the backward pass.
        casts: bfloat16 copies of weights, which are kept equally long.
        working: Temporary tensors at the peak.
    """

    kept: int
    casts: int
    working: int

    @property
    def total(self) -> int:
        """The sum of all parts: the peak memory in bytes."""
        return self.kept + self.casts + self.working


@dataclass(frozen=True)
class Memory:
    """The peak memory of a step on the rank with the largest share, in bytes, without the device's own context.

    Attributes:
        weights: Trained weights, or this rank's shard of them.
        gradients: Gradients, the same size.
        moments: State of the optimizer: twice that size for the two moments of AdamW.
        average: Moving average of the weights, if there is one.
        frozen: Weights of networks that are not trained: tokenizer, perceptual network.
        gathered: Whole weights and gradients that FSDP2 holds temporarily.
        casts: bfloat16 copies of weights.
        activations: Tensors that the forward pass keeps for the backward pass.
        working: Temporary tensors at the peak.
    """

    weights: int = 0
    gradients: int = 0
    moments: int = 0
    average: int = 0
    frozen: int = 0
    gathered: int = 0
    casts: int = 0
    activations: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(
    blocks: Sequence[Group],
    root: Group,
    activations: Activations,
    *,
    strategy: Strategy,
    ranks: int,
    averaged: int | None = None,
    frozen: int = 0,
    moments: float = 2.0,
) -> Memory:
    """Estimates the peak memory of a rank.

    With AdamW, each trained parameter takes 20 bytes: 4 as a weight, 4 as a gradient, 8 in two moments and 4 in the
    average.
    ``auto`` and ``ddp`` hold all of them (DDP's buckets are the gradients themselves), ``fsdp`` holds shards.

    At its peak, FSDP2 also holds, unsharded:

    - weights and gradients of the root;
    - weights of the current block and of the next one, which is prefetched, and the buffer of that all-gather;
    - gradients of one block, and the buffer of their reduce-scatter.

    Under bf16-mixed, FSDP2 gathers weights in bfloat16, and autocast makes no copies. The estimate is an upper bound,
    since it counts all gradients although activations are freed while gradients appear.

    Args:
        blocks: Groups that FSDP2 gathers one after the other.
        root: Group of all other parameters.
        activations: Activations of a micro-batch. Casts in it mean that the precision is bf16-mixed.
        strategy: Strategy of the Trainer.
        ranks: Number of ranks.
        averaged: Number of averaged parameters; None means all trained parameters.
        frozen: Bytes of networks that are not trained.
        moments: Values of the optimizer's state for each trained parameter; 2 for AdamW.
    """
    groups = [*blocks, root]
    whole = sum(group.numel for group in groups)
    own = sum(group.shard(ranks) for group in groups) if strategy == "fsdp" else whole
    gathered, casts = 0, activations.casts
    if strategy == "fsdp":
        largest = max((block.padded_numel(ranks) for block in blocks), default=0)
        weight, casts = (HALF, 0) if casts else (FLOAT, 0)  # casts replaced by gathered bfloat16 weights
        # Weights: root, two blocks, one buffer. Gradients: root, one block, one buffer.
        gathered = weight * (root.padded_numel(ranks) + 3 * largest) + FLOAT * (root.padded_numel(ranks) + 2 * largest)
    return Memory(
        weights=FLOAT * own,
        gradients=FLOAT * own,
        moments=round(moments * FLOAT * own),
        average=FLOAT * (own if averaged is None else averaged),
        frozen=frozen,
        gathered=gathered,
        casts=casts,
        activations=activations.kept,
        working=activations.working,
    )


def checkpoint_bytes(trained: int, *, averaged: int, others: int = 0, tensors: int = 0, moments: float = 2.0) -> int:
    """Estimates the size of a checkpoint in bytes.

    With AdamW, a trained parameter takes 12 bytes (weight and two moments); an averaged parameter takes 4. The strategy
    does not change the size. Each tensor adds about 1,200 bytes: its names in the header and in ``state.json``, and its
    step counts.

    Args:
        trained: Number of trained parameters.
        averaged: Number of averaged parameters.
        others: Bytes of buffers.
        tensors: Number of trained tensors.
        moments: Values of the optimizer's state for each trained parameter; 2 for AdamW.
    """
    return round((1 + moments) * FLOAT * trained) + FLOAT * averaged + others + 1200 * tensors


def max_num_checkpoints(max_steps: int, *, every: int, keep_last: int, keep_every: int | None) -> int:
    """Returns the largest number of checkpoints that a run has on disk at the same time.

    These are the ``keep_last`` newest, another one that is being written, and all older ones whose step is a multiple
    of ``keep_every``.

    Args:
        max_steps: Steps of the run. The last step always has a checkpoint.
        every: Steps between checkpoints.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Older checkpoints of multiples of this step are kept, too; None keeps none of them.
    """
    count = -(-max_steps // every)  # the last step has a checkpoint even if it is no multiple
    # One more than keep_last: the oldest is removed only after the new one is complete.
    newest = min(count, keep_last + 1)
    # All older ones are multiples of every: every, 2 every, ...
    older = 0 if keep_every is None else (count - newest) * every // math.lcm(every, keep_every)
    return newest + older

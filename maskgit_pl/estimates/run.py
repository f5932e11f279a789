"""Bytes of a rank's memory and of the disk, seconds of a step, data a second: from what the parts need to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from maskgit_pl.estimates.sharding import FLOAT, HALF, Group, Strategy, Traffic
from maskgit_pl.estimates.transformer import Activations

__all__ = ["Memory", "StepTime", "checkpoint_bytes", "kept_checkpoints", "memory_of", "step_time"]


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank at the highest point of a step; the device's own context is not in it.

    Attributes:
        weights: Trained ones, this rank's part.
        gradients: As many.
        moments: AdamW's two, twice as many.
        average: The moving average of the weights, as many where there is one.
        frozen: Other networks' weights: tokenizer, perceptual network.
        gathered: Whole weights and gradients that FSDP2 holds for a moment.
        casts: bfloat16 copies of weights.
        activations: What forward passes keep.
        working: What comes on top for a moment.
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
        """Bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory_of(
    blocks: Sequence[Group],
    root: Group,
    activations: Activations,
    *,
    strategy: Strategy,
    ranks: int,
    averaged: int | None = None,
    frozen: int = 0,
) -> Memory:
    """The memory of a rank.

    Each trained number takes 4 bytes as a weight, 4 as a gradient, 8 in AdamW's moments and 4 in the average: 20, whole
    under ``auto`` and ``ddp`` (whose buckets are the gradients themselves), in shards under ``fsdp``. FSDP2 then holds
    whole, at the highest point: weights and gradients of the root; weights of the block at work and of the next, which
    is gathered meanwhile, with the buffer of that; the gradients of a block and the buffer of their scattering. Weights
    are gathered in bfloat16 under bf16-mixed, where autocast's copies fall away. Gradients are counted in full although
    they come while activations go: an upper bound.

    Args:
        blocks: Groups that FSDP2 gathers one after the other.
        root: The rest.
        activations: Of a micro-batch; copies of weights in it say that the precision is bf16-mixed.
        strategy: How the ranks share.
        ranks: n.
        averaged: Numbers of the average; None: as many as are trained.
        frozen: Bytes of networks that are not trained.
    """
    groups = [*blocks, root]
    whole = sum(group.numel for group in groups)
    own = sum(group.shard(ranks) for group in groups) if strategy == "fsdp" else whole
    gathered, casts = 0, activations.casts
    if strategy == "fsdp":
        largest = max((block.padded(ranks) for block in blocks), default=0)
        weight, casts = (HALF, 0) if casts else (FLOAT, 0)
        gathered = weight * (root.padded(ranks) + 3 * largest) + FLOAT * (root.padded(ranks) + 2 * largest)
    return Memory(
        weights=FLOAT * own,
        gradients=FLOAT * own,
        moments=2 * FLOAT * own,
        average=FLOAT * (own if averaged is None else averaged),
        frozen=frozen,
        gathered=gathered,
        casts=casts,
        activations=activations.kept,
        working=activations.working,
    )


def checkpoint_bytes(trained: int, *, averaged: int, others: int = 0, tensors: int = 0) -> int:
    """Bytes of a checkpoint: 12 for each trained number (weight, two moments), 4 for each of the average.

    Any strategy writes as much: under ``fsdp`` each rank its rows. On top come about 1,200 bytes a tensor: names in
    the header and in ``state.json``, and its moments' step counts.

    Args:
        trained: Numbers.
        averaged: Numbers.
        others: Bytes of buffers.
        tensors: Trained ones.
    """
    return 3 * FLOAT * trained + FLOAT * averaged + others + 1200 * tensors


def kept_checkpoints(max_steps: int, *, every: int, keep_last: int, keep_every: int | None) -> int:
    """Most checkpoints that a run has on disk at a time.

    keep_last, one more while it is written, and those of steps that are multiples of keep_every and stay for good: all
    up to the step at which the oldest of the newest stands.

    Args:
        max_steps: Steps of the run; the last of them has a checkpoint, whatever ``every`` is.
        every: Steps between checkpoints.
        keep_last: Newest that stay.
        keep_every: Steps whose checkpoints stay, or None.
    """
    steps = [*range(every, max_steps + 1, every)]
    if not steps or steps[-1] != max_steps:
        steps.append(max_steps)
    newest = steps[-(keep_last + 1) :]
    older = steps[: -(keep_last + 1)]
    return len(newest) + (0 if keep_every is None else sum(step % keep_every == 0 for step in older))


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        computing: FLOPs of a rank over what it reaches.
        communicating: Bytes that a rank sends over its bandwidth.
    """

    computing: float
    communicating: float

    @property
    def least(self) -> float:
        """Seconds if the shorter of the two is hidden behind the longer."""
        return max(self.computing, self.communicating)

    @property
    def most(self) -> float:
        """Seconds if neither hides the other."""
        return self.computing + self.communicating


def step_time(flops: float, traffic: Traffic, *, ranks: int, rate: float, bandwidth: float) -> StepTime:
    """A step's time from its work, its traffic and two assumptions.

    Args:
        flops: Executed in a step by all ranks, recomputed ones among them.
        traffic: Of a rank.
        ranks: n.
        rate: FLOP/s that a device reaches: its peak times the share of it that training reaches.
        bandwidth: Bytes a second at the slowest place that the rings cross (NCCL's bus bandwidth): within a node what a
            device sends; between nodes what all network ports of a node carry, since each ring leaves a node once.
    """
    return StepTime(flops / ranks / rate, traffic.total / bandwidth)

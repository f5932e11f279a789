"""Memory of a rank, checkpoints on disk and time of a step, from the estimates of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from maskgit_pl.estimates.sharding import FLOAT, HALF, Group, Strategy, Traffic
from maskgit_pl.estimates.transformer import Activations

__all__ = ["Memory", "StepTime", "checkpoint_bytes", "estimate_memory", "max_num_checkpoints", "step_time"]


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds most, at the highest point of a step, without the device's own context.

    Attributes:
        weights: Trained weights, this rank's part.
        gradients: Gradients, as many bytes.
        moments: AdamW's two moments, twice as many.
        average: Moving average of the weights, as many if there is one.
        frozen: Weights of networks that are not trained: tokenizer, perceptual network.
        gathered: Whole weights and gradients that FSDP2 holds for a moment.
        casts: bfloat16 copies of weights.
        activations: Tensors that the forward pass keeps for the backward pass.
        working: Tensors that exist for a moment on top.
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
        """Sum of all parts."""
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
) -> Memory:
    """Returns the memory of a rank.

    Each trained number takes 4 bytes as a weight, 4 as a gradient, 8 in AdamW's moments and 4 in the average: 20, whole
    under ``auto`` and ``ddp`` (whose buckets are the gradients themselves), in shards under ``fsdp``. FSDP2 then holds
    whole, at the highest point: weights and gradients of the root; weights of the block at work and of the next, which
    is gathered meanwhile, with the buffer of that; the gradients of a block and the buffer of their scattering. Weights
    are gathered in bfloat16 under bf16-mixed, where autocast's copies fall away. Gradients are counted in full although
    they come while activations go: an upper bound.

    Args:
        blocks: Groups that FSDP2 gathers one after the other.
        root: The rest.
        activations: Activations of a micro-batch; copies of weights in it mean that the precision is bf16-mixed.
        strategy: Strategy of the Trainer.
        ranks: Number of ranks.
        averaged: Number of averaged parameters; None means all that are trained.
        frozen: Bytes of networks that are not trained.
    """
    groups = [*blocks, root]
    whole = sum(group.numel for group in groups)
    own = sum(group.shard(ranks) for group in groups) if strategy == "fsdp" else whole
    gathered, casts = 0, activations.casts
    if strategy == "fsdp":
        largest = max((block.padded_numel(ranks) for block in blocks), default=0)
        weight, casts = (HALF, 0) if casts else (FLOAT, 0)
        gathered = weight * (root.padded_numel(ranks) + 3 * largest) + FLOAT * (root.padded_numel(ranks) + 2 * largest)
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
    """Returns the bytes of a checkpoint: 12 for each trained number (weight, two moments), 4 for each of the average.

    Every strategy writes as much: under ``fsdp`` each rank writes its rows. About 1,200 bytes per tensor come on top:
    names in the header and in ``state.json``, and the step counts of its moments.

    Args:
        trained: Number of trained parameters.
        averaged: Number of averaged parameters.
        others: Bytes of buffers.
        tensors: Number of trained tensors.
    """
    return 3 * FLOAT * trained + FLOAT * averaged + others + 1200 * tensors


def max_num_checkpoints(max_steps: int, *, every: int, keep_last: int, keep_every: int | None) -> int:
    """Returns the largest number of checkpoints that a run has on disk at a time.

    These are the ``keep_last`` newest, one more while it is written, and all older ones whose step is a multiple of
    ``keep_every``.

    Args:
        max_steps: Steps of the run; the last one has a checkpoint, whatever ``every`` is.
        every: Steps between checkpoints.
        keep_last: Number of newest checkpoints that are kept.
        keep_every: Checkpoints of multiples of this step are kept; None for none.
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
        computing: FLOPs of a rank, divided by the FLOP/s that it reaches.
        communicating: Bytes that a rank sends, divided by its bandwidth.
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
    """Returns the time of a step from its work, its traffic and two assumed rates.

    Args:
        flops: FLOPs that all ranks execute in a step, with recomputed ones.
        traffic: Traffic of a rank.
        ranks: Number of ranks.
        rate: FLOP/s that a device reaches: its peak times the share that training reaches.
        bandwidth: Bytes per second at the slowest place that the rings cross (NCCL's bus bandwidth): within a node what
            a device sends; between nodes what all network ports of a node send, since each ring leaves a node once.
    """
    return StepTime(flops / ranks / rate, traffic.total / bandwidth)

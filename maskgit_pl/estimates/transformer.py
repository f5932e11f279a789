"""Sizes, memory and arithmetic of stage 2 as closed formulas of its configuration.

Letters: B images of a micro-batch, N tokens an image, S = N + 1 with the class (N under causal attention, where the
last token is not read), R = B S rows, m masked tokens of the micro-batch, D width, F width of the feed-forward part,
h heads, L blocks, V rows of the word table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from maskgit_pl.estimates.sharding import FLOAT, HALF, Group
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import MaskSchedule, num_masked

__all__ = [
    "Activations",
    "Checkpointing",
    "Precision",
    "block_group",
    "mean_masked",
    "num_parameters",
    "recomputed_flops",
    "root_group",
    "step_flops",
    "transformer_activations",
]

Precision = Literal["32-true", "bf16-mixed"]
Checkpointing = Literal["none", "blocks"]

_DROPPED = 1  # bytes that a dropped-out number leaves: a bool
_STATISTICS = 2 * FLOAT  # mean and deviation of a row that a LayerNorm keeps


def _length(config: TransformerConfig) -> int:
    return config.num_tokens + (config.attention == "bidirectional")


def block_group(config: TransformerConfig) -> Group:
    """The tensors of a block: 4 D^2 + 2 D F of products, 9 D + F of biases and norms."""
    d, f = config.width, config.mlp_width
    attention = ((3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,))
    return Group((*attention, (f, d), (f,), (d, f), (d,), (d,), (d,)))


def root_group(config: TransformerConfig) -> Group:
    """The tensors in no block: the word table V D, which the head shares, positions S D, norms, the head's D^2."""
    d, v = config.width, config.vocabulary_size
    return Group(((v, d), (config.num_tokens + 1, d), (d,), (d,), (d, d), (d,), (d,), (d,), (v,)))


def num_parameters(config: TransformerConfig) -> int:
    """L (4 D^2 + 2 D F + 9 D + F) + (V + S) D + D^2 + 5 D + V."""
    return config.depth * block_group(config).numel + root_group(config).numel


def mean_masked(schedule: MaskSchedule, num_tokens: int, *, min_mask_ratio: float = 0.0) -> float:
    """Masked tokens of an image on average over training, where the ratio is gamma(u) with u uniform in [0, 1)."""
    progress = (torch.arange(4096) + 0.5) / 4096
    ratios = schedule(progress, num_tokens).clamp(min=min_mask_ratio)
    return float(num_masked(ratios, num_tokens, rounding="ceil").double().mean())


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on a rank, beside weights and gradients.

    Attributes:
        kept: What the forward pass leaves for the backward pass.
        casts: bfloat16 copies of weights, which live as long.
        working: What comes on top for a moment.
    """

    kept: int
    casts: int
    working: int

    @property
    def total(self) -> int:
        """Bytes at the highest point."""
        return self.kept + self.casts + self.working


def transformer_activations(
    config: TransformerConfig,
    *,
    batch: int,
    masked: int | None = None,
    precision: Precision = "32-true",
    checkpointing: Checkpointing = "none",
) -> Activations:
    """Activations of a training step on a GPU, where attention is fused and keeps no S x S matrix.

    Kept are: of the embedding its sum for the norm; of each block what ``_block_kept`` lists; of the head, at masked
    tokens alone, four rows of D and the logarithms of V probabilities. With ``blocks`` a block keeps its input alone,
    and one block at a time is computed again in the backward pass. bf16-mixed also keeps a bfloat16 copy of every
    matrix, except under FSDP2, which gathers weights in bfloat16 and gives them up after a block.

    Working is the larger of two moments: where the backward pass begins, the gradient of the logits, three times m V
    numbers; within a block, when what the head kept is gone, the gradients of its feed-forward part, R F + 2 R D,
    beside what has been computed again.

    Args:
        config: Sizes.
        batch: B.
        masked: m; None takes all tokens, which no micro-batch exceeds.
        precision: Of the Trainer.
        checkpointing: What is computed again instead of kept.
    """
    rows, asked = batch * _length(config), batch * config.num_tokens if masked is None else masked
    wide, half = config.width, precision == "bf16-mixed"
    drop = _DROPPED * (config.dropout > 0)
    embedding = rows * (wide * (FLOAT + drop) + _STATISTICS + 8)  # 8: the row numbers
    middle = _block_kept(config, batch, rows, half=half)
    last = _block_kept(config, batch, asked, half=half)
    blocks = (config.depth - 1) * middle + last
    recomputed = 0
    if checkpointing == "blocks":
        blocks, recomputed = config.depth * rows * wide * FLOAT, middle if config.depth > 1 else last
    number = HALF if half else FLOAT
    head = asked * (wide * (3 * number + FLOAT) + _STATISTICS + config.vocabulary_size * FLOAT)
    logits = 3 * asked * config.vocabulary_size * FLOAT
    feed_forward = rows * (config.mlp_width * number + 2 * wide * FLOAT)
    matrices = config.depth * (4 * wide**2 + 2 * wide * config.mlp_width) + wide**2 + config.vocabulary_size * wide
    return Activations(
        kept=embedding + blocks + head,
        casts=matrices * HALF if half else 0,
        working=max(logits, recomputed + feed_forward - head),
    )


def _block_kept(config: TransformerConfig, batch: int, asked: int, *, half: bool) -> int:
    """Bytes that a block leaves for its backward pass.

    Of all R rows: its input, queries, keys, values and what the heads gave, 5 D numbers, and the log-sum of each head's
    exponentials, h float32. Of the rows that go on (all, or the masked ones in the last block): the input of both norms
    and of the first feed-forward product, 3 D; F before and F after the GELU; in the last block a copy of what the
    heads gave, D; of both dropouts a bool each, 2 D; the norms' statistics. bf16-mixed halves what products read and
    write; the inputs of norms stay float32.
    """
    rows = batch * _length(config)
    d, f, number = config.width, config.mlp_width, HALF if half else FLOAT
    attention = rows * (5 * d * number + config.num_heads * FLOAT)
    copied = asked * d * number if asked != rows else 0
    norms = asked * (2 * d * FLOAT + 2 * _STATISTICS)
    dropped = asked * 2 * d * _DROPPED if config.dropout > 0 else 0
    return attention + copied + norms + asked * (d + 2 * f) * number + dropped


def step_flops(config: TransformerConfig, *, images: int, masked: float) -> float:
    """Useful FLOPs of forward and backward: those of the matrix products that are executed, recomputation left out.

    A product costs 2 FLOPs for each weight and row that it sees, and twice as many backward: 6. The last block's
    feed-forward part and the head see the masked rows alone. Attention is two products of S x S x D an image, 4 S^2 D
    FLOPs, and twice as many backward.

        6 R (L 4 D^2 - D^2 + (L - 1) 2 D F)  +  6 m (D^2 + 2 D F + D^2 + D V)  +  12 images L S^2 D

    Args:
        config: Sizes.
        images: Of the step, over all ranks.
        masked: Masked tokens of all of them.
    """
    d, f, length = config.width, config.mlp_width, _length(config)
    rows = images * length
    at_all_rows = config.depth * 3 * d**2 + (config.depth - 1) * (d**2 + 2 * d * f)
    at_masked_rows = d**2 + 2 * d * f + d**2 + d * config.vocabulary_size
    return 6 * rows * at_all_rows + 6 * masked * at_masked_rows + 12 * images * config.depth * length**2 * d


def recomputed_flops(config: TransformerConfig, *, images: int, masked: float) -> float:
    """FLOPs that ``activation_checkpointing: blocks`` adds: each block's forward pass once more."""
    d, v = config.width, config.vocabulary_size
    head = 2 * masked * (d**2 + d * v)
    return step_flops(config, images=images, masked=masked) / 3 - head

"""MaskSampler: draws the masks of training from the mask schedule that decoding follows too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.schedules import MaskSchedule, num_masked

__all__ = ["MaskSampler", "random_mask"]


def random_mask(count: Tensor, num_tokens: int, *, seed: int, index: Tensor, epoch: Tensor | int = 0) -> Tensor:
    """Draws masks with a given number of positions, uniformly, as a function of (seed, index, epoch) only.

    Args:
        count: (B,) int64 in [0, num_tokens], number of masked positions of each row.
        num_tokens: N, tokens of an image.
        seed: Seed in [0, 2**32).
        index: (B,) int64, sample index.
        epoch: (B,) int64 or an integer; each epoch gives other masks.

    Returns:
        (B, N) bool, True = masked.
    """
    keys = random_bits("mask", seed=seed, index=index, epoch=epoch, count=num_tokens)
    order = keys.argsort(dim=1, stable=True)  # a uniformly random order of the positions; ties by position
    hidden = torch.arange(num_tokens, device=keys.device) < count.unsqueeze(1)  # the first `count` of that order
    return torch.zeros_like(hidden).scatter(1, order, hidden)


@dataclass(frozen=True)
class MaskSampler:
    """Draws the masks of masked visual token modeling.

    For each sample: ratio = max(gamma(u), min_mask_ratio), and ceil(ratio N) positions, uniformly chosen, are masked.
    The u of a global batch are stratified: u = (pi(slot) + v) / B, with pi a permutation for each step and v uniform.
    Each u is uniform on [0, 1), and together they cover it evenly, which lowers the variance of the gradient. The masks
    depend only on (seed, sample, epoch, position), so they are the same for any number of ranks.

    Args:
        mask_schedule: The schedule object that the decoder holds too.
        seed: Seed in [0, 2**32).
        min_mask_ratio: Lower bound of the ratio in [0, 1]; a maximum, without rescaling.

    Raises:
        ValueError: if ``min_mask_ratio`` is out of range.

    Source: paper, training objective; MAGVIT code for ``min_mask_ratio``.
    """

    mask_schedule: MaskSchedule
    seed: int
    min_mask_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_number("min_mask_ratio", self.min_mask_ratio, "[0, 1]")

    def ratio(self, num_tokens: int, *, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Draws mask ratios, (B,) float32 in [0, 1]; ``mask`` describes the arguments."""
        stratum = self._stratum(position, global_batch)
        jitter = random_uniform("mask-ratio", seed=self.seed, index=index, epoch=epoch)[:, 0]
        progress = ((stratum + jitter) / global_batch).clamp(max=1.0)
        return self.mask_schedule(progress, num_tokens).clamp(min=self.min_mask_ratio)

    def _stratum(self, position: Tensor, global_batch: int) -> Tensor:
        """Returns pi(slot), (B,) int64: the place of a slot's random key in the order of its global batch's keys."""
        step, slot = position // global_batch, position % global_batch
        words = random_bits("mask-ratio/stratum", seed=self.seed, index=0, epoch=step, count=global_batch)
        keys = words * global_batch + torch.arange(global_batch, device=words.device)  # (B, G), no two alike
        return (keys < keys.gather(1, slot.unsqueeze(1))).sum(1)

    def mask(self, num_tokens: int, *, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Draws the masks of a batch.

        Args:
            num_tokens: N, tokens of an image.
            index: (B,) int64, global sample index.
            epoch: (B,) int64, epoch of each sample.
            position: (B,) int64, place in the training stream: step * global_batch + slot.
            global_batch: Samples of one step over all ranks.

        Returns:
            (B, N) bool, True = masked; at least one and at most N are masked in each row.
        """
        ratio = self.ratio(num_tokens, index=index, epoch=epoch, position=position, global_batch=global_batch)
        count = num_masked(ratio, num_tokens, rounding="ceil")
        return random_mask(count, num_tokens, seed=self.seed, index=index, epoch=epoch)

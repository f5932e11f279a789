"""The masks of training, drawn from the mask schedule that decoding follows too.

``MaskSampler`` is used by ``mvtm.MaskedTokenModel``; ``random_mask`` also by ``evaluation.likelihood``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.schedules import MaskSchedule, num_masked

__all__ = ["MaskSampler", "random_mask"]


def random_mask(count: Tensor, num_tokens: int, *, seed: int, index: Tensor, epoch: Tensor | int = 0) -> Tensor:
    """Draws uniformly random masks with a given number of positions, a function of (seed, index, epoch) only.

    Args:
        count: (B,) int64 in [0, N]: masked positions of each row.
        num_tokens: N, tokens per image.
        seed: Seed in [0, 2**32).
        index: (B,) int64 in [0, 2**32): sample index.
        epoch: (B,) int64 or an integer, in [0, 2**32); each epoch gives other masks.

    Returns:
        (B, N) bool, True = masked.
    """
    # Sorting random keys gives a uniformly random order of the positions; its first `count` are masked. A stable sort
    # breaks ties by position, so the mask is bit-exact on every device.
    keys = random_bits("mask", seed=seed, index=index, epoch=epoch, count=num_tokens)  # (B, N)
    order = keys.argsort(dim=1, stable=True)
    is_first = torch.arange(num_tokens, device=keys.device) < count.unsqueeze(1)  # (B, N): columns in that order
    return torch.zeros_like(is_first).scatter(1, order, is_first)


@dataclass(frozen=True)
class MaskSampler:
    """A sampler of the masks of masked visual token modeling.

    The steps for each sample:

    1. Draw u, uniform on [0, 1). The u of a global batch of G samples are stratified: u = (pi(slot) + v) / G, with a
       random permutation pi for each step and v uniform on (0, 1). Together they cover [0, 1) evenly, which lowers the
       variance of the gradient.
    2. Compute the mask ratio max(gamma(u), min_mask_ratio).
    3. Mask ceil(ratio N) positions, chosen uniformly.

    The masks depend on (seed, sample, epoch, position) only, so they are equal for every number of ranks.

    Args:
        mask_schedule: gamma: the schedule object that the decoder holds too.
        seed: Seed in [0, 2**32).
        min_mask_ratio: Lower bound of the ratio, in [0, 1]. Ratios below it are raised to it, not rescaled.

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
        """Draws mask ratios, (B,) float32 in [0, 1]; see ``mask`` for the arguments."""
        # 1.
        stratum = self._draw_stratum(position, global_batch)
        jitter = random_uniform("mask-ratio", seed=self.seed, index=index, epoch=epoch)[:, 0]
        progress = ((stratum + jitter) / global_batch).clamp(max=1.0)
        # 2.
        return self.mask_schedule(progress, num_tokens).clamp(min=self.min_mask_ratio)

    def _draw_stratum(self, position: Tensor, global_batch: int) -> Tensor:
        """Returns pi(slot), (B,) int64 in [0, G): the number of random keys of the step below the key of the slot."""
        # Each rank computes all G keys of the step, so ranks agree on pi without communication.
        step, slot = position // global_batch, position % global_batch
        words = random_bits("mask-ratio/stratum", seed=self.seed, index=0, epoch=step, count=global_batch)
        # The slot as the last digit makes the keys distinct: equal words would otherwise share a stratum.
        keys = words * global_batch + torch.arange(global_batch, device=words.device)  # (B, G)
        return (keys < keys.gather(1, slot.unsqueeze(1))).sum(1)

    def mask(self, num_tokens: int, *, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Draws the masks of a batch.

        Args:
            num_tokens: N, tokens per image.
            index: (B,) int64 in [0, 2**32): global sample index.
            epoch: (B,) int64 in [0, 2**32): epoch of each sample.
            position: (B,) int64: position in the training stream, step * global_batch + slot.
            global_batch: G, samples per step over all ranks.

        Returns:
            (B, N) bool, True = masked; each row has 1 to N masked positions.
        """
        ratio = self.ratio(num_tokens, index=index, epoch=epoch, position=position, global_batch=global_batch)
        count = num_masked(ratio, num_tokens, rounding="ceil")  # 3.
        return random_mask(count, num_tokens, seed=self.seed, index=index, epoch=epoch)

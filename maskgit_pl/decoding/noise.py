"""Where a decoding run takes its chance from: noise that belongs to the image, or that a test has recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.randomness import gumbel, random_uniform

__all__ = ["Noise", "SeededNoise"]


class Noise(Protocol):
    """Where a decoding run takes its chance from."""

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Codes (B, M) int64 drawn from softmax(logits), logits (B, M, K) float32, at ``positions`` of ``step``."""

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Standard Gumbel noise (B, M) float32 for the choice of tokens at ``positions`` of ``step``."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise that belongs to the image: a function of (its seed, step, position), whatever else is in the batch.

    Args:
        seeds: (B,) int64, in [0, 2**32), one for each image.
        num_tokens: N, tokens of an image.
        steps_at_once: How many steps' numbers are made together, when the first of them is asked for; at least 1. It
            changes no number: a run of 8 steps launches an eighth of the kernels.
    """

    seeds: Tensor
    num_tokens: int
    steps_at_once: int = 8
    _made: dict[str, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Inverse-CDF sampling from one uniform number a position."""
        cumulative = logits.softmax(-1).cumsum(-1)
        threshold = self._at("decode/codes", positions, step).unsqueeze(-1) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Gumbel noise from one uniform number a position."""
        return self._at("decode/choice", positions, step)

    def _at(self, stream: str, positions: Tensor, step: int) -> Tensor:
        first = step - step % self.steps_at_once
        made_first, made = self._made.get(stream, (-1, self.seeds))
        if made_first != first:
            made = self._steps(stream, first)
            self._made[stream] = first, made
        return made[:, step - first].gather(1, positions)

    def _steps(self, stream: str, first: int) -> Tensor:
        """(B, steps_at_once, N) float32: uniform numbers, or Gumbel noise for the choice of tokens."""
        count, device = self.steps_at_once, self.seeds.device
        steps = torch.arange(first, first + count, device=device).repeat(len(self.seeds))
        numbers = random_uniform(
            stream, seed=self.seeds.repeat_interleave(count), index=0, epoch=steps, count=self.num_tokens
        )
        numbers = gumbel(numbers) if stream == "decode/choice" else numbers
        return rearrange(numbers, "(b t) n -> b t n", t=count)

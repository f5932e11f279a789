"""Sources of randomness for decoding: noise seeded per image, or recorded by a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from maskgit_pl.randomness import gumbel, random_uniform

__all__ = ["Noise", "SeededNoise"]


class Noise(Protocol):
    """A source of the random numbers of a decoding run."""

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws codes (B, M) int64 from softmax(logits), logits (B, M, K) float32, at ``positions`` of ``step``."""

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns standard Gumbel noise (B, M) float32 for the choice of tokens at ``positions`` of ``step``."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise seeded per image: a function of (its seed, step, position), whatever else is in the batch.

    Args:
        seeds: (B,) int64, in [0, 2**32), one for each image.
        num_tokens: N, tokens of an image.
        steps_at_once: Number of steps whose numbers are made together, when the first of them is asked for; at least
            1. It changes no number: a run of 8 steps launches an eighth of the kernels.
    """

    seeds: Tensor
    num_tokens: int
    steps_at_once: int = 8
    _made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws codes by inverse CDF from one uniform number a position."""
        cumulative = logits.softmax(-1).cumsum(-1)
        threshold = self._codes(positions, step).unsqueeze(-1) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns Gumbel noise from one uniform number a position."""
        first = self._first(step)
        return self._made[first][1][:, step - first].gather(1, positions)

    def _codes(self, positions: Tensor, step: int) -> Tensor:
        """Uniform numbers (B, M)."""
        first = self._first(step)
        return self._made[first][0][:, step - first].gather(1, positions)

    def _first(self, step: int) -> int:
        """The first of the steps whose numbers are made together with this one's; makes them if they are not there."""
        first = step - step % self.steps_at_once
        if first not in self._made:
            self._made.clear()
            steps = torch.arange(first, first + self.steps_at_once, device=self.seeds.device)
            codes, choice = random_uniform(
                ["decode/codes", "decode/choice"],
                seed=self.seeds.unsqueeze(1),
                index=0,
                epoch=steps,
                count=self.num_tokens,
            )  # (B, steps, N) each
            self._made[first] = codes, gumbel(choice)
        return first

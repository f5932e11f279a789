"""The random numbers of decoding: a protocol, and noise that is seeded per image.

Used by the decoders. Tests pass recorded noise in place of ``SeededNoise``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from maskgit_pl.randomness import gumbel, random_uniform

__all__ = ["Noise", "SeededNoise", "draw_codes"]


def draw_codes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws codes by inverting the cumulative distribution of the softmax.

    Args:
        logits: (..., K) float32.
        uniform: (...) float32 in (0, 1): one random number for each code.

    Returns:
        (...) int64 in [0, K).
    """
    cumulative = logits.softmax(-1).cumsum(-1)  # (..., K)
    # In float32 the last cumulative probability is not exactly 1; the scaled threshold never exceeds it.
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]  # (..., 1)
    return torch.searchsorted(cumulative, threshold).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class Noise(Protocol):
    """A source of the random numbers of a decoding run."""

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws codes (B, M) int64 in [0, K) from the softmax of ``logits`` (B, M, K) float32."""

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns standard Gumbel noise (B, M) float32 for the token selector."""


@dataclass(frozen=True)
class SeededNoise:
    """Noise that is a function of (seed of the image, step, position): the batch does not change an image.

    Args:
        seeds: (B,) int64 in [0, 2**32), one per image.
        num_tokens: N, tokens per image.
        steps_at_once: Steps whose numbers are generated together, >= 1. It changes no number. With 8, a run of 8
            steps launches an eighth of the kernels.
    """

    seeds: Tensor
    num_tokens: int
    steps_at_once: int = 8
    _made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws codes by inverting the cumulative distribution, with one uniform number per position."""
        return draw_codes(logits, self._uniform(positions, step))

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns Gumbel noise (B, M) float32 from one uniform number per position."""
        first = self._generate(step)
        return self._made[first][1][:, step - first].gather(1, positions)

    def _uniform(self, positions: Tensor, step: int) -> Tensor:
        """Returns uniform numbers (B, M) float32 in (0, 1) for the draws of codes."""
        first = self._generate(step)
        return self._made[first][0][:, step - first].gather(1, positions)

    def _generate(self, step: int) -> int:
        """Generates the numbers of the group of steps that holds ``step``, if needed, and returns its first step."""
        first = step - step % self.steps_at_once
        if first not in self._made:
            self._made.clear()  # one group of steps is kept: 2 B N numbers per step
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

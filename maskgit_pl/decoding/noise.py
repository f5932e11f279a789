"""The random numbers of decoding, seeded per image, and the draw of codes from them. Used by the decoders."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskgit_pl.decoding.sampling import DrawMethod
from maskgit_pl.randomness import gumbel, gumbel_rows, random_bits, uniform_of

__all__ = ["SeededNoise", "draw_codes"]


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


@dataclass(frozen=True)
class SeededNoise:
    """Noise that is a function of (seed of the image, step, position): the batch does not change an image.

    Args:
        seeds: (B,) int64 in [0, 2**32), one per image.
        num_tokens: N, tokens per image.
        steps_at_once: Steps whose numbers are generated together, >= 1. It changes no number. With 8, a run of 8
            steps launches an eighth of the kernels.
        method: Method by which codes are drawn; see ``sampling.DrawMethod``.
    """

    seeds: Tensor
    num_tokens: int
    steps_at_once: int = 8
    method: DrawMethod = "inverse_cdf"
    _made: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws codes with one uniform number per position, or with K Gumbel numbers."""
        first = self._at(0, positions, step)
        if self.method == "inverse_cdf":
            return draw_codes(logits, uniform_of(first))
        return gumbel_rows(first, self._at(1, positions, step), logits.shape[-1]).add_(logits).argmax(-1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns Gumbel noise (B, M) float32 from one uniform number per position."""
        return self._at(2, positions, step)

    def _at(self, number: int, positions: Tensor, step: int) -> Tensor:
        """Returns the generated numbers (B, M) of some positions: 0 and 1 are words for codes, 2 is Gumbel noise."""
        first = self._generate(step)
        return self._made[first][number][:, step - first].gather(1, positions)

    def _generate(self, step: int) -> int:
        """Generates the numbers of the group of steps that holds ``step``, if needed, and returns its first step."""
        first = step - step % self.steps_at_once
        if first not in self._made:
            self._made.clear()  # one group of steps is kept: 3 B N numbers per step
            steps = torch.arange(first, first + self.steps_at_once, device=self.seeds.device)
            first_words, second_words, choice = random_bits(
                ["decode/codes", "decode/codes/second", "decode/choice"],
                seed=self.seeds.unsqueeze(1),
                index=0,
                epoch=steps,
                count=self.num_tokens,
            )  # (B, steps, N) each
            self._made[first] = first_words, second_words, gumbel(uniform_of(choice))
        return first

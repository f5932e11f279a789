"""The sampling of codes from logits: temperature (constant or annealed), top-k and top-p.

Used by both decoders, for step 2 of ``decoding.decoder``, which has the random numbers too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from maskgit_pl.checks import check_integer, check_number, shorten

if TYPE_CHECKING:
    from torch import Tensor

Temperature = float | tuple[float, float]

_GREEDY = 1e30  # factor of the logits from which the likeliest code is taken: their products leave float32 at 3e38


class Noise(Protocol):
    """A source of the random numbers of a decoding run, such as ``decoder.SeededNoise``."""

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Draws codes (B, M) int64 in [0, K) from the softmax of ``logits`` (B, M, K) float32."""

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns standard Gumbel noise (B, M) float32 for the token selector."""


@dataclass(frozen=True)
class CodeSampling:
    """Temperature and truncation, applied to logits before codes are drawn from their softmax.

    The logits are divided by the temperature. Then only the ``top_k`` most likely codes are kept, and of these the
    smallest set whose probabilities sum to ``top_p``. Token selectors see the logits before these changes.

    Args:
        temperature: Temperature >= 0; 0 takes the most likely code. A pair is interpolated linearly from the
            first to the last step.
        top_k: Number of codes kept, >= 1; None keeps all codes.
        top_p: Probability kept, in (0, 1]; None keeps all codes.

    Source: temperature annealing: MaskBit, arXiv:2409.16211; top-p: Holtzman et al., arXiv:1904.09751.
    """

    temperature: Temperature = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        pair = self.temperature if isinstance(self.temperature, tuple | list) else (self.temperature,) * 2
        if len(pair) != 2:
            raise ValueError(
                "sampling_temperature must be a number >= 0, or two of them for the first and the last step, "
                f"got {shorten(self.temperature)}"
            )
        for value in pair:
            check_number("sampling_temperature", value, "[0, inf)")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, "[1, inf)")
        if self.top_p is not None:
            check_number("top_p", self.top_p, "(0, 1]")

    def temperature_at(self, progress: float) -> float:
        """Returns the temperature of a step; ``progress`` is 0 at the first step and 1 at the last."""
        if isinstance(self.temperature, tuple | list):
            first, last = self.temperature
            return first + (last - first) * progress
        return self.temperature

    def draw(
        self,
        logits: Tensor,
        noise: Noise,
        positions: Tensor,
        *,
        step: int,
        progress: float,
        sharpness: float = 1.0,
    ) -> Tensor:
        """Draws codes (B, M) int64 from logits (B, M, K) float32.

        Args:
            logits: (B, M, K) float32, the unscaled logits of the network.
            noise: Source of the random numbers.
            positions: (B, M) int64 in [0, N): positions of the tokens, for ``noise``.
            step: t, for ``noise``.
            progress: Progress in [0, 1]: 0 at the first step and 1 at the last.
            sharpness: Positive factor of the logits, from the token selector.
        """
        temperature = self.temperature_at(progress)
        factor = math.inf if temperature == 0 else sharpness / temperature
        if factor > _GREEDY:
            return logits.argmax(-1)
        # A factor of 1 is the default; skipping it saves a copy of B M K numbers.
        return noise.draw(self.truncate(logits if factor == 1 else logits * factor), positions, step)

    def truncate(self, logits: Tensor) -> Tensor:
        """Returns logits (..., K) with -inf outside of top-k and top-p; the most likely code is always kept."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]  # (..., 1): the smallest logit that is kept
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, codes = logits.sort(dim=-1, descending=True)
            # Probability of all codes that are more likely than this one: a code is kept while it is below
            # top_p, so the code that crosses top_p is the last one kept.
            likelier = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            likelier[..., 0] = 0  # roll moved the total there
            ordered = ordered.masked_fill(likelier >= self.top_p, -math.inf)
            logits = ordered.scatter(-1, codes, ordered)  # back to the order of the codes
        return logits

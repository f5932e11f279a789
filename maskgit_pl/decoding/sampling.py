"""The sampling of codes from logits: temperature (constant or annealed), and top-k.

Used by both decoders, for step 2 of ``decoding.decoder``, which has the random numbers too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.text import shorten

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

    The logits are divided by the temperature, and only the ``top_k`` most likely codes are kept. Token selectors see
    the logits before these changes.

    Args:
        temperature: Temperature >= 0; 0 takes the most likely code. A pair is interpolated linearly from the
            first to the last step.
        top_k: Number of codes kept, >= 1; None keeps all codes.

    Source: temperature annealing: MaskBit, arXiv:2409.16211.
    """

    temperature: Temperature = 1.0
    top_k: int | None = None

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
        """Returns logits (..., K) with -inf outside of the ``top_k`` most likely codes."""
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return logits
        least = logits.topk(self.top_k, dim=-1).values[..., -1:]  # (..., 1): the smallest logit that is kept
        return logits.masked_fill(logits < least, -math.inf)

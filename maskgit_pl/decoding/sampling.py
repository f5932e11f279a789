"""Sampling of codes from logits: temperature, constant or annealed, and truncation to the likeliest codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from maskgit_pl.decoding.noise import Noise

__all__ = ["CodeSampling", "Temperature"]

Temperature = float | tuple[float, float]


@dataclass(frozen=True)
class CodeSampling:
    """Temperature and truncation, applied to logits before codes are drawn from their softmax.

    Logits are divided by the temperature; then only the ``top_k`` likeliest codes are left, and of these the fewest
    whose probabilities sum to ``top_p``. Token selectors judge the logits as they were before.

    Args:
        temperature: At least 0; 0 takes the likeliest code. A pair goes from the first to the last step, linearly.
        top_k: At least 1; None keeps all codes.
        top_p: In (0, 1]; None keeps all codes.

    Raises:
        ValueError: if a number is out of range.

    Source: temperature annealing: MaskBit, arXiv:2409.16211; top-p: Holtzman et al., arXiv:1904.09751.
    """

    temperature: Temperature = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        pair = self.temperature if isinstance(self.temperature, tuple | list) else (self.temperature,) * 2
        if len(pair) != 2 or not all(0 <= value < math.inf for value in pair):
            raise ValueError(
                "sampling_temperature: a number of at least 0, or two of them for the first and the last step, is "
                f"needed, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: at least 1 code is needed, got {self.top_k}; leave it out to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: a number in (0, 1] is needed, got {self.top_p}; leave it out to keep all")

    def temperature_at(self, progress: float) -> float:
        """Returns the temperature at a step; ``progress`` is 0 at the first step and 1 at the last."""
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
            logits: As the network gave them.
            noise: Source of the random numbers.
            positions: (B, M) int64 in [0, N): the tokens that are drawn, for ``noise``.
            step: The step, for ``noise``.
            progress: 0 at the first step and 1 at the last.
            sharpness: Factor of the logits beside the temperature, positive.
        """
        temperature = self.temperature_at(progress)
        if temperature == 0:
            return logits.argmax(-1)
        factor = sharpness / temperature
        return noise.draw(self.truncate(logits if factor == 1 else logits * factor), positions, step)

    def truncate(self, logits: Tensor) -> Tensor:
        """Returns logits (..., K) with -inf for the codes that may not be drawn; the likeliest one always may."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, codes = logits.sort(dim=-1, descending=True)
            likelier = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all likelier codes
            likelier[..., 0] = 0
            ordered = ordered.masked_fill(likelier >= self.top_p, -math.inf)
            logits = ordered.scatter(-1, codes, ordered)
        return logits

"""Token selectors: which of the tokens drawn in a decoding step are kept.

The mask schedule says how many stay masked, the selector says which: it gives each candidate a score, and the
candidates with the lowest scores are masked again. Used by ``decoding.ParallelDecoder``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from maskgit_pl.registry import Registry

__all__ = ["Candidates", "TokenSelector", "token_selectors"]


@dataclass(frozen=True)
class Candidates:
    """What one decoding step drew, for a selector to judge. M positions a row, padded rows included.

    Args:
        log_probs: (B, M, K) float32, log-softmax of the logits at temperature 1.
        tokens: (B, M) int64, in [0, K): the codes drawn.
        positions: (B, M) int64, in [0, N): where they would go.
        gumbel: (B, M) float32, standard Gumbel noise that belongs to the image, the step and the position.
        progress: (t + 1) / T, in (0, 1].
    """

    log_probs: Tensor
    tokens: Tensor
    positions: Tensor
    gumbel: Tensor
    progress: float

    @property
    def drawn_log_probs(self) -> Tensor:
        """(B, M) float32: log p of the codes drawn."""
        return self.log_probs.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)


class TokenSelector(ABC):
    """Scores candidates; the highest are kept. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Tensor:
        """(B, M) float32, finite: the higher, the surer it is kept."""


token_selectors: Registry[TokenSelector] = Registry("token selector", "maskgit_pl.token_selectors")


@token_selectors.register("confidence")
@dataclass(frozen=True)
class Confidence(TokenSelector):
    """log p(drawn) + choice_temperature (1 - progress) Gumbel: the released rule.

    Args:
        choice_temperature: Not negative; 0 keeps the most probable, more lets chance choose, most so in early steps.

    Source: google-research/maskgit, ``parallel_decode.py`` (default 4.5 in its inference notebook).
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        if not self.choice_temperature >= 0:
            raise ValueError(
                f"token selector confidence: choice_temperature must be >= 0, got {self.choice_temperature}"
            )

    def __call__(self, candidates: Candidates) -> Tensor:
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        return candidates.drawn_log_probs + noise_scale * candidates.gumbel


@token_selectors.register("random")
@dataclass(frozen=True)
class Random(TokenSelector):
    """Keeps tokens at random, whatever their probability: the baseline that shows what confidence is worth."""

    def __call__(self, candidates: Candidates) -> Tensor:
        return candidates.gumbel

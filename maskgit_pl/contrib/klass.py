"""The token selector ``klass``: tokens whose prediction has settled are kept before the schedule would keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from maskgit_pl.checks import check_number
from maskgit_pl.decoding.selectors import Candidates, Confidence, token_selectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KLASS"]

_FIRST = 1e9  # above each score of a token that has not settled


@token_selectors.register("klass")
@dataclass(frozen=True)
class KLASS(Confidence):
    """A selector that keeps all tokens whose distribution is confident and has not changed since the last step.

    A token has settled if KL(p_t || p_(t-1)) < ``most_divergence`` and the largest probability is above
    ``least_probability``. A step keeps all of these, and at least as many tokens as the schedule, by the rule of
    ``confidence``. Decoding takes at most T steps. The source looks back two steps instead of one, and keeps a fixed
    number of tokens where none has settled.

    Args:
        choice_temperature: Scale of the Gumbel noise among the tokens that have not settled, >= 0.
        most_divergence: Bound of the divergence in nats, > 0.
        least_probability: Bound of the largest probability, in [0, 1).

    Source: Kim et al., arXiv:2511.05664.
    """

    sees_previous: ClassVar[bool] = True
    most_divergence: float = 0.01
    least_probability: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("most_divergence", self.most_divergence, "(0, inf)")
        check_number("least_probability", self.least_probability, "[0, 1)")

    def __call__(self, candidates: Candidates) -> Tensor:
        scores = super().__call__(candidates)
        if candidates.previous is None:
            return scores
        log_probs = candidates.log_probs
        probs = log_probs.exp()
        # The clamp makes 0 of the product 0 (-inf - x), of codes without probability.
        divergence = (probs * (log_probs.clamp(min=-1e4) - candidates.previous.clamp(min=-1e4))).sum(-1)  # (B, M)
        has_settled = (divergence < self.most_divergence) & (probs.amax(-1) > self.least_probability)
        return scores.masked_fill(has_settled, _FIRST)

    def num_kept(self, candidates: Candidates, scores: Tensor, planned: Tensor) -> Tensor:
        return (scores == _FIRST).sum(1).maximum(planned)

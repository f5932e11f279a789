"""The token selector ``p2``: tokens that are decided compete with the masked ones in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from maskgit_pl.checks import check_number
from maskgit_pl.decoding.selectors import Candidates, Confidence, token_selectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["P2"]


@token_selectors.register("p2")
@dataclass(frozen=True)
class P2(Confidence):
    """Path planning: all tokens are scored by their log-probability now, and the lowest are masked again.

    The score of a decided token is eta log p(token), without noise; that of a draw is the one of ``confidence``. The
    number of masked tokens follows the schedule. The network is asked about visible tokens, which the objective's
    ``visible_weight`` and the corruption ``random_tokens`` train it for.

    Args:
        choice_temperature: Scale of the Gumbel noise on masked tokens, >= 0.
        eta: Strength of the remasking, >= 0: with 0, decided tokens are masked last.

    Source: Peng et al., arXiv:2502.03540, self-planning.
    """

    sees_decided: ClassVar[bool] = True
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, "[0, 1000000]")

    def __call__(self, candidates: Candidates) -> Tensor:
        assert candidates.decided is not None
        scores = super().__call__(candidates)
        # The clamp keeps 0 times -inf and the score finite.
        decided = self.eta * candidates.drawn_log_probs.clamp(min=-1e4)
        return decided.where(candidates.decided >= 0, scores)

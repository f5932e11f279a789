"""The token selector ``entropy_bound``: a step keeps as many tokens as their joint uncertainty allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maskgit_pl.checks import check_number
from maskgit_pl.decoding.selectors import Candidates, Confidence, token_selectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EntropyBound"]


@token_selectors.register("entropy_bound")
@dataclass(frozen=True)
class EntropyBound(Confidence):
    """The sampler EB: a step keeps the first tokens, by rising entropy, whose joint error is bounded.

    With entropies H_1, ..., H_n in nats of the first n tokens, sum H_i - max H_i bounds the error of drawing them
    independently. The largest n for which it is at most ``bound`` is kept, and at least the number of the schedule:
    decoding takes at most T steps.

    Args:
        choice_temperature: Scale of Gumbel noise (1 - progress) on the order by entropy, >= 0; the source uses none.
        bound: Bound of a step in nats, >= 0. 0 follows the schedule, unless entropies are 0.

    Source: Ben-Hamu et al., arXiv:2505.24857.
    """

    choice_temperature: float = 0.0
    bound: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bound", self.bound, "[0, inf)")

    def __call__(self, candidates: Candidates) -> Tensor:
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        return candidates.gumbel * noise_scale - _entropy(candidates)

    def num_kept(self, candidates: Candidates, scores: Tensor, planned: Tensor) -> Tensor:
        order = scores.argsort(dim=1, descending=True, stable=True)
        entropy, is_real = (values.gather(1, order) for values in (_entropy(candidates), scores.isfinite()))
        error = entropy.cumsum(1) - entropy.cummax(1).values  # (B, M), rising
        return ((error <= self.bound) & is_real).sum(1).maximum(planned)


def _entropy(candidates: Candidates) -> Tensor:
    """Returns the entropy of the distribution of each candidate in nats, (B, M) float32."""
    import torch

    # entr is 0 for a code of probability 0, where p log p would be NaN.
    entropy: Tensor = torch.special.entr(candidates.log_probs.exp()).sum(-1)
    return entropy

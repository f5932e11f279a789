"""Training objectives of stage 2 by name.

An ``Objective`` turns the cross-entropies of the tokens of a batch into the loss. Used by ``mvtm.MaskedTokenModel``.
Yours is a registered frozen dataclass::

    @objectives.register("sum")
    @dataclass(frozen=True)
    class Sum(Objective):
        def __call__(self, tokens: TokenLosses) -> Tensor:
            return tokens.sum_rows(tokens.losses).mean()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.losses import mean_over_rows
from maskgit_pl.masking import Draws, MaskSampler
from maskgit_pl.registry import Registry, derives_from

__all__ = ["Objective", "TokenLosses", "objectives"]


@dataclass(frozen=True)
class TokenLosses:
    """The cross-entropies of the M predicted tokens of a batch, image after image.

    Args:
        losses: (M,) float32: cross-entropies, with a graph; 0 for padding.
        rows: (M,) int64 in [0, B]: the image of each token; B for padding, which ``compiled: step`` adds.
        num_rows: B, images of the batch.
        is_masked: (M,) bool, False for tokens that the network saw; None if all are masked.
        slopes: (B,) float32 >= 0: |dr/du| of the mask ratio r; None if the objective needs none.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    is_masked: Tensor | None = None
    slopes: Tensor | None = None

    @classmethod
    def of(cls, losses: Tensor, draws: Draws) -> TokenLosses:
        """Returns the cross-entropies (M,) of the tokens that a micro-batch predicts; those of padding become 0."""
        if draws.is_real is not None:
            losses = losses.masked_fill(~draws.is_real, 0.0)
        return cls(losses, draws.rows, len(draws.mask), draws.is_masked, draws.slopes)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Returns (B,) float32: the sums of ``values`` (M,) over the tokens of each image."""
        # Atomic additions have no order on a GPU; in float64 the order does not change the float32 result.
        zeros = torch.zeros(self.num_rows + 1, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.rows, values.double())[: self.num_rows].float()


class Objective(ABC):
    """A mean over images of their tokens' losses. Subclasses are frozen dataclasses.

    Attributes:
        needs_slopes: True if ``TokenLosses.slopes`` must be given.
        visible_weight: Weight of visible tokens. Above 0, all tokens are predicted.
    """

    needs_slopes: ClassVar[bool] = False
    visible_weight: float = 0.0

    @abstractmethod
    def __call__(self, tokens: TokenLosses) -> Tensor:
        """Returns the loss of a batch, scalar float32: a mean over images, so that it does not depend on the ranks."""

    def check(self, sampler: MaskSampler, num_tokens: int) -> None:
        """Checks that the masks of a model suit this objective.

        Args:
            sampler: The sampler of the masks.
            num_tokens: N, tokens per image.

        Raises:
            ValueError: if a number of masked tokens never occurs.
        """
        if self.needs_slopes and not sampler.covers_all_counts(num_tokens):
            raise ValueError(
                f"objective {self} must be used with mask ratios that give every count from 1 to {num_tokens}, "
                f"got {sampler.mask_ratio} of {sampler.mask_schedule} with min_mask_ratio {sampler.min_mask_ratio:g}; "
                "use mask_ratio uniform, or schedule with cosine or linear, and min_mask_ratio 0"
            )


objectives: Registry[Objective] = Registry("objective", "maskgit_pl.objectives", check=derives_from(Objective))


@objectives.register("masked_cross_entropy")
@dataclass(frozen=True)
class MaskedCrossEntropy(Objective):
    """The weighted mean of the cross-entropies of each image: sum w l / sum w, then the mean over images.

    w is 1 for masked tokens, and ``visible_weight`` for all other tokens.

    Args:
        visible_weight: Weight of visible tokens, in [0, 1000000]. 0 predicts masked tokens only, 1 weights
            all tokens alike.

    Source: paper, training objective (``visible_weight`` 0); with 0, the released code,
    ``weighted_sequence_cross_entropy``.
    """

    visible_weight: float = 0.0

    def __post_init__(self) -> None:
        check_number("visible_weight", self.visible_weight, "[0, 1000000]")

    def __call__(self, tokens: TokenLosses) -> Tensor:
        if self.visible_weight == 0:
            return mean_over_rows(tokens.losses, tokens.rows, num_rows=tokens.num_rows)
        weights = torch.ones_like(tokens.losses)
        if tokens.is_masked is not None:
            weights = weights.masked_fill(~tokens.is_masked, self.visible_weight)
        # Each image has a masked token, so the sum of its weights is at least 1.
        return (tokens.sum_rows(weights * tokens.losses) / tokens.sum_rows(weights)).mean()


@objectives.register("elbo")
@dataclass(frozen=True)
class Elbo(Objective):
    """An unbiased estimate of an upper bound of -log p(x | class) / N in nats per token.

    loss = mean over images of min(|dr/du|, max_weight) (mean of l over masked tokens)

    The mask ratio r = gamma(u) of a uniform u has the density 1 / |dr/du|, so the weight |dr/du| turns the expectation
    under the drawn ratios into that under uniform ratios. With ceil(r N) masked tokens, it is the order-agnostic bound
    of ``evaluation.likelihood.negative_elbo``, divided by N. Set ``label_smoothing`` to 0 for a bound in nats.

    ``max_weight`` bounds the weight where gamma is steep, and makes the estimate too low there. With 100,
    ``cosine``, ``linear``, ``square``, ``cubic`` and, up to 512 tokens, ``log`` are exact; ``sqrt`` loses
    0.25 % of the masks.

    Args:
        max_weight: Largest weight of an image, in [1, 1000000].

    Source: MDLM, Sahoo et al., arXiv:2406.07524, eq. 10 (weight |alpha'| / (1 - alpha) of a sum over masked
    tokens; 1 - alpha is our ratio); order-agnostic bound: Hoogeboom et al., arXiv:2110.02037, eq. 5.
    """

    needs_slopes: ClassVar[bool] = True
    max_weight: float = 100.0

    def __post_init__(self) -> None:
        check_number("max_weight", self.max_weight, "[1, 1000000]")

    def __call__(self, tokens: TokenLosses) -> Tensor:
        assert tokens.slopes is not None
        counts = tokens.sum_rows(torch.ones_like(tokens.losses))  # each image has a masked token
        return (tokens.slopes.clamp(max=self.max_weight) * (tokens.sum_rows(tokens.losses) / counts)).mean()

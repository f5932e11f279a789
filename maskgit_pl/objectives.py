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

import torch
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.losses import mean_over_rows
from maskgit_pl.masking import Draws
from maskgit_pl.registry import Registry, derives_from


@dataclass(frozen=True)
class TokenLosses:
    """The cross-entropies of the M predicted tokens of a batch, image after image.

    Args:
        losses: (M,) float32: cross-entropies, with a graph; 0 for padding.
        rows: (M,) int64 in [0, B]: the image of each token; B for padding, which ``compiled: step`` adds.
        num_rows: B, images of the batch.
        is_masked: (M,) bool, False for tokens that the network saw; None if all are masked.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    is_masked: Tensor | None = None

    @classmethod
    def of(cls, losses: Tensor, draws: Draws) -> TokenLosses:
        """Returns the cross-entropies (M,) of the tokens that a micro-batch predicts; those of padding become 0."""
        if draws.is_real is not None:
            losses = losses.masked_fill(~draws.is_real, 0.0)
        return cls(losses, draws.rows, len(draws.mask), draws.is_masked)

    def sum_rows(self, values: Tensor) -> Tensor:
        """Returns (B,) float32: the sums of ``values`` (M,) over the tokens of each image."""
        # Atomic additions have no order on a GPU; in float64 the order does not change the float32 result.
        zeros = torch.zeros(self.num_rows + 1, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.rows, values.double())[: self.num_rows].float()


class Objective(ABC):
    """A mean over images of their tokens' losses. Subclasses are frozen dataclasses.

    Attributes:
        visible_weight: Weight of visible tokens. Above 0, all tokens are predicted.
    """

    visible_weight: float = 0.0

    @abstractmethod
    def __call__(self, tokens: TokenLosses) -> Tensor:
        """Returns the loss of a batch, scalar float32: a mean over images, so that it does not depend on the ranks."""


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

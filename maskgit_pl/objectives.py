"""Training objectives of stage 2 by name: how the cross-entropies of an image's tokens become one number.

Used by ``mvtm.MaskedTokenModel``. Your own objective is a registered frozen dataclass::

    @objectives.register("sum")
    @dataclass(frozen=True)
    class Sum(Objective):
        def __call__(self, tokens: TokenLosses) -> Tensor:
            return tokens.sum_rows(tokens.losses).mean()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer, check_number, shorten
from maskgit_pl.losses import mean_over_rows
from maskgit_pl.registry import Registry

__all__ = ["Objective", "TokenLosses", "objectives"]


@dataclass(frozen=True)
class TokenLosses:
    """The cross-entropies of the M predicted tokens of a batch, image after image.

    Args:
        losses: (M,) float32: cross-entropies, with a graph; 0 for padding.
        rows: (M,) int64 in [0, B]: the image of each token; B for padding, which ``compiled: step`` adds.
        num_rows: B, images of the batch.
        is_masked: (M,) bool, False for tokens that the network saw; None if all are masked.
        weights: (M,) float32 >= 0: 1 for masked and for replaced tokens, ``visible_weight`` for other visible tokens;
            None if all are 1.
        slopes: (B,) float32 >= 0: |dr/du| of the mask ratio r; None if the objective needs none.
        cluster_losses: (M,) float32: cross-entropies of the clusters of the codes, with a graph; None if the objective
            needs none.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    is_masked: Tensor | None = None
    weights: Tensor | None = None
    slopes: Tensor | None = None
    cluster_losses: Tensor | None = None

    def sum_rows(self, values: Tensor) -> Tensor:
        """Returns (B,) float32: the sums of ``values`` (M,) over the tokens of each image."""
        # Atomic additions have no order on a GPU; in float64 the order does not change the float32 result.
        zeros = torch.zeros(self.num_rows + 1, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.rows, values.double())[: self.num_rows].float()


class Objective(ABC):
    """A mean over images of their tokens' losses. Subclasses are frozen dataclasses.

    Attributes:
        needs_slopes: True if ``TokenLosses.slopes`` must be given.
        num_clusters: Number of clusters of codes for ``TokenLosses.cluster_losses``; 0 if they need not be given.
        visible_weight: Weight of visible tokens that no corruption replaced. Above 0, all tokens are predicted.
    """

    needs_slopes: ClassVar[bool] = False
    num_clusters: int = 0
    visible_weight: float = 0.0

    @abstractmethod
    def __call__(self, tokens: TokenLosses) -> Tensor:
        """Returns the loss of a batch, scalar float32: a mean over images, so that it does not depend on the ranks."""


def check_objective(name: str, objective: Objective) -> None:
    """Checks the contract of an objective on two images of three tokens: a finite scalar.

    Raises:
        ValueError: if the objective breaks the contract. The message has the name, the rule and the value.
    """
    if not isinstance(objective, Objective):
        raise ValueError(f"objective {name!r} must be an Objective, got {shorten(objective)}")
    check_number(f"objective {name!r}: visible_weight", objective.visible_weight, "[0, 1000000]")
    rows, ones = torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6)
    loss = objective(TokenLosses(ones, rows, 2, torch.arange(6) % 2 == 0, ones, torch.ones(2), ones))
    if not isinstance(loss, Tensor) or loss.shape != () or not bool(loss.isfinite()):
        raise ValueError(f"objective {name!r}: the loss must be a finite scalar tensor, got {shorten(loss)}")


objectives: Registry[Objective] = Registry("objective", "maskgit_pl.objectives", check=check_objective)


@objectives.register("masked_cross_entropy")
@dataclass(frozen=True)
class MaskedCrossEntropy(Objective):
    """The weighted mean of the cross-entropies of each image: sum w l / sum w, then the mean over images.

    w is 1 for masked and for replaced tokens, and ``visible_weight`` for all other tokens.

    Args:
        visible_weight: Weight of visible tokens, in [0, 1000000]. 0 predicts masked tokens only, 1 weights all tokens
            alike.

    Source: paper, training objective (``visible_weight`` 0); with 0, the released code,
    ``weighted_sequence_cross_entropy``.
    """

    visible_weight: float = 0.0

    def __post_init__(self) -> None:
        check_number("visible_weight", self.visible_weight, "[0, 1000000]")

    def __call__(self, tokens: TokenLosses) -> Tensor:
        if tokens.weights is None:
            return mean_over_rows(tokens.losses, tokens.rows, num_rows=tokens.num_rows)
        total = tokens.sum_rows(tokens.weights * tokens.losses)
        return (total / tokens.sum_rows(tokens.weights)).mean()  # each image has a masked token, so the sum is >= 1


@objectives.register("elbo")
@dataclass(frozen=True)
class Elbo(Objective):
    """An unbiased estimate of an upper bound of -log p(x | class) / N in nats per token.

    loss = mean over images of min(|dr/du|, max_weight) (mean of l over masked tokens)
           + visible_weight (mean of l over visible tokens that are predicted)

    The mask ratio r = gamma(u) of a uniform u has the density 1 / |dr/du|, so the weight |dr/du| turns the expectation
    under the drawn ratios into that under uniform ratios. With ceil(r N) masked tokens, it is the order-agnostic bound
    of ``evaluation.negative_elbo``, divided by N. Set ``label_smoothing`` to 0 for a bound in nats.

    ``max_weight`` bounds the weight where gamma is steep, and makes the estimate too low there. With 100, ``cosine``,
    ``linear``, ``square``, ``cubic`` and, up to 512 tokens, ``log`` are exact; ``sqrt`` loses 0.25 % of the masks. The
    second term is 0 by default, and no part of the bound.

    Args:
        visible_weight: Weight of the mean over visible tokens, in [0, 1000000].
        max_weight: Largest weight of an image, in [1, 1000000].

    Source: MDLM, Sahoo et al., arXiv:2406.07524, eq. 10 (weight |alpha'| / (1 - alpha) of a sum over masked tokens;
    1 - alpha is our ratio); order-agnostic bound: Hoogeboom et al., arXiv:2110.02037, eq. 5.
    """

    needs_slopes: ClassVar[bool] = True
    visible_weight: float = 0.0
    max_weight: float = 100.0

    def __post_init__(self) -> None:
        check_number("visible_weight", self.visible_weight, "[0, 1000000]")
        check_number("max_weight", self.max_weight, "[1, 1000000]")

    def __call__(self, tokens: TokenLosses) -> Tensor:
        assert tokens.slopes is not None
        ones = torch.ones_like(tokens.losses)
        masked = ones if tokens.is_masked is None else tokens.is_masked.to(ones.dtype)
        bound = tokens.sum_rows(masked * tokens.losses) / tokens.sum_rows(masked)  # each image has a masked token
        loss = (tokens.slopes.clamp(max=self.max_weight) * bound).mean()
        if tokens.is_masked is None:
            return loss
        weights = ones if tokens.weights is None else tokens.weights
        visible = tokens.sum_rows((1 - masked) * weights * tokens.losses)
        return loss + (visible / tokens.sum_rows(1 - masked).clamp(min=1)).mean()


@objectives.register("cluster_cross_entropy")
@dataclass(frozen=True)
class ClusterCrossEntropy(MaskedCrossEntropy):
    """The loss of ``masked_cross_entropy``, with l + cluster_weight c in place of l.

    c = -log(sum of the probabilities of the codes in the cluster of the right code). A wrong code costs less if it is
    similar to the right one. The clusters come from a balanced k-means of the tokenizer's codes
    (``code_clusters.balanced_clusters``).

    Args:
        visible_weight: Weight of visible tokens, in [0, 1000000]; see ``masked_cross_entropy``.
        num_clusters: Number of clusters, in [2, 65536]; the codebook size is a multiple of it. The released code has
            128 of 16,384 codes.
        cluster_weight: Weight of c, in [0, 1000000].

    Source: IAR, arXiv:2501.00880, cluster-oriented cross-entropy loss; the weight 1 is that of the released code.
    """

    num_clusters: int = 128
    cluster_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_clusters", self.num_clusters, "[2, 65536]")
        check_number("cluster_weight", self.cluster_weight, "[0, 1000000]")

    def __call__(self, tokens: TokenLosses) -> Tensor:
        assert tokens.cluster_losses is not None
        return super().__call__(replace(tokens, losses=tokens.losses + self.cluster_weight * tokens.cluster_losses))

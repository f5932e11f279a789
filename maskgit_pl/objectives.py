"""Training objectives of stage 2 by name, and the corruption of the tokens that the network sees.

An ``Objective`` turns the cross-entropies of the tokens of a batch into the loss. A ``Corruption`` replaces some
visible tokens by wrong codes, and the network predicts the original: decoding makes mistakes that training on true
tokens never shows. A network that has seen wrong tokens gives them low probabilities, which selectors such as ``p2``
use to correct them. Used by ``mvtm.MaskedTokenModel``. Yours are registered frozen dataclasses::

    @objectives.register("sum")
    @dataclass(frozen=True)
    class Sum(Objective):
        def __call__(self, tokens: TokenLosses) -> Tensor:
            return tokens.sum_rows(tokens.losses).mean()

    @corruptions.register("zero")
    @dataclass(frozen=True)
    class Zero(Corruption):
        fraction: float = 0.1

        def codes(self, tokens, replaced, uniform, *, codebook_size, predict):
            return torch.zeros_like(tokens[replaced])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer, check_number, shorten
from maskgit_pl.decoding.noise import draw_codes
from maskgit_pl.losses import mean_over_rows
from maskgit_pl.masking import Draws, MaskSampler
from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.quantizers import squared_distances
from maskgit_pl.randomness import permutation, random_uniform
from maskgit_pl.registry import Registry

__all__ = [
    "Corruption",
    "Objective",
    "TokenLosses",
    "balanced_clusters",
    "check_clusters",
    "corruptions",
    "objectives",
]

Predict: TypeAlias = Callable[[Tensor], Tensor]

_ITERATIONS = 10  # of the balanced k-means


@dataclass(frozen=True)
class TokenLosses:
    """The cross-entropies of the M predicted tokens of a batch, image after image.

    Args:
        losses: (M,) float32: cross-entropies, with a graph; 0 for padding.
        rows: (M,) int64 in [0, B]: the image of each token; B for padding, which ``compiled: step`` adds.
        num_rows: B, images of the batch.
        is_masked: (M,) bool, False for tokens that the network saw; None if all are masked.
        is_visible: (M,) bool, True for tokens that the network saw and that no corruption replaced; None if there are
            none.
        slopes: (B,) float32 >= 0: |dr/du| of the mask ratio r; None if the objective needs none.
        cluster_losses: (M,) float32: cross-entropies of the clusters of the codes, with a graph; None if the objective
            needs none.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    is_masked: Tensor | None = None
    is_visible: Tensor | None = None
    slopes: Tensor | None = None
    cluster_losses: Tensor | None = None

    @classmethod
    def of(cls, losses: Tensor, draws: Draws, *, cluster_losses: Tensor | None = None) -> TokenLosses:
        """Returns the cross-entropies (M,) of the tokens that a micro-batch predicts; those of padding become 0."""
        if draws.is_real is not None:
            losses = losses.masked_fill(~draws.is_real, 0.0)
            cluster_losses = None if cluster_losses is None else cluster_losses.masked_fill(~draws.is_real, 0.0)
        flags = draws.is_masked, draws.is_visible
        return cls(losses, draws.rows, len(draws.mask), *flags, draws.slopes, cluster_losses)

    def weights(self, visible_weight: float) -> Tensor:
        """Returns (M,) float32: ``visible_weight`` for visible tokens, 1 for masked and for replaced ones."""
        ones = torch.ones_like(self.losses)
        return ones if self.is_visible is None else ones.masked_fill(self.is_visible, visible_weight)

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

    def check(self, sampler: MaskSampler, network: BackboneConfig, *, tokenizer: str) -> None:
        """Checks that a model can be trained on this objective.

        Args:
            sampler: The sampler of its masks.
            network: Configuration of its network.
            tokenizer: Folder of its tokenizer.

        Raises:
            ValueError: if it cannot.
        """
        if self.num_clusters:
            check_clusters(self.num_clusters, network, tokenizer=tokenizer)
        if not self.needs_slopes:
            return
        if not sampler.covers_all_counts(network.num_tokens):
            raise ValueError(
                f"objective {self} must be used with mask ratios that give every count from 1 to {network.num_tokens}, "
                f"got {sampler.mask_ratio} of {sampler.mask_schedule} with min_mask_ratio {sampler.min_mask_ratio:g}; "
                "use mask_ratio uniform, or schedule with cosine or linear, and min_mask_ratio 0"
            )
        first = torch.zeros(1, dtype=torch.int64)
        sampler.slope(network.num_tokens, index=first, epoch=first, position=first, global_batch=1)


def _check_objective(name: str, objective: Objective) -> None:
    """Checks the contract of an objective on two images of three tokens: a finite scalar."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective {name!r} must be an Objective, got {shorten(objective)}")
    check_number(f"objective {name!r}: visible_weight", objective.visible_weight, "[0, 1000000]")
    rows, ones, is_masked = torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6), torch.arange(6) % 2 == 0
    loss = objective(TokenLosses(ones, rows, 2, is_masked, ~is_masked, torch.ones(2), ones))
    if not isinstance(loss, Tensor) or loss.shape != () or not bool(loss.isfinite()):
        raise ValueError(f"objective {name!r}: the loss must be a finite scalar tensor, got {shorten(loss)}")


objectives: Registry[Objective] = Registry("objective", "maskgit_pl.objectives", check=_check_objective)


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
        if self.visible_weight == 0:
            return mean_over_rows(tokens.losses, tokens.rows, num_rows=tokens.num_rows)
        weights = tokens.weights(self.visible_weight)
        # Each image has a masked token, so the sum of its weights is at least 1.
        return (tokens.sum_rows(weights * tokens.losses) / tokens.sum_rows(weights)).mean()


@objectives.register("elbo")
@dataclass(frozen=True)
class Elbo(Objective):
    """An unbiased estimate of an upper bound of -log p(x | class) / N in nats per token.

    loss = mean over images of min(|dr/du|, max_weight) (mean of l over masked tokens)
           + visible_weight (mean of l over visible tokens that are predicted)

    The mask ratio r = gamma(u) of a uniform u has the density 1 / |dr/du|, so the weight |dr/du| turns the expectation
    under the drawn ratios into that under uniform ratios. With ceil(r N) masked tokens, it is the order-agnostic bound
    of ``evaluation.likelihood.negative_elbo``, divided by N. Set ``label_smoothing`` to 0 for a bound in nats.

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
        visible = tokens.sum_rows((1 - masked) * tokens.weights(self.visible_weight) * tokens.losses)
        return loss + (visible / tokens.sum_rows(1 - masked).clamp(min=1)).mean()


@objectives.register("cluster_cross_entropy")
@dataclass(frozen=True)
class ClusterCrossEntropy(MaskedCrossEntropy):
    """The loss of ``masked_cross_entropy``, with l + cluster_weight c in place of l.

    c = -log(sum of the probabilities of the codes in the cluster of the right code). A wrong code costs less if it is
    similar to the right one. The clusters come from a balanced k-means of the tokenizer's codes
    (``balanced_clusters``).

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


def check_clusters(num_clusters: int, network: BackboneConfig, *, tokenizer: str) -> None:
    """Checks that the codes of a tokenizer can be clustered for a loss.

    Args:
        num_clusters: n, number of clusters.
        network: Configuration of the network that is trained.
        tokenizer: Folder of the tokenizer.

    Raises:
        ValueError: if there is no tokenizer, n does not divide the codebook size, or the network has token groups.
    """
    size = network.codebook_size
    if not tokenizer:
        raise ValueError("tokenizer must be a pretrained folder for an objective with clusters of its codes, got ''")
    if size % num_clusters or size == num_clusters:
        raise ValueError(
            f"objective num_clusters must divide the codebook size {size} and be smaller, got {num_clusters}"
        )
    if network.num_token_groups > 1:
        raise ValueError(
            "network.num_token_groups must be 1 for an objective with clusters of codes, which needs a logit for each "
            f"code, got {network.num_token_groups}; use the objective masked_cross_entropy"
        )


@torch.no_grad()
def balanced_clusters(codes: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """Divides codes into clusters of equal size, by a balanced k-means.

    1. Start from different codes, drawn by a counter-based permutation.
    2. Assign the codes to the centers, K / n to each, and move each center to the mean of its codes, 10 times.

    Args:
        codes: (K, D) float: the codes.
        num_clusters: n, a divisor of K.
        seed: Seed of the choice, in [0, 2**32).

    Returns:
        (n, K / n) int64 on the CPU: the codes of each cluster, in rising order.

    Source: IAR, arXiv:2501.00880, balanced k-means clustering; its code runs up to 100 iterations on normalized codes.
    """
    codes = codes.detach().cpu().float()
    # 1.
    centers = codes[permutation(torch.arange(num_clusters), len(codes), stream="code-clusters", seed=seed)]
    # 2.
    for _ in range(_ITERATIONS):
        members = _assign(squared_distances(codes, centers)).argsort(stable=True).view(num_clusters, -1)
        centers = codes[members].mean(1)
    return members


def _assign(distances: Tensor) -> Tensor:
    """Assigns K / n codes to each of n centers, nearest ones first.

    In each round every free code asks for its nearest center that is not full, and a center takes those that are
    nearest to it while it has room.

    Args:
        distances: (K, n) float32.

    Returns:
        (K,) int64 in [0, n).
    """
    codebook_size, num_clusters = distances.shape
    room = torch.full((num_clusters,), codebook_size // num_clusters)
    assigned, free = torch.empty(codebook_size, dtype=torch.int64), torch.arange(codebook_size)
    while len(free):
        nearest, center = distances[free].masked_fill(room == 0, torch.inf).min(1)
        order = nearest.argsort(stable=True)
        order = order[center[order].argsort(stable=True)]  # center after center, the nearest codes first
        asked = torch.bincount(center, minlength=num_clusters)
        # The place of each code in the queue of its center.
        place = torch.arange(len(free)) - (asked.cumsum(0) - asked)[center[order]]
        taken = order[place < room[center[order]]]
        assigned[free[taken]] = center[taken]
        room -= torch.bincount(center[taken], minlength=num_clusters)
        free = free[torch.ones(len(free), dtype=torch.bool).index_fill(0, taken, value=False)]
    return assigned


class Corruption(ABC):
    """A rule that replaces visible tokens. Subclasses are frozen dataclasses.

    Attributes:
        fraction: Probability that a visible token is replaced, in (0, 1).
    """

    fraction: float

    @abstractmethod
    def codes(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        """Returns the new codes, (R,) int64 in [0, K), image after image.

        Args:
            tokens: (B, N) int64 in [0, K): the true tokens.
            replaced: (B, N) bool: the R positions to replace.
            uniform: (R,) float32 in (0, 1): random numbers, a function of (seed, sample, epoch, position).
            codebook_size: K.
            predict: Computes the logits (R, K) of the replaced positions, which the network sees masked in addition to
                the mask. It costs a forward pass.
        """

    def draw(self, mask: Tensor, *, seed: int, index: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the positions to replace.

        Args:
            mask: (B, N) bool, True = masked; masked tokens are not replaced.
            seed: Seed in [0, 2**32).
            index: (B,) int64: sample index.
            epoch: (B,) int64.

        Returns:
            (B, N) bool, True = replaced, and (R,) float32, the random numbers of ``codes``.
        """
        chance, codes = random_uniform(
            ["corruption", "corruption/codes"], seed=seed, index=index, epoch=epoch, count=mask.shape[1]
        )  # (B, N) each
        replaced = (chance < self.fraction) & ~mask
        return replaced, codes[replaced]

    def corrupt(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        """Returns the tokens (B, N) int64 with new codes where ``replaced``; a new code may be the true one.

        Args:
            tokens: (B, N) int64 in [0, K).
            replaced: (B, N) bool, from ``draw``.
            uniform: (R,) float32, from ``draw``.
            codebook_size: K.
            predict: (B, N) bool, the positions to replace -> their logits (R, K).
        """
        new = self.codes(tokens, replaced, uniform, codebook_size=codebook_size, predict=predict)
        return tokens.masked_scatter(replaced, new)


def _check_corruption(name: str, corruption: Corruption) -> None:
    """Checks the contract of a corruption on four tokens of two images."""
    if not isinstance(corruption, Corruption):
        raise ValueError(f"corruption {name!r} must be a Corruption, got {shorten(corruption)}")
    check_number(f"corruption {name!r}: fraction", getattr(corruption, "fraction", None), "(0, 1)")
    tokens, replaced = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[True, False], [True, True]])
    uniform = torch.tensor([0.1, 0.5, 0.9])
    codes = corruption.codes(
        tokens, replaced, uniform, codebook_size=3, predict=lambda at: torch.zeros(int(at.sum()), 3)
    )
    if not isinstance(codes, Tensor) or codes.shape != (3,) or codes.dtype != torch.int64:
        seen = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else shorten(codes)
        raise ValueError(f"corruption {name!r}: the codes must be an int64 tensor (R,), got {seen}")
    if not bool(((codes >= 0) & (codes < 3)).all()):
        raise ValueError(f"corruption {name!r}: the codes must lie in [0, K), got {codes.tolist()} for K = 3")


corruptions: Registry[Corruption] = Registry("corruption", "maskgit_pl.corruptions", check=_check_corruption)


@corruptions.register("uniform")
@dataclass(frozen=True)
class UniformCorruption(Corruption):
    """Codes that are uniform over the codebook.

    Args:
        fraction: Probability that a visible token is replaced, in (0, 1).

    Source: random replacement of BERT, arXiv:1810.04805; for token editing, LLaDA2.1, arXiv:2602.08676. NLD-Image,
    arXiv:2606.29814, edits the tokens of images; its training was not reproduced.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "(0, 1)")

    def codes(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        return (uniform * codebook_size).long().clamp(max=codebook_size - 1)


@corruptions.register("model")
@dataclass(frozen=True)
class ModelCorruption(Corruption):
    """Codes that the model draws for these positions: mistakes of the kind that decoding makes.

    The averaged network, which is the one that is sampled, sees the replaced positions masked in addition to the mask.
    It costs an additional forward pass without gradients.

    Args:
        fraction: Probability that a visible token is replaced, in (0, 1).

    Source: the idea of ProSeCo, Schiff et al., arXiv:2602.11590, which instead fills all masked tokens with the most
    likely codes, and adds a second loss on that sequence.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "(0, 1)")

    def codes(
        self, tokens: Tensor, replaced: Tensor, uniform: Tensor, *, codebook_size: int, predict: Predict
    ) -> Tensor:
        return draw_codes(predict(replaced).float(), uniform)

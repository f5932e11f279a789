"""The losses of both stages, computed in float32: pure functions, and the objectives of stage 2 by name.

Used by ``token_model`` and ``mvtm`` (stage 2), and by ``tokenizer_losses`` (stage 1). An ``Objective`` turns the
cross-entropies of the tokens of a batch into the loss. Yours is a registered frozen dataclass::

    @objectives.register("sum")
    @dataclass(frozen=True)
    class Sum(Objective):
        def __call__(self, tokens: TokenLosses) -> Tensor:
            return tokens.sum_rows(tokens.losses).mean()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maskgit_pl.checks import check_number
from maskgit_pl.networks.backbone import likeliest_tokens, split_tokens
from maskgit_pl.registry import Registry, derives_from

AdversarialLoss = Literal["hinge", "non-saturating"]

_MOST_LOGITS = 2**25  # logits of a step that are computed at once: 128 MiB in float32, of which a step has some copies
_CHUNK_LOGITS = 2**24  # logits of a chunk
_LEAST_COLUMNS = 2**14  # below, the logits are no larger than the activations of the network
_LEAST_ROWS = 128  # of a chunk: with fewer rows, a GPU would wait for the memory of the table


def token_cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, num_token_groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy of each of M tokens.

    Args:
        logits: (M, V) float: logits of the tokens; V = G k with G token groups of k values.
        targets: (M,) int64 in [0, V), or in [0, k^G).
        label_smoothing: s in [0, 1): the target is (1 - s) one-hot + s / V, as in
            ``torch.nn.CrossEntropyLoss``; in each group (1 - s) one-hot + s / k.
        num_token_groups: G. Above 1, the loss of a token is the sum of the cross-entropies of its groups,
            whose negative log-likelihood is that of the token.

    Returns:
        (M,) float32 cross-entropies with label smoothing, and without.
    """
    if num_token_groups > 1:
        rows = rearrange(logits, "m (groups k) -> (m groups) k", groups=num_token_groups)
        digits = split_tokens(targets, num_groups=num_token_groups, group_size=rows.shape[1]).flatten()
        of_digits = token_cross_entropy(rows, digits, label_smoothing=label_smoothing)
        losses, nll = (values.view(-1, num_token_groups).sum(1) for values in of_digits)
        return losses, nll
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    nll = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)  # (M,)
    if label_smoothing == 0:
        return nll, nll
    # -sum_v target_v log p_v, with the uniform part as a mean over the V columns.
    losses = (1 - label_smoothing) * nll - label_smoothing * log_probabilities.mean(-1)
    return losses, nll


def mean_over_rows(losses: Tensor, rows: Tensor, *, num_rows: int) -> Tensor:
    """Computes the loss of the paper: the mean over images of (sum of the losses of an image's tokens / their number).

    The mean is over images, not over tokens, so the loss of a global batch does not depend on the number of
    ranks and micro-batches.

    Args:
        losses: (M,) float32: cross-entropies of the predicted tokens of all images.
        rows: (M,) int64 in [0, B): the image of each token.
        num_rows: B. An image without predicted tokens adds 0 to the sum and counts in the mean.

    Returns:
        Scalar float32.

    Source: released code, ``weighted_sequence_cross_entropy`` (it gives NaN for an image without masked tokens).
    """
    # No bincount: it waits for the device to learn the largest row.
    counts = torch.zeros(num_rows, dtype=torch.int64, device=rows.device).index_add(0, rows, torch.ones_like(rows))
    return (losses / counts[rows]).sum() / num_rows


class TokenStatistics(NamedTuple):
    """The statistics of the logits of M predicted tokens: everything that training needs of them.

    Args:
        losses: (M,) float32: cross-entropies with label smoothing, with a graph.
        nll: (M,) float32: negative log-likelihoods, detached.
        hits: (M,) float32: 1 where the most likely code is the right one.
    """

    losses: Tensor
    nll: Tensor
    hits: Tensor


def token_statistics(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, num_token_groups: int = 1
) -> TokenStatistics:
    """Computes the statistics of logits; see ``token_cross_entropy`` for the arguments."""
    losses, nll = token_cross_entropy(
        logits, targets, label_smoothing=label_smoothing, num_token_groups=num_token_groups
    )
    hits = (likeliest_tokens(logits.detach(), num_groups=num_token_groups) == targets).float()
    return TokenStatistics(losses, nll.detach(), hits)


def needs_chunks(num_tokens: int, num_columns: int) -> bool:
    """Returns True if logits (M, V) are so large that ``chunked_statistics`` must compute them in chunks.

    It is for large codebooks: V >= 16,384 and M V > 2^25. Smaller logits are computed at once.
    """
    return num_columns >= _LEAST_COLUMNS and num_tokens * num_columns > _MOST_LOGITS


def chunked_statistics(
    x: Tensor, table: Tensor, bias: Tensor, *, targets: Tensor, measure: Callable[[Tensor, Tensor], TokenStatistics]
) -> Tensor:
    """Computes the statistics of the logits x table^T + bias, without a tensor that holds all of them.

    1. Compute the logits of a chunk of rows, and their statistics. Keep the statistics only.
    2. In the backward pass, compute the logits of a chunk again: one more matrix product of the head.

    A chunk has 2^24 logits, or 128 rows if they have more.

    Args:
        x: (M, D) float: hidden states.
        table: (V, D) float: a row for each column of the logits.
        bias: (V,) float.
        targets: (M,) int64.
        measure: Logits (m, V) and targets (m,) of some rows -> their statistics; see ``token_statistics``.

    Returns:
        (M, 3) float32: the columns of ``TokenStatistics``. The same up to the order of sums.

    Source: the idea of Liger Kernel, arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009.
    """

    def compute(rows: Tensor, own_targets: Tensor) -> Tensor:
        return torch.stack(measure(F.linear(rows, table, bias), own_targets), dim=1)

    size = max(_LEAST_ROWS, _CHUNK_LOGITS // len(table)) if needs_chunks(len(x), len(table)) else len(x)
    parts = [
        checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(torch.split(x, size), torch.split(targets, size), strict=True)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class TokenLosses:
    """The cross-entropies of the M predicted tokens of a batch, image after image.

    Args:
        losses: (M,) float32: cross-entropies, with a graph.
        rows: (M,) int64 in [0, B): the image of each token.
        num_rows: B, images of the batch.
        is_masked: (M,) bool, False for tokens that the network saw.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    is_masked: Tensor

    def sum_rows(self, values: Tensor) -> Tensor:
        """Returns (B,) float32: the sums of ``values`` (M,) over the tokens of each image."""
        # Atomic additions have no order on a GPU; in float64 the order does not change the float32 result.
        zeros = torch.zeros(self.num_rows, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.rows, values.double()).float()


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
        weights = torch.ones_like(tokens.losses).masked_fill(~tokens.is_masked, self.visible_weight)
        # Each image has a masked token, so the sum of its weights is at least 1.
        return (tokens.sum_rows(weights * tokens.losses) / tokens.sum_rows(weights)).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Computes the loss of the discriminator.

    hinge: mean max(0, 1 - real) + mean max(0, 1 + fake); non-saturating: mean softplus(-real) + mean softplus(fake).

    Args:
        real_logits: (B, ...) float: logits of real images.
        fake_logits: (B, ...) float: logits of reconstructions.
        kind: ``"hinge"`` or ``"non-saturating"``.

    Source: released code, ``losses.py``.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake_logits: Tensor, *, kind: AdversarialLoss) -> Tensor:
    """Computes the adversarial loss of the generator from the logits (B, ...) of reconstructions, scalar float32.

    hinge: -mean fake; non-saturating: mean softplus(-fake). Source: released code, ``losses.py``.
    """
    fake = fake_logits.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Computes the R1 penalty: the mean squared norm of the gradient of the logits at real images, without 1/2.

    Args:
        real_logits: (B, ...) float, computed from ``images``; several logits of an image count as their mean.
        images: (B, C, H, W) float that requires a gradient.

    Returns:
        Scalar float32 with a graph, to be multiplied by its weight.

    Source: Mescheder et al., arXiv:1801.04406; without 1/2 as in the released code.
    """
    # A logit depends on its own image only, so the gradient of the sum holds the gradient of each logit.
    logits = real_logits.float().flatten(1).mean(1)  # (B,)
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def lecam_loss(real_logits: Tensor, fake_logits: Tensor, *, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Computes the LeCam regularisation, which pulls logits towards the mean of the other side.

    mean max(0, real - fake_mean)^2 + mean max(0, real_mean - fake)^2

    Args:
        real_logits: (B, ...) float: logits of real images.
        fake_logits: (B, ...) float: logits of reconstructions.
        real_mean: Scalar: moving average of the logits of real images.
        fake_mean: Scalar: moving average of the logits of reconstructions.

    Returns:
        Scalar float32.

    Source: Tseng et al., arXiv:2104.03310, as in the MAGVIT code.
    """
    real, fake = real_logits.float(), fake_logits.float()
    return F.relu(real - fake_mean).square().mean() + F.relu(real_mean - fake).square().mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Computes the adaptive weight |reconstruction gradient| / (|adversarial gradient| + 1e-4), clamped to [0, 1e4].

    Args:
        reconstruction_gradient: Gradient of the other losses with respect to the decoder's last layer.
        adversarial_gradient: Gradient of the adversarial loss with respect to that layer, of the same shape.

    Returns:
        Scalar float32, detached.

    Source: Esser et al., arXiv:2012.09841, eq. 7, with the constants of its code.
    """
    norm = torch.linalg.vector_norm
    ratio: Tensor = norm(reconstruction_gradient.float()) / (norm(adversarial_gradient.float()) + 1e-4)
    return ratio.clamp(0, 1e4).detach()

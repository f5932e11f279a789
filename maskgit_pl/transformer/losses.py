"""The losses of stage 2, computed in float32: pure functions, and the objectives by name.

Used by ``token_model`` and ``mvtm``. An ``Objective`` turns the cross-entropies of the tokens of a batch into the loss.
Yours is a registered frozen dataclass::

    @objectives.register("sum")
    @dataclass(frozen=True)
    class Sum(Objective):
        def __call__(self, tokens: TokenLosses) -> Tensor:
            return tokens.sum_rows(tokens.losses).mean()

One that needs more than the cross-entropies names it in ``needs``: an objective of the logits, such as soft targets, or
of hidden states, such as an alignment of representations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_number
from maskgit_pl.networks.backbone import likeliest_tokens, split_tokens
from maskgit_pl.registry import Registry, derives_from


class StepLosses(NamedTuple):
    """The result of forward pass and loss for a micro-batch.

    Args:
        loss: Scalar float32, with a graph.
        token_losses: (M,) float32: negative log-likelihoods of the predicted tokens, detached.
        hits: (M,) float32: 1 where the most likely code is the right one.
    """

    loss: Tensor
    token_losses: Tensor
    hits: Tensor


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


def token_statistics(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, num_token_groups: int = 1
) -> Tensor:
    """Computes everything that training needs of the logits of M predicted tokens.

    See ``token_cross_entropy`` for the arguments.

    Returns:
        (M, 3) float32. Columns: the cross-entropy with label smoothing, with a graph; the negative log-likelihood; 1
        where the most likely code is the right one.
    """
    losses, nll = token_cross_entropy(
        logits, targets, label_smoothing=label_smoothing, num_token_groups=num_token_groups
    )
    hits = (likeliest_tokens(logits.detach(), num_groups=num_token_groups) == targets).float()
    return torch.stack([losses, nll.detach(), hits], dim=1)


@dataclass(frozen=True)
class TokenLosses:
    """The cross-entropies of the M predicted tokens of a batch, image after image.

    Args:
        losses: (M,) float32: cross-entropies, with a graph.
        rows: (M,) int64 in [0, B): the image of each token.
        num_rows: B, images of the batch.
        is_masked: (M,) bool, False for tokens that the network saw.
        targets: (M,) int64 in [0, K): the true codes. This and the following are None unless the objective needs them.
        logits: (M, V) float32, with a graph; of all M tokens at once, however large.
        hidden: Outputs of each block of the network, in the shapes that the network gives them: (B, N, D) of all
            tokens, with further columns or rows in some networks, and in the last block the M tokens only.
        code_vectors: (K, D) float32: the vectors of the codes of the tokenizer.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    is_masked: Tensor
    targets: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    code_vectors: Tensor | None = None

    def sum_rows(self, values: Tensor) -> Tensor:
        """Returns (B,) float32: the sums of ``values`` (M,) over the tokens of each image."""
        # Atomic additions have no order on a GPU; in float64 the order does not change the float32 result.
        zeros = torch.zeros(self.num_rows, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.rows, values.double()).float()


class Objective(ABC):
    """A mean over images of their tokens' losses. Subclasses are frozen dataclasses.

    Attributes:
        visible_weight: Weight of visible tokens. Above 0, all tokens are predicted.
        needs: Names of the fields of ``TokenLosses`` that it reads beside the cross-entropies: ``targets``,
            ``logits``, ``hidden`` or ``code_vectors``. They are computed in training only.
    """

    visible_weight: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, tokens: TokenLosses) -> Tensor:
        """Returns the loss of a batch, scalar float32: a mean over images, so that it does not depend on the ranks."""


def _check_objective(name: str, objective: Objective) -> None:
    derives_from(Objective)(name, objective)
    if unknown := objective.needs - {"targets", "logits", "hidden", "code_vectors"}:
        raise ValueError(
            f"objective {name!r}: needs must be of targets, logits, hidden and code_vectors, got {sorted(unknown)}"
        )


objectives: Registry[Objective] = Registry(
    "objective", "maskgit_pl.objectives", check=_check_objective, modules=("maskgit_pl.contrib.soft_targets",)
)


@contextmanager
def outputs_of(blocks: Iterable[nn.Module], *, kept: bool) -> Iterator[list[Tensor]]:
    """Collects the outputs of blocks while it is open, for ``TokenLosses.hidden``; none if not ``kept``."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in blocks if kept]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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

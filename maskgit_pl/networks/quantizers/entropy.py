"""The entropy losses of quantizers: sure assignments of each feature, and even use of all codes in the global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.networks.quantizers.base import CodebookQuantizer

__all__ = ["WEIGHTS", "Entropy", "EntropyKind", "check_losses", "entropy_loss", "nearest_and_entropy"]

EntropyKind = Literal["softmax", "argmax"]

WEIGHTS = "[0, 1000000]"  # the range of the weight of a loss


@dataclass(frozen=True)
class Entropy:
    """The weight and form of the entropy loss of -distance; see ``entropy_loss``.

    Attributes:
        weight: Factor of the loss, >= 0; 0 omits it.
        temperature: Divisor of the distances before the softmax, > 0.
        kind: ``softmax``: soft assignment; ``argmax``: one-hot assignment with a straight-through gradient.
    """

    weight: float
    temperature: float
    kind: EntropyKind


class LossNumbers(Protocol):
    """The fields that ``check_losses`` reads."""

    @property
    def commitment(self) -> float:
        """The weight of the commitment loss."""
        ...

    @property
    def entropy_weight(self) -> float:
        """The weight of the entropy loss."""
        ...

    @property
    def entropy_temperature(self) -> float:
        """The divisor of the affinity."""
        ...

    @property
    def entropy_kind(self) -> EntropyKind:
        """The form of the assignment."""
        ...


def entropy_loss(affinity: Tensor, *, temperature: float, kind: EntropyKind = "softmax") -> Tensor:
    """Computes the mean entropy of each row's assignment minus the entropy of the mean assignment.

    mean_m H(p_m) - H(mean_m p_m), p = softmax(affinity / temperature): low if each row prefers one code and the rows
    together use all codes. The mean assignment is all-reduced over the ranks, with its gradient.

    Args:
        affinity: (..., K) float, such as negative distances.
        temperature: Divisor of the affinity, > 0.
        kind: ``softmax``: soft assignments; ``argmax``: one-hot ones with the gradient of the soft ones.

    Returns:
        Scalar float32.

    Source: released code, ``entropy_loss``, including the 1e-5 inside the logarithm.
    """
    flat = affinity.float().flatten(0, -2) / temperature  # (M, K)
    log_probabilities = F.log_softmax(flat, dim=-1)
    probabilities = log_probabilities.exp()
    if kind == "argmax":
        one_hot = F.one_hot(flat.argmax(-1), flat.shape[-1]).to(flat.dtype)
        # Straight-through: the value is one-hot, the gradient that of the probabilities.
        probabilities = one_hot + (probabilities - probabilities.detach())
    mean = mean_over_ranks(probabilities.mean(0))
    mean_entropy = -(mean * (mean + 1e-5).log()).sum()
    return -(probabilities * log_probabilities).sum(-1).mean() - mean_entropy


def nearest_and_entropy(quantizer: CodebookQuantizer, rows: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
    """Returns (M,) nearest codes and the weighted entropy loss; without that loss, distances need no graph."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy.weight > 0):
        distances = quantizer.distances(rows)
    tokens = distances.argmin(1)
    if entropy.weight == 0:
        return tokens, rows.new_zeros(())
    return tokens, entropy.weight * entropy_loss(-distances, temperature=entropy.temperature, kind=entropy.kind)


def check_losses(spec: LossNumbers) -> None:
    """Checks the numbers of commitment and entropy.

    Raises:
        ValueError: if one is out of range.
    """
    check_number("commitment", spec.commitment, WEIGHTS)
    check_number("entropy_weight", spec.entropy_weight, WEIGHTS)
    check_number("entropy_temperature", spec.entropy_temperature, "[0.00001, 1000000]")
    check_choice("entropy_kind", spec.entropy_kind, get_args(EntropyKind))

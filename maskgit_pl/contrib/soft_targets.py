"""The objective ``soft_targets``: codes that look like the true one are half right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.transformer.losses import Objective, TokenLosses, mean_over_rows, objectives

__all__ = ["SoftTargets"]


@objectives.register("soft_targets")
@dataclass(frozen=True)
class SoftTargets(Objective):
    """The cross-entropy with targets that are spread over similar codes, in place of label smoothing.

    The target of the true code y is (1 - ``weight``) one-hot(y) + ``weight`` softmax_v(-|c_v - c_y|^2 / (``width`` d)),
    with c the code vectors of the tokenizer and d the mean squared distance of two random codes.

    Args:
        weight: Share of the target that is spread, in (0, 1].
        width: Width of the spread, in [0.001, 1000]; a large one is label smoothing.

    Source: smoothing by the distances of classes: Bertinetto et al., arXiv:1912.09393.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"targets", "logits", "code_vectors"})
    weight: float = 0.1
    width: float = 0.1

    def __post_init__(self) -> None:
        check_number("weight", self.weight, "(0, 1]")
        check_number("width", self.width, "[0.001, 1000]")

    def __call__(self, tokens: TokenLosses) -> Tensor:
        codes, targets = tokens.code_vectors, tokens.targets
        assert codes is not None
        assert targets is not None
        assert tokens.logits is not None
        scale = self.width * 2 * codes.var(dim=0, unbiased=False).sum()
        distances = torch.cdist(codes[targets], codes).square()  # (M, K)
        # The logits may have columns beside those of the codes.
        log_probs = F.log_softmax(tokens.logits, dim=-1)[:, : len(codes)]
        nll = -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
        spread = -((-distances / scale).softmax(1) * log_probs).sum(1)
        losses = (1 - self.weight) * nll + self.weight * spread
        return mean_over_rows(losses, tokens.rows, num_rows=tokens.num_rows)

"""Soft targets by hand, and their limit."""

import torch
from torch.nn import functional as F

from maskgit_pl.transformer.losses import TokenLosses, objectives

CODES = torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0]])


def loss(logits: torch.Tensor, targets: torch.Tensor, **options: float) -> torch.Tensor:
    plain = F.cross_entropy(logits, targets, reduction="none")
    rows = torch.arange(len(targets))
    tokens = TokenLosses(plain, rows, len(rows), rows >= 0, targets, logits, code_vectors=CODES)
    return objectives.build({"name": "soft_targets", **options})(tokens)


def test_the_target_is_spread_over_near_codes():
    logits, target = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0])
    spread = 2 * float(CODES.var(0, unbiased=False).sum())  # mean squared distance of two random codes
    near = torch.softmax(-torch.tensor([0.0, 1.0, 9.0]) / (0.5 * spread), 0)
    expected = -(0.75 * torch.tensor([1.0, 0, 0]) + 0.25 * near) @ logits.log_softmax(-1)[0, :3]
    torch.testing.assert_close(loss(logits, target, weight=0.25, width=0.5), expected)


def test_a_narrow_spread_is_the_cross_entropy():
    logits, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(loss(logits, targets, width=1e-3), F.cross_entropy(logits, targets))

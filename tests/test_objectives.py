"""Objectives: the bound is unbiased, and weights follow their formulas."""

import math

import pytest
import torch
from torch import Tensor

from maskgit_pl.masking import MaskSampler, mask_ratios
from maskgit_pl.objectives import TokenLosses, objectives
from maskgit_pl.schedules import mask_schedules

N, K = 4, 3
SAMPLES = 1 << 13
JOINT = torch.randn(K**N, generator=torch.Generator().manual_seed(1)).mul(1.5).log_softmax(0).view([K] * N)
IMAGE = torch.tensor([2, 0, 1, 1])
EXACT = -float(JOINT[tuple(IMAGE.tolist())]) / N  # the order-agnostic bound of exact conditionals is tight


def nll_of(mask: Tensor, position: int) -> float:
    """-log p(token at a position | visible tokens) of the joint distribution."""
    visible = tuple(slice(None) if mask[i] else int(IMAGE[i]) for i in range(N))
    rest = JOINT[visible].movedim(int(mask[:position].sum()), 0).reshape(K, -1).logsumexp(1)
    return -float(rest.log_softmax(0)[IMAGE[position]])


MASKS = [torch.tensor([number >> i & 1 for i in range(N)]).bool() for number in range(2**N)]
TABLE = torch.tensor([[nll_of(mask, i) if mask[i] else 0.0 for i in range(N)] for mask in MASKS])  # (2^N, N)


def estimate(schedule: object, ratio: object = "schedule", objective: object = "elbo") -> float:
    """The objective over many images, all of them IMAGE, with the NLLs of the table."""
    sampler = MaskSampler(mask_schedules.build(schedule), 3, mask_ratio=mask_ratios.build(ratio))
    slot = torch.arange(SAMPLES)
    place = {"index": slot, "epoch": torch.zeros_like(slot), "position": slot, "global_batch": 64}
    mask = sampler.mask(N, **place)
    losses = TABLE[(mask * 2 ** torch.arange(N)).sum(1)][mask]
    slopes = sampler.slope(N, **place)
    return float(objectives.build(objective)(TokenLosses(losses, mask.nonzero()[:, 0], SAMPLES, slopes=slopes)))


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        *((name, "schedule") for name in ("linear", "cosine", "square", "cubic", "log")),
        ({"name": "pow", "exponent": 1.5}, "schedule"),
        ("cosine", "uniform"),
        ("cosine", {"name": "truncated_normal", "low": 0.0, "std": 1.0}),
    ],
    ids=str,
)
def test_the_elbo_is_the_likelihood_of_a_joint_distribution(schedule, ratio):
    assert estimate(schedule, ratio) == pytest.approx(EXACT, rel=0.02)


def test_without_the_weight_the_schedule_changes_the_value():
    assert abs(estimate("cubic", objective="masked_cross_entropy") - EXACT) > 0.05 * EXACT


def test_max_weight_bounds_the_weight_of_an_image():
    tokens = TokenLosses(torch.ones(4), torch.tensor([0, 0, 1, 1]), 2, slopes=torch.tensor([1.0, math.inf]))
    assert float(objectives.build({"name": "elbo", "max_weight": 5})(tokens)) == pytest.approx((1 + 5) / 2)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_visible_tokens_are_weighted_in_the_mean(weight):
    losses = torch.rand(12, generator=torch.Generator().manual_seed(0))
    tokens = TokenLosses(losses, torch.arange(12) // 4, 3, torch.tensor([1, 0, 0, 1] * 3).bool())
    loss = objectives.build({"name": "masked_cross_entropy", "visible_weight": weight})(tokens)
    expected = losses.view(3, 4) @ torch.tensor([1, weight, weight, 1]) / (2 + 2 * weight)
    assert float(loss) == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "elbo", "max_weight": 0.5}, r"max_weight must be a number in \[1, 1000000\], got 0.5"),
        ({"name": "masked_cross_entropy", "visible_weight": -1}, "visible_weight must be a number"),
    ],
)
def test_arguments_out_of_range_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        objectives.build(spec)

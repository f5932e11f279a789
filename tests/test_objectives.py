"""Objectives by name: the bound is unbiased, weights mean what they say, and the default is the plain loss.

Corruption of visible tokens: which are replaced, by what, and that the masks stay as they are.
"""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from maskgit_pl.masking import MaskSampler, mask_ratios
from maskgit_pl.objectives import (
    TokenLosses,
    corruptions,
    objectives,
)
from maskgit_pl.schedules import mask_schedules

N, K = 4, 3
SAMPLES = 1 << 13
JOINT = torch.randn(K**N, generator=torch.Generator().manual_seed(1)).mul(1.5).log_softmax(0).view([K] * N)
IMAGE = torch.tensor([2, 0, 1, 1])


def nll_of(mask: Tensor, position: int) -> float:
    """-log p(token at a position | visible tokens) of the joint distribution."""
    visible = tuple(slice(None) if mask[i] else int(IMAGE[i]) for i in range(N))
    rest = JOINT[visible].movedim(int(mask[:position].sum()), 0).reshape(K, -1).logsumexp(1)
    return -float(rest.log_softmax(0)[IMAGE[position]])


def table() -> Tensor:
    """The NLLs of each of the 2^N masks at each position, (2^N, N)."""
    masks = [torch.tensor([number >> i & 1 for i in range(N)]).bool() for number in range(2**N)]
    return torch.tensor([[nll_of(mask, i) if mask[i] else 0.0 for i in range(N)] for mask in masks])


TABLE = table()


def brute_force() -> float:
    """The order-agnostic bound divided by N: over counts, over masks of that count, over masked tokens."""
    total = 0.0
    for count in range(1, N + 1):
        chosen = list(combinations(range(N), count))
        total += sum(float(TABLE[sum(1 << i for i in each)].sum()) / count for each in chosen) / len(chosen) / N
    return total


def estimate(schedule: object, ratio: object = "schedule", objective: object = "elbo") -> float:
    """The objective over many images, all of them IMAGE, with the NLLs of the table."""
    sampler = MaskSampler(mask_schedules.build(schedule), 3, mask_ratio=mask_ratios.build(ratio))
    slot = torch.arange(SAMPLES)
    place = {"index": slot, "epoch": torch.zeros_like(slot), "position": slot, "global_batch": 64}
    mask = sampler.mask(N, **place)
    losses = TABLE[(mask * 2 ** torch.arange(N)).sum(1)][mask]
    slopes = sampler.slope(N, **place)
    return float(objectives.build(objective)(TokenLosses(losses, mask.nonzero()[:, 0], SAMPLES, slopes=slopes)))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "square", "cubic", "log", {"name": "pow", "exponent": 1.5}])
def test_the_elbo_is_the_brute_force_bound_for_every_schedule(schedule):
    assert estimate(schedule) == pytest.approx(brute_force(), rel=0.02)
    assert estimate(schedule) == pytest.approx(estimate("linear", objective="masked_cross_entropy"), rel=0.02)


@pytest.mark.parametrize("ratio", ["uniform", {"name": "truncated_normal", "low": 0.0, "std": 1.0}])
def test_the_elbo_is_the_brute_force_bound_for_every_distribution_of_ratios(ratio):
    assert estimate("cosine", ratio) == pytest.approx(brute_force(), rel=0.02)


def test_the_bound_of_a_joint_distribution_is_its_negative_log_likelihood():
    exact = -float(JOINT[tuple(IMAGE.tolist())]) / N
    assert brute_force() == pytest.approx(exact, rel=1e-5)
    assert estimate("cosine") == pytest.approx(exact, rel=0.02)


def test_without_the_weight_the_schedule_changes_the_value():
    plain = estimate("cubic", objective="masked_cross_entropy")
    assert abs(plain - brute_force()) > 0.05 * brute_force()


def test_the_largest_weight_is_a_bound():
    given = TokenLosses(torch.ones(4), torch.tensor([0, 0, 1, 1]), 2, slopes=torch.tensor([1.0, math.inf]))
    assert float(objectives.build({"name": "elbo", "max_weight": 5})(given)) == pytest.approx((1 + 5) / 2)


def loss_of_half_masked_images(name: str, *, visible_weight: float) -> tuple[float, Tensor]:
    """The loss of three images of four tokens, of which the first and the last are masked, and their losses (3, 4)."""
    losses = torch.rand(12, generator=torch.Generator().manual_seed(0))
    is_masked = torch.tensor([1, 0, 0, 1] * 3).bool()
    given = TokenLosses(losses, torch.arange(12) // 4, 3, is_masked, ~is_masked, torch.ones(3))
    return float(objectives.build({"name": name, "visible_weight": visible_weight})(given)), losses.view(3, 4)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_visible_weight_is_the_weight_of_a_mean(weight):
    found, losses = loss_of_half_masked_images("masked_cross_entropy", visible_weight=weight)
    expected = losses @ torch.tensor([1, weight, weight, 1]) / (2 + 2 * weight)
    assert found == pytest.approx(float(expected.mean()))


def test_visible_tokens_are_added_to_the_bound():
    found, losses = loss_of_half_masked_images("elbo", visible_weight=0.25)
    expected = losses[:, [0, 3]].mean(1) + 0.25 * losses[:, [1, 2]].mean(1)
    assert found == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("name", objectives.names())
def test_objectives_say_where_they_come_from_and_have_gradients(name):
    assert "Source:" in (type(objectives.build(name)).__doc__ or "")
    losses = torch.ones(4, requires_grad=True)
    given = TokenLosses(losses, torch.tensor([0, 0, 1, 1]), 2, None, None, torch.ones(2))
    objectives.build(name)(given).backward()
    assert losses.grad is not None
    assert (losses.grad > 0).all()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("cross_entropy", "unknown objective 'cross_entropy': did you mean 'masked_cross_entropy'"),
        ({"name": "elbo", "max_weight": 0.5}, r"max_weight must be a number in \[1, 1000000\], got 0.5"),
        ({"name": "masked_cross_entropy", "visible_weight": -1}, "visible_weight must be a number"),
        ({"name": "masked_cross_entropy", "visible": 1}, "did you mean 'visible_weight'"),
    ],
)
def test_wrong_objectives_are_refused_by_name(spec, text):
    with pytest.raises(ValueError, match=text):
        objectives.build(spec)


B, NUM_TOKENS, CODEBOOK_SIZE = 400, 16, 8
TOKENS = torch.randint(CODEBOOK_SIZE, (B, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
MASK = torch.rand(B, NUM_TOKENS, generator=torch.Generator().manual_seed(1)) < 0.4
every_corruption = pytest.mark.parametrize("name", corruptions.names())


def seven(replaced: Tensor) -> Tensor:
    """Logits of a network that is sure of code 7, with a little of code 2."""
    return torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 7]).expand(int(replaced.sum()), CODEBOOK_SIZE)


def corrupt(name: str, *, rows: slice = slice(None), seed: int = 3, epoch: int = 0, fraction: float = 0.25):
    index, corruption = torch.arange(B)[rows], corruptions.build({"name": name, "fraction": fraction})
    replaced, uniform = corruption.draw(MASK[rows], seed=seed, index=index, epoch=torch.full_like(index, epoch))
    codes = corruption.codes(TOKENS[rows], replaced, uniform, codebook_size=CODEBOOK_SIZE, predict=seven)
    return TOKENS[rows].masked_scatter(replaced, codes), replaced


@every_corruption
def test_a_fraction_of_the_visible_tokens_is_replaced_and_nothing_else(name):
    seen, replaced = corrupt(name)
    assert not (replaced & MASK).any()
    assert torch.equal(seen[~replaced], TOKENS[~replaced])
    assert float(replaced[~MASK].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert 0 <= seen.min() <= seen.max() < CODEBOOK_SIZE
    assert replaced.any(0).all()


@every_corruption
def test_it_depends_on_sample_seed_and_epoch_only(name):
    seen, replaced = corrupt(name)
    for mine, whole in zip(corrupt(name, rows=slice(100, 120)), (seen, replaced), strict=True):
        assert torch.equal(mine, whole[100:120])
    assert not torch.equal(corrupt(name, seed=4)[1], replaced)
    assert not torch.equal(corrupt(name, epoch=1)[1], replaced)


def test_uniform_codes_are_uniform():
    seen, replaced = corrupt("uniform", fraction=0.9)
    share = torch.bincount(seen[replaced], minlength=CODEBOOK_SIZE) / replaced.sum()
    assert (share - 1 / CODEBOOK_SIZE).abs().max() < 0.03


def test_codes_of_the_model_are_drawn_from_its_distribution():
    seen, replaced = corrupt("model", fraction=0.9)
    share = torch.bincount(seen[replaced], minlength=CODEBOOK_SIZE) / replaced.sum()
    torch.testing.assert_close(share, seven(torch.ones(1).bool())[0].softmax(0), atol=0.02, rtol=0)


@every_corruption
def test_corruptions_say_where_they_come_from(name):
    assert "Source:" in (type(corruptions.build(name)).__doc__ or "")


@pytest.mark.parametrize("fraction", [0, 1, -0.1, "half"])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction.* must be a"):
        corruptions.build({"name": "uniform", "fraction": fraction})

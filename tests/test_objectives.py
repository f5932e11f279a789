"""Objectives by name: the bound is unbiased, weights mean what they say, and the default is the plain loss."""

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from maskgit_pl.losses import masked_cross_entropy, token_cross_entropy
from maskgit_pl.masking import MaskSampler, mask_ratios
from maskgit_pl.objectives import Objective, TokenLosses, objectives
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


@pytest.mark.parametrize("ratio", ["uniform", {"name": "beta", "a": 1.5, "b": 1.0}])
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


def random_losses(*, weights: bool) -> tuple[TokenLosses, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    losses, rows = torch.rand(12, generator=chance), torch.arange(12) // 4
    is_masked = torch.tensor([1, 0, 0, 1] * 3).bool()
    weight = torch.where(is_masked, 1.0, 0.25)
    return (
        TokenLosses(losses, rows, 3, is_masked, weight if weights else None, torch.ones(3)),
        losses.view(3, 4),
        weight,
    )


def test_visible_weight_is_the_weight_of_a_mean():
    given, losses, weight = random_losses(weights=True)
    expected = (losses * weight.view(3, 4)).sum(1) / 2.5
    assert float(objectives.build("masked_cross_entropy")(given)) == pytest.approx(float(expected.mean()))


def test_weights_of_one_are_the_plain_mean_over_all_tokens():
    given, losses, _ = random_losses(weights=False)
    assert float(objectives.build("masked_cross_entropy")(given)) == pytest.approx(float(losses.mean()))


def test_visible_tokens_are_added_to_the_bound():
    given, losses, _ = random_losses(weights=True)
    expected = losses[:, [0, 3]].mean(1) + 0.25 * losses[:, [1, 2]].mean(1)
    assert float(objectives.build("elbo")(given)) == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_default_is_masked_cross_entropy_to_the_last_bit(smoothing):
    chance = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(50, 9, generator=chance), torch.randint(9, (50,), generator=chance)
    rows = torch.randint(6, (50,), generator=chance).sort().values
    expected, nll = masked_cross_entropy(logits, targets, rows, num_rows=6, label_smoothing=smoothing)
    losses, plain = token_cross_entropy(logits, targets, label_smoothing=smoothing)
    assert torch.equal(objectives.build("masked_cross_entropy")(TokenLosses(losses, rows, 6)), expected)
    assert torch.equal(plain, nll)


@pytest.mark.parametrize("name", objectives.names())
def test_objectives_say_where_they_come_from_and_have_gradients(name):
    assert "Source:" in (type(objectives.build(name)).__doc__ or "")
    losses = torch.ones(4, requires_grad=True)
    given = TokenLosses(losses, torch.tensor([0, 0, 1, 1]), 2, None, None, torch.ones(2), torch.zeros(4))
    objectives.build(name)(given).backward()
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, torch.full((4,), 0.25))


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


def test_an_objective_that_returns_no_scalar_is_refused(monkeypatch):
    class Broken(Objective):
        def __call__(self, tokens):
            return tokens.losses

    monkeypatch.setitem(objectives._factories, "broken", Broken)
    with pytest.raises(ValueError, match="objective 'broken': the loss must be a finite scalar tensor"):
        objectives.build("broken")

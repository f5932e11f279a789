"""Distributions of the mask ratio: their shape, their stratification, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from maskgit_pl.masking import MaskRatio, MaskSampler, mask_ratios
from maskgit_pl.schedules import mask_schedules

COSINE = mask_schedules.build("cosine")
EVERY = [
    *mask_ratios.names(),
    {"name": "uniform", "low": 0.15, "high": 0.9},
    {"name": "truncated_normal", "mean": 0.2, "std": 0.1, "low": 0.0, "high": 1.0},
    {"name": "beta", "a": 0.5, "b": 3.0},
    {"name": "beta", "a": 100, "b": 80},
]
every_ratio = pytest.mark.parametrize("spec", EVERY, ids=str)


def batch(size: int, step: int = 0) -> dict[str, Tensor | int]:
    slot = torch.arange(size)
    return {"index": slot, "epoch": torch.zeros_like(slot), "position": step * size + slot, "global_batch": size}


def normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def truncated_normal(r: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    below, above = normal((low - mean) / std), normal((high - mean) / std)
    return torch.tensor([(normal((float(x) - mean) / std) - below) / (above - below) for x in r])


CUMULATIVE = [  # a spec, and the cumulative distribution that it must have
    ("schedule", lambda r: 1 - 2 / math.pi * r.acos()),  # P(cos(pi u / 2) <= r)
    ("uniform", lambda r: r),
    ({"name": "uniform", "low": 0.15, "high": 0.9}, lambda r: ((r - 0.15) / 0.75).clamp(0, 1)),
    ("truncated_normal", lambda r: truncated_normal(r, 0.55, 0.25, 0.5, 1.0).clamp(0, 1)),
    ("beta", lambda r: r**2),
    ({"name": "beta", "a": 1, "b": 1}, lambda r: r),
    ({"name": "beta", "a": 0.5, "b": 0.5}, lambda r: 2 / math.pi * r.sqrt().asin()),
    ({"name": "beta", "a": 3, "b": 2}, lambda r: 4 * r**3 - 3 * r**4),
]


@pytest.mark.parametrize(("spec", "cumulative"), CUMULATIVE, ids=lambda part: "" if callable(part) else str(part))
def test_the_ratios_of_a_batch_have_the_cumulative_distribution_of_the_formula(spec, cumulative):
    size = 1000
    ratios = MaskSampler(COSINE, 3, mask_ratio=mask_ratios.build(spec)).ratio(49, **batch(size)).sort().values
    expected = cumulative(ratios.double())
    # Stratified ratios lie within one stratum of the quantiles: closer than independent draws would.
    observed = (torch.arange(size) + 0.5) / size
    assert (expected - observed).abs().max() < 1.1 / size + 1e-4


@every_ratio
@pytest.mark.parametrize("size", [1, 8, 64])
def test_each_stratum_of_the_distribution_is_hit_once_per_step(spec, size):
    made = mask_ratios.build(spec)
    edges = made(torch.linspace(0, 1, size + 1), COSINE, 49)
    edges = edges if edges[0] < edges[-1] else edges.flip(0)
    for step in range(3):
        ratios = MaskSampler(COSINE, 3, mask_ratio=made).ratio(49, **batch(size, step)).sort().values
        assert ((ratios >= edges[:-1] - 1e-6) & (ratios <= edges[1:] + 1e-6)).all()


@every_ratio
def test_equal_specs_give_equal_objects_and_say_where_they_come_from(spec):
    made = mask_ratios.build(spec)
    assert made == mask_ratios.build(spec)
    assert hash(made) == hash(mask_ratios.build(spec))
    assert "Source:" in (type(made).__doc__ or "")


@every_ratio
def test_the_slope_is_the_derivative_of_the_ratio(spec):
    made, size = mask_ratios.build(spec), 64
    sampler = MaskSampler(COSINE, 3, mask_ratio=made)
    u = sampler._draw_progress(*(batch(size)[name] for name in ("index", "epoch", "position")), size)
    inner = (u > 0.02) & (u < 0.98)  # away from vertical ends
    near = 1e-3
    difference = (made(u + near, COSINE, 49) - made(u - near, COSINE, 49)).abs() / (2 * near)
    torch.testing.assert_close(sampler.slope(49, **batch(size))[inner], difference[inner], rtol=0.02, atol=2e-3)


def test_the_default_is_the_schedule_to_the_last_bit():
    assert MaskSampler(COSINE, 3) == MaskSampler(COSINE, 3, mask_ratio=mask_ratios.build("schedule"))
    u = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mask_ratios.build("schedule")(u, COSINE, 49), COSINE(u, 49))


@pytest.mark.parametrize(
    ("spec", "covers"),
    [("schedule", True), ("uniform", True), ("truncated_normal", False), ({"name": "uniform", "low": 0.5}, False)],
)
def test_whether_all_counts_can_be_drawn(spec, covers):
    assert MaskSampler(COSINE, 0, mask_ratio=mask_ratios.build(spec)).covers_all_counts(16) is covers


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("normal", "unknown mask ratio 'normal': .*known: beta, schedule, truncated_normal, uniform"),
        ({"name": "uniform", "low": 0.7, "high": 0.3}, r"high must be a number in \(0.7, 1\], got 0.3"),
        ({"name": "beta", "a": 0}, r"a must be a number in \[0.5, 100\], got 0"),
        ({"name": "truncated_normal", "mean": -1, "std": 0.01}, "mean must be so close .*; move mean"),
        ({"name": "truncated_normal", "sd": 0.1}, "'sd'.*did you mean 'std'"),
    ],
)
def test_wrong_distributions_are_refused_by_name(spec, text):
    with pytest.raises(ValueError, match=text):
        mask_ratios.build(spec)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda u: u * math.nan, r"its values must lie in \[0, 1\]"),
        (lambda u: 2 * u, r"its values must lie in \[0, 1\], got 0 to 2"),
        (lambda u: (2 * u - 1).abs(), "it must never rise or never fall"),
        (lambda u: u[:-1], "it must return a float32 tensor in the shape of u"),
        (lambda u: 0.5, "it must return a float32 tensor in the shape of u, got 0.5"),
    ],
)
def test_a_broken_distribution_is_refused_by_name(monkeypatch, function, rule):
    class Broken(MaskRatio):
        def __call__(self, u, mask_schedule, num_tokens):
            return function(u)

    monkeypatch.setitem(mask_ratios._factories, "broken", Broken)
    with pytest.raises(ValueError, match=f"mask ratio 'broken': {rule}"):
        mask_ratios.build("broken")

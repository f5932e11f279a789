"""Masks of training: stratified ratios, positions by rules with exact counts, and distributions of the ratio."""

import math

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, SeededNoise
from maskgit_pl.masking import MaskPositions, MaskRatio, MaskSampler, mask_positions, mask_ratios
from maskgit_pl.schedules import halton_order, mask_schedules

GLOBAL_BATCH = 64


def batch(step: int = 0, *, epoch: int = 0, size: int = GLOBAL_BATCH) -> dict[str, Tensor | int]:
    slot = torch.arange(size)
    return {
        "index": slot,
        "epoch": torch.full((size,), epoch),
        "position": step * size + slot,
        "global_batch": size,
    }


def sampler(name: str = "cosine", *, seed: int = 3) -> MaskSampler:
    return MaskSampler(mask_schedules.build(name), seed)


@pytest.mark.parametrize("name", ["cosine", "log"])
@pytest.mark.parametrize("num_tokens", [2, 49])
def test_the_count_is_the_ratio_rounded_up_on_every_rank(name, num_tokens):
    for step in range(5):
        ratio, mask = (draw(num_tokens, **batch(step)) for draw in (sampler(name).ratio, sampler(name).mask))
        assert mask.sum(1).tolist() == (ratio.clamp(1e-6, 1) * num_tokens).ceil().long().tolist()
        assert mask.sum(1).min() >= 1
        rows = torch.arange(1, GLOBAL_BATCH, 4)  # of one of four ranks
        of_rank = {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch(step).items()}
        assert torch.equal(sampler(name).mask(num_tokens, **of_rank), mask[rows])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_each_stratum_of_a_global_batch_is_hit_once(size):
    strata = set()
    for seed, step in ((0, 0), (0, 1), (0, 2), (1, 0)):
        progress = 1 - sampler("linear", seed=seed).ratio(49, **batch(step, size=size))  # linear: gamma(u) = 1 - u
        stratum = (progress * size).floor().clamp(max=size - 1).tolist()
        assert sorted(stratum) == list(range(size))
        strata.add(tuple(stratum))
    assert len(strata) == (1 if size == 1 else 4)  # another order for each step and seed


def test_the_mask_ratio_changes_with_the_epoch_within_its_stratum():
    progress = [1 - sampler("linear").ratio(49, **batch(0, epoch=epoch)) for epoch in (0, 1)]
    assert (progress[0] != progress[1]).all()
    assert torch.equal(*((u * GLOBAL_BATCH).floor().clamp(max=GLOBAL_BATCH - 1) for u in progress))


def test_every_position_is_masked_equally_often():
    mask = torch.cat([sampler("linear").mask(16, **batch(step, epoch=step)) for step in range(100)]).float()
    by_position = mask.mean(0)
    assert (by_position - by_position.mean()).abs().max() < 0.03  # 6400 rows: four standard deviations
    pairs = torch.corrcoef((mask - mask.mean(1, keepdim=True)).T).fill_diagonal_(-1 / 15)
    assert (pairs + 1 / 15).abs().max() < 0.07  # positions are independent


# Positions

GRID = (6, 8)
N = 48
every_rule = pytest.mark.parametrize("spec", mask_positions.names())


def draw(spec, count: Tensor, *, seed: int = 3, index: Tensor | None = None, epoch: int = 0) -> Tensor:
    index = torch.arange(len(count)) if index is None else index
    return mask_positions.build(spec).mask(count, N, grid=GRID, seed=seed, index=index, epoch=epoch)


@every_rule
def test_the_count_is_exact_for_every_count(spec):
    count = torch.arange(N + 1).repeat(4)
    assert torch.equal(draw(spec, count).sum(1), count)


@every_rule
def test_masks_depend_on_sample_seed_and_epoch_only(spec):
    count = torch.full((64,), 20)
    whole = draw(spec, count)
    rows = torch.tensor([5, 40, 3])
    assert torch.equal(draw(spec, count[:3], index=rows), whole[rows])
    for others in (
        draw(spec, count, seed=4),
        draw(spec, count, epoch=1),
        draw(spec, count, index=torch.arange(64, 128)),
    ):
        assert (others != whole).any(1).float().mean() > 0.8


@every_rule
def test_a_larger_mask_holds_the_smaller_and_all_positions_occur(spec):
    small, large = (draw(spec, torch.full((500,), count)) for count in (12, 30))
    assert small.any(0).all()
    assert not small.all(0).any()
    assert (small <= large).all()


def test_halton_masks_are_those_that_the_halton_selector_leaves():
    order = torch.tensor(halton_order(GRID))
    for count in (1, 20, 47):
        for row in draw("halton", torch.full((100,), count)):
            visible = (~row[order]).nonzero()[:, 0]  # ranks of visible positions: consecutive, up to a roll
            assert (visible.diff() != 1).sum() + int(visible[0] != 0 or visible[-1] != N - 1) <= 1
    decoder = DecodingConfig(12, "halton").build_decoder(mask_schedules.build("cosine"))
    steps = decoder.steps(
        lambda tokens, at: torch.zeros(*at.shape, 9), torch.full((1, N), 9), SeededNoise(torch.tensor([0]), N),
        mask_token_id=9, grid=GRID,
    )  # fmt: skip
    step = next(steps)
    count = int(step.still_masked.sum())
    assert (draw("halton", torch.full((2000,), count)) == step.still_masked).all(1).any()


def test_positions_that_are_no_permutation_are_refused(monkeypatch):
    class Broken(MaskPositions):
        def order(self, num_tokens, *, grid, seed, index, epoch):
            return torch.zeros(3, 6).long()

    monkeypatch.setitem(mask_positions._factories, "broken", Broken)
    with pytest.raises(ValueError, match="mask positions 'broken': each row must hold all positions once"):
        mask_positions.build("broken")


# Distributions of the ratio

COSINE = mask_schedules.build("cosine")


def truncated_normal(r: Tensor) -> Tensor:
    cumulative = torch.distributions.Normal(0.55, 0.25).cdf
    below, above = cumulative(torch.tensor([0.5, 1.0], dtype=torch.float64))
    return ((cumulative(r) - below) / (above - below)).clamp(0, 1)


CUMULATIVE = [  # a spec, and the cumulative distribution that it must have
    ("schedule", lambda r: 1 - 2 / math.pi * r.acos()),  # P(cos(pi u / 2) <= r)
    ("uniform", lambda r: r),
    ({"name": "uniform", "low": 0.15, "high": 0.9}, lambda r: ((r - 0.15) / 0.75).clamp(0, 1)),
    ("truncated_normal", truncated_normal),
]


@pytest.mark.parametrize(("spec", "cumulative"), CUMULATIVE, ids=lambda part: "" if callable(part) else str(part))
def test_the_ratios_of_a_batch_have_the_distribution_of_the_formula(spec, cumulative):
    size = 1000
    ratios = MaskSampler(COSINE, 3, mask_ratio=mask_ratios.build(spec)).ratio(49, **batch(size=size)).sort().values
    expected = cumulative(ratios.double())
    # Stratified ratios lie within one stratum of the quantiles: closer than independent draws would.
    observed = (torch.arange(size) + 0.5) / size
    assert (expected - observed).abs().max() < 1.1 / size + 1e-4


@pytest.mark.parametrize("mean", [-1.0, 2.0])
def test_ratios_stay_within_bounds_that_have_no_probability(mean):
    far = mask_ratios.build({"name": "truncated_normal", "mean": mean, "std": 0.01, "low": 0.2, "high": 0.3})
    ratios = far(torch.linspace(0, 1, 5), COSINE, 49)
    assert 0.2 <= ratios.min() <= ratios.max() <= 0.3 + 1e-7


def test_uniform_ratios_end_above_their_beginning():
    with pytest.raises(ValueError, match=r"high must be a number in \(0.7, 1\], got 0.3"):
        mask_ratios.build({"name": "uniform", "low": 0.7, "high": 0.3})


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda u: u * math.nan, r"its values must lie in \[0, 1\]"),
        (lambda u: 2 * u, r"its values must lie in \[0, 1\], got 0 to 2"),
    ],
)
def test_a_distribution_that_breaks_the_contract_is_refused(monkeypatch, function, rule):
    class Broken(MaskRatio):
        def __call__(self, u, mask_schedule, num_tokens):
            return function(u)

    monkeypatch.setitem(mask_ratios._factories, "broken", Broken)
    with pytest.raises(ValueError, match=f"mask ratio 'broken': {rule}"):
        mask_ratios.build("broken")

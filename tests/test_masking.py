"""Rules for the positions of a mask: exact counts, functions of the sample only, and what makes each different.

Distributions of the mask ratio: their shape, their stratification, and what is refused.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, ParallelDecoder, SeededNoise
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.masking import MaskPositions, MaskRatio, MaskSampler, mask_positions, mask_ratios, random_mask
from maskgit_pl.schedules import MaskSchedule, halton_order, mask_schedules

GLOBAL_BATCH = 64


@dataclass(frozen=True)
class _Half(MaskSchedule):
    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return torch.full_like(progress, 0.5)


HALF = _Half()


def batch(step: int = 0, *, epoch: int = 0, size: int = GLOBAL_BATCH, first_index: int = 0) -> dict[str, Tensor | int]:
    slot = torch.arange(size)
    return {
        "index": slot + first_index,
        "epoch": torch.full((size,), epoch),
        "position": step * size + slot,
        "global_batch": size,
    }


def rows(of: dict[str, Tensor | int], chosen: Tensor) -> dict[str, Tensor | int]:
    return {name: value[chosen] if isinstance(value, Tensor) else value for name, value in of.items()}


def sampler(name: str = "cosine", *, seed: int = 3, min_mask_ratio: float = 0.0) -> MaskSampler:
    return MaskSampler(mask_schedules.build(name), seed, min_mask_ratio)


@pytest.mark.parametrize("name", ["cosine", "log", "exp"])
@pytest.mark.parametrize("num_tokens", [2, 49])
def test_at_least_one_token_is_masked_and_the_count_is_the_ratio_rounded_up(name, num_tokens):
    made = sampler(name)
    for step in range(5):
        ratio, mask = (ask(num_tokens, **batch(step)) for ask in (made.ratio, made.mask))
        assert mask.shape == (GLOBAL_BATCH, num_tokens)
        assert mask.dtype == torch.bool
        assert mask.sum(1).tolist() == (ratio.clamp(1e-6, 1) * num_tokens).ceil().long().tolist()
        assert mask.sum(1).min() >= 1


def test_at_least_one_token_is_masked_even_where_the_schedule_says_none():
    @dataclass(frozen=True)
    class Nothing(MaskSchedule):
        def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
            return torch.zeros_like(progress)

    assert MaskSampler(Nothing(), 0).mask(49, **batch()).sum(1).tolist() == [1] * GLOBAL_BATCH


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_progress_of_a_global_batch_hits_each_stratum_once(size):
    for step in range(10):
        progress = 1 - sampler("linear").ratio(49, **batch(step, size=size))  # linear: gamma(u) = 1 - u
        assert (progress * size).floor().clamp(max=size - 1).sort().values.tolist() == list(range(size))


def test_which_stratum_a_slot_has_changes_with_the_step_and_the_seed():
    strata = {
        tuple(((1 - sampler("linear", seed=seed).ratio(49, **batch(step))) * GLOBAL_BATCH).floor().tolist())
        for seed, step in ((0, 0), (0, 1), (1, 0))
    }
    assert len(strata) == 3


def test_the_progress_of_one_slot_is_uniform_over_the_steps():
    size, steps = 8, 4000
    of = {
        "index": torch.arange(steps),
        "epoch": torch.zeros(steps, dtype=torch.int64),
        "position": torch.arange(steps) * size + 3,
        "global_batch": size,
    }
    progress = 1 - sampler("linear").ratio(49, **of)
    share = torch.histc(progress, 20, 0, 1) / steps
    assert (share - 1 / 20).abs().max() < 0.02


def test_masks_do_not_depend_on_how_rows_are_spread_over_ranks():
    whole = sampler().mask(49, **batch(step=5))
    parts = [torch.arange(rank, GLOBAL_BATCH, 4) for rank in range(4)]  # four ranks, any split
    for part in parts:
        assert torch.equal(sampler().mask(49, **rows(batch(step=5), part)), whole[part])
    one_by_one = [sampler().mask(49, **rows(batch(step=5), torch.tensor([row]))) for row in range(GLOBAL_BATCH)]
    assert torch.equal(torch.cat(one_by_one), whole)


def test_the_minimum_is_a_maximum_of_two_without_rescaling():
    free, bounded = (sampler(min_mask_ratio=bound).ratio(49, **batch()) for bound in (0.0, 0.5))
    assert torch.equal(bounded, free.clamp(min=0.5))
    assert (free < 0.5).any()
    assert sampler(min_mask_ratio=0.5).mask(49, **batch()).sum(1).min() == 25
    assert sampler(min_mask_ratio=1.0).mask(49, **batch()).all()


@pytest.mark.parametrize("bound", [-0.1, 1.1, float("nan")])
def test_a_minimum_out_of_range_is_refused(bound):
    with pytest.raises(ValueError, match=r"min_mask_ratio must be a (finite )?number in \[0, 1\]"):
        sampler(min_mask_ratio=bound)


def test_every_position_is_masked_equally_often():
    mask = torch.cat([sampler("linear").mask(16, **batch(step, epoch=step)) for step in range(100)]).float()
    by_position = mask.mean(0)
    assert (by_position - by_position.mean()).abs().max() < 0.03  # 6400 rows: four standard deviations
    pairs = torch.corrcoef((mask - mask.mean(1, keepdim=True)).T).fill_diagonal_(-1 / 15)
    assert (pairs + 1 / 15).abs().max() < 0.07  # no two positions go together


def test_the_same_sample_is_masked_otherwise_in_another_epoch():
    masks = [sampler().mask(49, **batch(step, epoch=epoch)) for step, epoch in ((0, 0), (10, 1))]
    assert (masks[0] != masks[1]).any(1).float().mean() > 0.9


def test_the_mask_ratio_changes_with_the_epoch_within_its_stratum():
    progress = [1 - sampler("linear").ratio(49, **batch(0, epoch=epoch)) for epoch in (0, 1)]
    assert (progress[0] != progress[1]).all()
    assert torch.equal(*((each * GLOBAL_BATCH).floor().clamp(max=GLOBAL_BATCH - 1) for each in progress))


def test_the_positions_change_with_the_epoch_at_equal_counts():
    half = [MaskSampler(HALF, 3).mask(49, **batch(0, epoch=epoch)) for epoch in (0, 1)]
    assert half[0].sum(1).tolist() == half[1].sum(1).tolist() == [25] * GLOBAL_BATCH
    assert (half[0] != half[1]).any(1).all()


def test_other_seeds_and_other_samples_have_other_masks():
    masks = [
        MaskSampler(HALF, seed).mask(49, **batch(0, first_index=first)) for seed, first in ((0, 0), (1, 0), (0, 64))
    ]
    assert (masks[0] != masks[1]).any(1).all()
    assert (masks[0] != masks[2]).any(1).all()


@dataclass(frozen=True)
class Spy(MaskSchedule):
    """Linear, and remembers who asked."""

    asked: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        self.asked.append((progress.numel(), num_tokens))
        return 1 - progress


def test_one_schedule_object_serves_the_sampler_and_the_decoder():
    spy = Spy()
    MaskSampler(spy, 0).mask(16, **batch())
    assert spy.asked == [(GLOBAL_BATCH, 16)]
    decoder = ParallelDecoder(spy, Confidence(), num_steps=4)
    tokens = torch.full((2, 16), 9)
    noise = SeededNoise(torch.arange(2), 16)
    masked = [
        int(step.was_masked.sum(1)[0])
        for step in decoder.steps(lambda tokens, at: torch.zeros(*at.shape, 9), tokens, noise, mask_token_id=9)
    ]
    assert spy.asked == [(GLOBAL_BATCH, 16), (4, 16)]
    assert masked == [16, 12, 8, 4]


GRID = (6, 8)
N = 48
EVERY = [*mask_positions.names(), {"name": "blocks", "min_side": 0.1, "max_side": 1.0}]
every_rule = pytest.mark.parametrize("spec", EVERY, ids=str)


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
def test_every_position_is_masked_at_times_and_a_larger_mask_holds_the_smaller(spec):
    small, large = (draw(spec, torch.full((500,), count)) for count in (12, 30))
    assert small.any(0).all()
    assert not small.all(0).any()
    assert (small <= large).all()


@every_rule
def test_rules_say_where_they_come_from(spec):
    assert "Source:" in (type(mask_positions.build(spec)).__doc__ or "")


def neighbours(mask: Tensor) -> float:
    """The mean share of masked right and lower neighbours of masked positions."""
    grid = mask.view(-1, *GRID).float()
    right, down = grid[:, :, :-1] * grid[:, :, 1:], grid[:, :-1] * grid[:, 1:]
    return float((right.sum() + down.sum()) / (2 * grid.sum()))


def test_blocks_are_connected_and_halton_masks_are_spread():
    count = torch.full((300,), 16)
    blocks, uniform, halton = (neighbours(draw(spec, count)) for spec in ("blocks", "uniform", "halton"))
    assert blocks > 2 * uniform
    # Visible tokens of a Halton mask are spread: they have fewer visible neighbours than by chance.
    visible = neighbours(~draw("halton", N - count))
    assert visible < 0.8 * uniform
    assert halton < blocks


def test_the_first_block_is_a_rectangle_with_sides_in_range():
    for mask in draw({"name": "blocks", "min_side": 1.0}, torch.full((200,), 12)).view(-1, *GRID):
        assert (int(mask.any(1).sum()), int(mask.any(0).sum())) == (3, 4)  # half of 6 rows and of 8 columns
    blocks = mask_positions.build({"name": "blocks", "min_side": 0.6})
    made = blocks.mask(torch.full((400,), 6), N, grid=GRID, seed=0, index=torch.arange(400)).view(-1, *GRID)
    sides = {(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in made}
    assert sides == {(2, 3), (2, 4)}  # 2 or 3 rows and 3 or 4 columns, cut in raster order after 6 tokens


def test_halton_masks_are_what_the_halton_selector_has_left():
    order = torch.tensor(halton_order(GRID))
    for count in (1, 20, 47):
        mask = draw("halton", torch.full((100,), count))
        for row in mask:
            known = (~row[order]).nonzero()[:, 0]  # ranks of visible positions: consecutive, up to a roll
            gaps = known.diff()
            assert ((gaps != 1).sum() + int(known[0] != 0 or known[-1] != N - 1)) <= 1
    decoder = DecodingConfig(12, {"name": "halton", "seed": 5}).build_decoder(mask_schedules.build("cosine"))
    steps = decoder.steps(
        lambda tokens, at: torch.zeros(*at.shape, 9), torch.full((1, N), 9), SeededNoise(torch.tensor([0]), N),
        mask_token_id=9, grid=GRID,
    )  # fmt: skip
    step = next(steps)
    count = int(step.still_masked.sum())
    assert (draw("halton", torch.full((2000,), count)) == step.still_masked).all(1).any()


def test_uniform_is_random_mask_to_the_last_bit():
    count, index = torch.arange(N), torch.arange(N)
    assert torch.equal(draw("uniform", count), random_mask(count, N, seed=3, index=index))


def test_a_broken_rule_is_refused_by_name(monkeypatch):
    class Broken(MaskPositions):
        def order(self, num_tokens, *, grid, seed, index, epoch):
            return torch.zeros(3, 6).long()

    monkeypatch.setitem(mask_positions._factories, "broken", Broken)
    with pytest.raises(ValueError, match="mask positions 'broken': each row must hold all positions once"):
        mask_positions.build("broken")
    with pytest.raises(ValueError, match=r"max_side must be a number in \(0, 1\], got 1.2"):
        mask_positions.build({"name": "blocks", "max_side": 1.2})


COSINE = mask_schedules.build("cosine")
EVERY_RATIO = [
    *mask_ratios.names(),
    {"name": "uniform", "low": 0.15, "high": 0.9},
    {"name": "truncated_normal", "mean": 0.2, "std": 0.1, "low": 0.0, "high": 1.0},
]
every_ratio = pytest.mark.parametrize("spec", EVERY_RATIO, ids=str)


def ratio_batch(size: int, step: int = 0) -> dict[str, Tensor | int]:
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
]


@pytest.mark.parametrize(("spec", "cumulative"), CUMULATIVE, ids=lambda part: "" if callable(part) else str(part))
def test_the_ratios_of_a_batch_have_the_cumulative_distribution_of_the_formula(spec, cumulative):
    size = 1000
    ratios = MaskSampler(COSINE, 3, mask_ratio=mask_ratios.build(spec)).ratio(49, **ratio_batch(size)).sort().values
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
        ratios = MaskSampler(COSINE, 3, mask_ratio=made).ratio(49, **ratio_batch(size, step)).sort().values
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
    u = sampler._draw_progress(*(ratio_batch(size)[name] for name in ("index", "epoch", "position")), size)
    inner = (u > 0.02) & (u < 0.98)  # away from vertical ends
    near = 1e-3
    difference = (made(u + near, COSINE, 49) - made(u - near, COSINE, 49)).abs() / (2 * near)
    torch.testing.assert_close(sampler.slope(49, **ratio_batch(size))[inner], difference[inner], rtol=0.02, atol=2e-3)


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
        ("normal", "unknown mask ratio 'normal': .*known: schedule, truncated_normal, uniform"),
        ({"name": "uniform", "low": 0.7, "high": 0.3}, r"high must be a number in \(0.7, 1\], got 0.3"),
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
    ],
)
def test_a_broken_distribution_is_refused_by_name(monkeypatch, function, rule):
    class Broken(MaskRatio):
        def __call__(self, u, mask_schedule, num_tokens):
            return function(u)

    monkeypatch.setitem(mask_ratios._factories, "broken", Broken)
    with pytest.raises(ValueError, match=f"mask ratio 'broken': {rule}"):
        mask_ratios.build("broken")

"""Rules for the positions of a mask: exact counts, functions of the sample only, and what makes each different."""

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, SeededNoise
from maskgit_pl.masking import MaskPositions, MaskSampler, mask_positions, random_mask
from maskgit_pl.schedules import halton_order, mask_schedules

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


@pytest.mark.parametrize("name", ["blocks", "halton"])
@pytest.mark.parametrize("grid", [None, (4, 8)])
def test_a_rule_that_needs_a_grid_says_so(name, grid):
    sampler = MaskSampler(mask_schedules.build("cosine"), 0, mask_positions=mask_positions.build(name))
    index = torch.arange(4)
    place = {"index": index, "epoch": index, "position": index, "global_batch": 4}
    with pytest.raises(ValueError, match=rf"mask positions {name} require the grid .* of the 48 tokens, got"):
        sampler.mask(N, **place, grid=grid)
    assert sampler.mask(N, **place, grid=GRID).shape == (4, N)


@pytest.mark.parametrize(
    ("order", "rule"),
    [
        (lambda index: torch.zeros(3, 6).long(), "each row must hold all positions once"),
        (lambda index: torch.arange(6).float().expand(3, 6), "int64 tensor"),
        (lambda index: None, "int64 tensor .B, N., got None"),
    ],
)
def test_a_broken_rule_is_refused_by_name(monkeypatch, order, rule):
    class Broken(MaskPositions):
        def order(self, num_tokens, *, grid, seed, index, epoch):
            return order(index)

    monkeypatch.setitem(mask_positions._factories, "broken", Broken)
    with pytest.raises(ValueError, match=f"mask positions 'broken': .*{rule}"):
        mask_positions.build("broken")
    with pytest.raises(ValueError, match=r"max_side must be a number in \(0, 1\], got 1.2"):
        mask_positions.build({"name": "blocks", "max_side": 1.2})

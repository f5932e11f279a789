from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import ParallelDecoder, SeededNoise
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.masking import MaskSampler
from maskgit_pl.schedules import MaskSchedule, mask_schedules

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

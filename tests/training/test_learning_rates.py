"""The learning rate: warm-up, registered schedules, and what is refused."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest

from maskgit_pl.training.optimizers import LearningRate, LearningRateSchedule, learning_rate_schedules


@pytest.mark.parametrize("max_steps", [0, -1])
def test_a_cosine_needs_its_end_and_a_constant_rate_does_not(max_steps):
    assert LearningRate(0.1).factor(0, max_steps) == 1.0
    with pytest.raises(ValueError, match=rf"decay 'cosine'.*max_steps.* got {max_steps}"):
        LearningRate(0.1, decay="cosine").factor(0, max_steps)


def test_the_warm_up_rises_in_equal_steps_to_the_peak_and_never_starts_at_0():
    rate = LearningRate(1e-4, warmup_steps=4)
    assert [rate.factor(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_constant_stays_at_the_peak():
    rate = LearningRate(1e-4)
    assert {rate.factor(step, 100) for step in (0, 50, 99, 100, 500)} == {1.0}


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_falls_from_the_peak_after_the_warm_up_to_its_end_at_max_steps(final):
    rate = LearningRate(1e-4, warmup_steps=10, decay="cosine", final_fraction=final)
    factors = [rate.factor(step, 110) for step in range(10, 131)]
    assert factors[0] == 1.0
    assert factors[50] == pytest.approx((1 + final) / 2)
    assert factors[25] == pytest.approx(final + (1 - final) * 0.8535534)
    assert factors[100] == pytest.approx(final)
    assert factors[120] == pytest.approx(final)  # and stays there
    assert all(early >= late for early, late in pairwise(factors))


def test_a_run_that_ends_within_its_warm_up_is_no_error():
    rate = LearningRate(1e-4, warmup_steps=10, decay="cosine")
    assert [rate.factor(step, 5) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert 0 <= rate.factor(10, 5) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peak": 0.0}, r"^peak must be a number in \(0, inf\), got 0.0"),
        ({"peak": float("inf")}, r"^peak must be a finite number in \(0, inf\), got inf"),
        ({"peak": float("nan")}, "^peak"),
        ({"warmup_steps": -1}, "^warmup_steps must be an integer in .*, got -1"),
        ({"final_fraction": 1.5}, r"^final_fraction must be a number in \[0, 1\], got 1.5"),
        ({"final_fraction": -0.1}, "^final_fraction"),
        ({"decay": "cosin"}, "^unknown learning rate schedule 'cosin': did you mean 'cosine'"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**{"peak": 1e-4, **options})


@pytest.mark.parametrize("name", learning_rate_schedules.names())
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_every_schedule_reaches_the_peak_and_never_rises_again(name, warmup_steps):
    rate = LearningRate(1e-4, warmup_steps=warmup_steps, decay=name, final_fraction=0.1)
    factors = [rate.factor(step, 110) for step in range(max(0, warmup_steps - 1), 131)]
    assert factors[0] == 1.0
    assert all(early >= late >= 0.1 for early, late in pairwise(factors))


def test_linear_falls_by_equal_steps_and_reaches_its_end():
    rate = LearningRate(1e-4, warmup_steps=10, decay="linear", final_fraction=0.2)
    assert [rate.factor(step, 110) for step in (10, 60, 110, 111)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_inverse_sqrt_needs_no_end_and_halves_when_the_steps_are_fourfold():
    rate = LearningRate(1e-4, warmup_steps=100, decay="inverse_sqrt")
    assert [rate.factor(step, -1) for step in (99, 399, 1599)] == [1.0, 0.5, 0.25]
    assert LearningRate(1.0, decay="inverse_sqrt").factor(8, -1) == pytest.approx(1 / math.sqrt(9))


@dataclass(frozen=True)
class Late(LearningRateSchedule):
    """A schedule that is wrong at one step."""

    factor: float = 1.5
    at: int = 55

    def __call__(self, step: int, *, warmup_steps: int, max_steps: int) -> float:
        return self.factor if step == self.at else 1.0


@pytest.mark.parametrize(("factor", "at"), [(1.5, 55), (-0.1, 200), (float("nan"), 100), (0.0, 10)])
def test_a_schedule_out_of_range_is_refused_with_the_step(factor, at, monkeypatch):
    monkeypatch.setitem(learning_rate_schedules._factories, "late", Late)
    with pytest.raises(ValueError, match=f"schedule 'late' must be in .* got {factor} at step {at} of 100"):
        LearningRate(1e-4, decay={"name": "late", "factor": factor, "at": at})

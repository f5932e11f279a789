from dataclasses import replace
from typing import Any

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoding_search import SearchPlan, SearchResult, search
from maskgit_pl.evaluation.search_space import SearchSpace
from maskgit_pl.schedules import mask_schedules
from tests.evaluation.searching import FID, SPACE, FakeMeasure


def run(
    measure: FakeMeasure, space: SearchSpace = SPACE, *, metric: str = FID, current: Any = None, **options: Any
) -> SearchResult:
    return search(measure, space, SearchPlan(metric, 12, 10, **options, current=current))


def test_the_best_trials_and_the_own_decoding_are_measured_again_with_other_noise_and_twice_the_images() -> None:
    measure = FakeMeasure()
    found = run(measure)
    assert len(found.trials) == 12
    assert {call[1:] for call in measure.calls[:12]} == {(10, 0)}
    assert {call[1:] for call in measure.calls[12:]} == {(20, 1_000_000)}
    assert found.before.number == 0
    ranked = sorted(found.trials[1:], key=lambda trial: trial.numbers[FID])
    assert [trial.number for trial in found.confirmed[1:]] == [trial.number for trial in ranked[:3]]
    assert found.winner.number == ranked[0].number


@pytest.mark.slow
def test_the_winner_is_never_worse_than_the_own_decoding_in_the_second_measurement() -> None:
    best = DecodingConfig(4, guidance={"name": "constant", "scale": 0.0})
    for seed in range(5):
        space = SearchSpace(best, SPACE.selectors, (4,), 256, can_guide=True)
        found = run(FakeMeasure(luck=5.0), space, seed=seed)
        assert found.winner.numbers[FID] <= found.before.numbers[FID]
    assert run(FakeMeasure(), SearchSpace(best, SPACE.selectors, (4,), 256, can_guide=True)).winner.numbers[FID] == 1


@pytest.mark.slow
def test_a_schedule_that_is_better_is_found_and_the_best_is_never_worse_than_the_start_with_the_same_noise() -> None:
    class Convex(FakeMeasure):
        """Better, the fewer tokens the first step decides; a model's own schedule decides 3 of 49."""

        def __call__(self, decoding: DecodingConfig, *rest: Any) -> dict[str, float]:
            counts = decoding.build_decoder(mask_schedules.build("square")).plan([49], 49)
            return {**super().__call__(decoding, *rest), FID: 49 - counts[0].after[0]}

    space = replace(SPACE, num_steps=(4,), schedules=("free", "pow", "cubic"), num_tokens=49)
    for seed in range(3):
        found = run(Convex(), space, seed=seed)
        best = min(trial.numbers[FID] for trial in found.trials)
        assert best <= found.trials[0].numbers[FID]
        assert found.winner.numbers[FID] == best < 4
        assert found.winner.decoding.tokens_per_step or found.winner.decoding.mask_schedule


def test_the_current_decoding_is_measured_again_even_if_other_trials_are_better() -> None:
    found = run(FakeMeasure())
    last = max(found.trials, key=lambda trial: trial.numbers[FID])
    again = run(FakeMeasure(), current=last.decoding)
    assert [trial.number for trial in again.confirmed] == [
        0,
        last.number,
        *(each.number for each in found.confirmed[1:]),
    ]
    assert len(run(FakeMeasure(), current=found.winner.decoding).confirmed) == 4


def test_the_direction_of_the_metric_decides_what_is_better() -> None:
    class Agreement(FakeMeasure):
        def __call__(self, decoding: DecodingConfig, *rest: Any) -> dict[str, float]:
            measured = super().__call__(decoding, *rest)
            return {**measured, "class_agreement": measured[FID]}

    found = run(Agreement(), metric="class_agreement")
    assert found.winner.numbers["class_agreement"] == max(trial.numbers["class_agreement"] for trial in found.trials)


def test_a_time_limit_ends_the_trials_but_not_the_second_measurement() -> None:
    found = run(FakeMeasure(), seconds=1e-9)
    assert [trial.number for trial in found.trials] == [0]
    assert found.winner == found.before

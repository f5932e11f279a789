""""""

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoding_search import (
    SearchPlan,
    SearchResult,
    Trial,
    draw_curves,
    find_schedule_trial,
    make_page,
    make_table,
    measure_curves,
    schedule_specs,
    search,
)
from maskgit_pl.evaluation.search_space import SearchSpace
from maskgit_pl.schedules import Pow, mask_schedules
from tests.evaluation.searching import CURVES, FID, OWN, SPACE, FakeMeasure, numbers
from tests.hostile_words import HOSTILE
from tests.test_errors import structure


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


ENTROPY = Trial(1, DecodingConfig(4, "entropy"), numbers(1.0))
PLAIN = Trial(0, OWN, numbers(2.0))


def test_the_training_schedule_is_one_of_the_lines_with_or_without_a_name() -> None:
    own, specs = schedule_specs(mask_schedules.build("cosine"))
    assert own == "cosine"
    assert specs["cosine"] is None
    assert specs["linear"] == "linear"
    assert "pow" not in specs  # it needs an argument
    own, specs = schedule_specs(Pow(2.5))
    assert own == "Pow(exponent=2.5)"
    assert specs[own] is None
    assert specs["cosine"] == "cosine"


def model(schedule: str, grid: tuple[int, int]) -> SimpleNamespace:
    transformer = SimpleNamespace(schedule_for=lambda task: mask_schedules.build(schedule))
    return SimpleNamespace(transformer=transformer, tokenizer=SimpleNamespace(grid=grid))


def test_curves_measure_each_schedule_at_each_number_of_steps() -> None:
    measure, points = FakeMeasure(), []
    result = SearchResult((PLAIN,), (PLAIN,), PLAIN, 20, 0, FID)
    figure = measure_curves(
        measure, model("cosine", (2, 4)), result, num_images=10, seed=0, bars=lambda title, total: points.append
    )
    assert figure.trained == "cosine"
    assert set(figure.curves) == set(schedule_specs(mask_schedules.build("cosine"))[1])
    assert all(list(line) == [2, 3, 4] for line in figure.curves.values())
    assert len(points) == len(measure.calls) == 3 * len(figure.curves)
    assert {(call[0].mask_schedule, call[0].num_steps) for call in measure.calls} >= {(None, 2), ("linear", 4)}


def test_schedules_are_drawn_with_a_decoding_that_follows_them() -> None:
    assert find_schedule_trial(SearchResult((PLAIN, ENTROPY), (PLAIN, ENTROPY), ENTROPY, 20, 0, FID)) == PLAIN
    none_follows = SearchResult((ENTROPY,), (ENTROPY,), ENTROPY, 20, 0, FID)
    assert find_schedule_trial(none_follows) is None
    assert measure_curves(FakeMeasure(), model("cosine", (2, 4)), none_follows, num_images=10, seed=0) is None


@pytest.mark.slow
@pytest.mark.parametrize("metric", [FID, "kid/classifier", "class_agreement"])
def test_the_figure_is_drawn_for_every_metric(metric: str) -> None:
    assert draw_curves(CURVES, metric=metric, floor=0.5).startswith(b"\x89PNG")


REAL = {FID: 0.5, "kid/classifier": 0.001, "class_agreement": 0.9, "num_images": 20}


def test_the_page_names_the_winner_and_the_value_before() -> None:
    own, other = Trial(0, OWN, numbers(2.0)), Trial(7, DecodingConfig(8, "halton"), numbers(1.5))
    result = SearchResult((own, other), (own, other), other, 20, 0, FID)
    page = make_page(result, REAL, command="maskgit tune runs/x", figure=CURVES).markdown
    assert "Trial 7 wins: fid/classifier was 2 and is now 1.5" in page
    assert "2 trials of 10 images were compared by fid/classifier (lower is better)" in page
    assert "have FID (classifier) 0.50 and KID x 1000 (classifier) 1.00." in page.replace("\n", " ")
    assert "| trial | decoding | FID (classifier) | class agreement % |" in page
    assert '"token_selector": "halton"' in page
    assert "| cosine (trained) | 3.000 | **2.000** |" in page
    assert "Best: cosine at T = 4, 2.000" in page
    page = make_page(replace(result, winner=own), REAL, command="maskgit tune runs/x", figure=None).markdown
    assert "Nothing was changed" in page
    assert "json" not in page


def test_the_table_shows_the_second_measurement_also_without_times() -> None:
    own = Trial(0, OWN, {name: value for name, value in numbers(2.0).items() if name != "seconds_per_image"})
    stream = io.StringIO()
    Console(file=stream, width=200).print(make_table(SearchResult((own,), (own,), own, 20, 0, FID)))
    assert "20 images each" in stream.getvalue()
    assert "2.000" in stream.getvalue()


@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_name_of_a_schedule_or_selector_becomes_markup(word: str) -> None:
    def page(name: str) -> list[str]:
        trials = Trial(0, DecodingConfig(8, name), numbers(2.0)), Trial(7, DecodingConfig(8, name), numbers(1.5))
        figure = replace(CURVES, curves={name: CURVES.curves["cosine"], "log": CURVES.curves["log"]}, trained=name)
        result = SearchResult(trials, trials, trials[1], 20, 0, FID)
        text = make_page(result, REAL, command=name, figure=figure).markdown
        assert all(line.isprintable() for line in text.split("\n"))
        return [each for each in structure(text) if each != "code_inline"]

    assert page(word) == page("name")

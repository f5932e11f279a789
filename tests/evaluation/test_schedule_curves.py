from types import SimpleNamespace

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoding_search import (
    SearchResult,
    Trial,
    draw_curves,
    find_schedule_trial,
    measure_curves,
    schedule_specs,
)
from maskgit_pl.schedules import Pow, mask_schedules
from tests.evaluation.searching import CURVES, FID, OWN, FakeMeasure, numbers

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

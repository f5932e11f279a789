from pathlib import Path

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoders.schedule_curves import (
    draw_curves,
    following,
    plot_steps,
    schedule_curves,
    schedule_specs,
)
from maskgit_pl.evaluation.decoders.tuning import Found, Trial
from maskgit_pl.schedules import Pow, mask_schedules
from tests.evaluation.decoders.searching import FID, FIGURE, OWN, FakeMeter, numbers


def test_schedules_are_drawn_at_a_few_numbers_of_steps_up_to_half_the_tokens() -> None:
    assert plot_steps(49) == (2, 3, 4, 6, 8, 12, 16, 24)
    assert plot_steps(16) == (2, 3, 4, 6, 8)
    assert plot_steps(3) == (2,)


def test_the_schedule_of_the_training_is_one_of_the_lines_whether_it_has_a_name_or_not() -> None:
    own, specs = schedule_specs(mask_schedules.build("cosine"))
    assert own == "cosine"
    assert specs["cosine"] is None
    assert specs["linear"] == "linear"
    assert "pow" not in specs  # it needs an argument
    own, specs = schedule_specs(Pow(2.5))
    assert own == "Pow(exponent=2.5)"
    assert specs[own] is None
    assert specs["cosine"] == "cosine"


def test_curves_measure_each_schedule_at_each_number_of_steps() -> None:
    meter, points = FakeMeter(), []
    own, curves = schedule_curves(
        meter, OWN, mask_schedules.build("cosine"), num_tokens=8, num_images=10, seed=0, on_point=points.append
    )
    assert own == "cosine"
    assert set(curves) == set(schedule_specs(mask_schedules.build("cosine"))[1])
    assert all(list(line) == [2, 3, 4] for line in curves.values())
    assert len(points) == len(meter.calls) == 3 * len(curves)
    assert {(call[0].mask_schedule, call[0].num_steps) for call in meter.calls} >= {(None, 2), ("linear", 4)}


def test_schedules_are_drawn_with_a_decoding_that_follows_them() -> None:
    entropy = Trial(1, DecodingConfig(4, "entropy"), numbers(1.0))
    plain = Trial(0, OWN, numbers(2.0))
    found = Found((plain, entropy), (plain, entropy), entropy, 20, 0)
    assert following(found, FID) == plain
    assert following(Found((entropy,), (entropy,), entropy, 20, 0), FID) is None


@pytest.mark.parametrize("key", [FID, "kid/classifier", "class_agreement"])
def test_the_figure_is_drawn_for_every_metric(tmp_path: Path, key: str) -> None:
    draw_curves(FIGURE, tmp_path / "figure.png", key=key, floor=0.5)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]

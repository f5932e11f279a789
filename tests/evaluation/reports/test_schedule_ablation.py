import io
from itertools import pairwise

import pytest
from PIL import Image

from maskgit_pl.evaluation.reports.schedule_ablation import (
    ScheduleResult,
    count_known_tokens,
    draw_figure_8,
    draw_schedules,
)
from maskgit_pl.schedules import mask_schedules


def figure(results: list[ScheduleResult], *, floor: float | None = None, dataset: str = "shoes") -> bytes:
    return draw_figure_8(results, num_tokens=16, metric="fid/classifier", num_images=100, floor=floor, dataset=dataset)


@pytest.mark.parametrize("name", ["cosine", "log", "linear"])
def test_the_number_of_known_tokens_rises_to_all(name: str) -> None:
    known = count_known_tokens(mask_schedules.build(name), num_tokens=256, num_steps=8)
    assert all(before < after for before, after in pairwise(known))
    assert known[-1] == 256


def test_counts_are_those_of_the_released_code() -> None:
    known = count_known_tokens(mask_schedules.build("cosine"), num_tokens=256, num_steps=12)
    assert 256 - known[7] == 127  # cos(pi / 3) is just under a half in float32


@pytest.mark.slow
@pytest.mark.parametrize("floor", [None, 0.1, 1.9])
def test_the_figure_is_drawn_for_any_schedules_and_floor(floor: float | None) -> None:
    results = [
        ScheduleResult(name, name, 4, {2: start, 4: start / 2, 8: start / 1.5}, {}, {}, mask_schedules.build(name))
        for name, start in (("cosine", 4.0), ("log", 30.0), ("arccos", 5.0))
    ]
    with Image.open(io.BytesIO(figure(results, floor=floor))) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1.5 * picture.height


@pytest.mark.slow
def test_names_are_not_read_as_mathematics_and_all_are_drawn() -> None:
    built = mask_schedules.build("cosine")
    names = ["$x^{2$ $", "_hidden", "two\nlines" + 1000 * "x"]
    results = [ScheduleResult(name, name, 4, {2: 2.0, 4: 1.0}, {}, {}, built) for name in names]
    assert figure(results, dataset="$\\frac$")
    assert draw_schedules(dict.fromkeys(names[:2], built), num_tokens=16)

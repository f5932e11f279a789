from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.evaluation.reports.figure8 import Figure8, draw
from maskgit_pl.evaluation.reports.tables import ScheduleResult
from maskgit_pl.schedules import mask_schedules


@pytest.mark.parametrize("floor", [None, 0.1, 1.9])
def test_the_figure_is_drawn_for_any_schedules_and_floor(tmp_path: Path, floor: float | None) -> None:
    results = [
        ScheduleResult(name, name, 4, {2: start, 4: start / 2, 8: start / 1.5}, {}, {}, mask_schedules.build(name))
        for name, start in (("cosine", 4.0), ("log", 30.0), ("arccos", 5.0))
    ]
    draw(Figure8(results, 16, "fid/classifier", 100, floor, "shoes"), tmp_path / "deep" / "figure-8.png")
    with Image.open(tmp_path / "deep" / "figure-8.png") as picture:
        assert picture.width > 1.5 * picture.height


def test_names_are_not_read_as_mathematics_and_none_is_left_out(tmp_path: Path) -> None:
    built = mask_schedules.build("cosine")
    names = ["$x^{2$ $", "_hidden", "two\nlines" + 1000 * "x"]
    results = [ScheduleResult(name, name, 4, {2: 2.0, 4: 1.0}, {}, {}, built) for name in names]
    draw(Figure8(results, 16, "fid/classifier", 100, None, "$\\frac$"), tmp_path / "figure-8.png")

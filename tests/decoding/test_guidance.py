"""Guidance schedules: the scale of each step by hand, and the values that they refuse."""

import math

import pytest

from maskgit_pl.decoding.guidance import GuidanceSchedule, guidance_scales, guidance_schedules


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("constant", (0.0, 0.0, 0.0, 0.0, 0.0)),
        ({"name": "constant", "scale": 1.5}, (1.5, 1.5, 1.5, 1.5, 1.5)),
        ({"name": "linear", "scale": 3.0}, (0.0, 0.75, 1.5, 2.25, 3.0)),
        ({"name": "linear", "scale": 3.0}, (3.0,)),  # a single step counts as the last one
        ({"name": "cosine", "scale": 2.0}, [1 - math.cos(math.pi * step / 4) for step in range(5)]),
        (
            {"name": "cosine", "scale": 2.0, "power": 2.0},
            [1 - math.cos(math.pi * (step / 4) ** 2) for step in range(5)],
        ),
        ({"name": "interval", "scale": 3.0, "start": 0.25, "stop": 0.75}, (0.0, 3.0, 3.0, 3.0, 0.0)),
    ],
    ids=str,
)
def test_the_scales_of_the_steps_follow_the_formula(spec, expected):
    assert guidance_scales(guidance_schedules.build(spec), len(expected)) == pytest.approx(expected)


def test_an_interval_ends_after_its_beginning():
    with pytest.raises(ValueError, match=r"'interval': stop must be a number in \[0.8, 1\], got 0.2"):
        guidance_schedules.build({"name": "interval", "start": 0.8, "stop": 0.2})


@pytest.mark.parametrize("scale", [-1e-6, float("nan"), 10_001.0])
def test_a_schedule_that_is_out_of_range_at_one_point_is_refused(monkeypatch, scale):
    class Broken(GuidanceSchedule):
        def __call__(self, progress: float) -> float:
            return scale if 0.3 < progress < 0.31 else 1.0

    monkeypatch.setitem(guidance_schedules._factories, "broken", Broken)
    with pytest.raises(ValueError, match=r"'broken': the scale at progress 0.30.* must be a .*number in"):
        guidance_schedules.build("broken")

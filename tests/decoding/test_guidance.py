import math

import pytest

from maskgit_pl.decoding.guidance import GuidanceSchedule, guidance_scales, guidance_schedules, step_progress


def test_constant_is_the_same_at_every_step_and_no_guidance_by_default():
    assert guidance_scales(guidance_schedules.build({"name": "constant", "scale": 1.5}), 4) == (1.5,) * 4
    assert guidance_scales(guidance_schedules.build("constant"), 3) == (0.0,) * 3


def test_linear_rises_from_0_at_the_first_step_to_its_scale_at_the_last():
    scales = guidance_scales(guidance_schedules.build({"name": "linear", "scale": 3.0}), 4)
    assert scales == pytest.approx((0.0, 1.0, 2.0, 3.0))


def test_a_single_step_counts_as_the_last():
    assert guidance_scales(guidance_schedules.build({"name": "linear", "scale": 3.0}), 1) == (3.0,)


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", guidance_schedules.names())
def test_a_scale_without_meaning_is_refused(name, scale):
    with pytest.raises(ValueError, match=rf"guidance schedule '{name}': scale must be a .*number in \[0, 10000\]"):
        guidance_schedules.build({"name": name, "scale": scale})


@pytest.mark.parametrize("scale", [-1e-6, float("nan"), float("inf"), 10_001.0])
def test_a_schedule_that_is_broken_in_the_middle_alone_is_refused(monkeypatch, scale):
    class Broken(GuidanceSchedule):
        def __call__(self, progress: float) -> float:
            return scale if 0.3 < progress < 0.31 else 1.0

    monkeypatch.setitem(guidance_schedules._factories, "broken", Broken)
    with pytest.raises(ValueError, match=r"'broken': the scale at progress 0.30.* must be a .*number in"):
        guidance_schedules.build("broken")


def test_power_cosine_rises_the_later_the_larger_its_power():
    scales = guidance_scales(guidance_schedules.build({"name": "power-cosine", "scale": 2.0, "power": 2.0}), 5)
    assert scales == pytest.approx([1 - math.cos(math.pi * (step / 4) ** 2) for step in range(5)])
    assert scales[0] == 0
    assert scales[-1] == 2.0
    cosine = guidance_scales(guidance_schedules.build({"name": "cosine", "scale": 2.0}), 5)
    assert cosine == guidance_scales(guidance_schedules.build({"name": "power-cosine", "scale": 2.0, "power": 1.0}), 5)
    assert all(late <= early for late, early in zip(scales, cosine, strict=True))


def test_interval_guides_within_its_bounds_alone():
    spec = {"name": "interval", "scale": 3.0, "start": 0.25, "stop": 0.75}
    assert guidance_scales(guidance_schedules.build(spec), 5) == (0.0, 3.0, 3.0, 3.0, 0.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "power-cosine", "power": 0.0}, r"'power-cosine': power must be a number in \[0.001, 1000\], got 0.0"),
        ({"name": "interval", "start": 0.8, "stop": 0.2}, r"'interval': stop must be a number in \[0.8, 1\], got 0.2"),
        ({"name": "interval", "stop": 1.5}, r"'interval': stop must be a number in \[0.25, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        guidance_schedules.build(spec)


def test_progress_goes_from_0_at_the_first_step_to_1_at_the_last():
    assert [step_progress(step, 5) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert step_progress(0, 1) == 1.0

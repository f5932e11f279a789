import pytest

from maskgit_pl.guidance import guidance_scales, guidance_schedules


def test_constant_is_the_same_at_every_step_and_no_guidance_by_default():
    assert guidance_scales(guidance_schedules.build({"name": "constant", "scale": 1.5}), 4) == (1.5,) * 4
    assert guidance_scales(guidance_schedules.build("constant"), 3) == (0.0,) * 3


def test_linear_rises_from_0_at_the_first_step_to_its_scale_at_the_last():
    scales = guidance_scales(guidance_schedules.build({"name": "linear", "scale": 3.0}), 4)
    assert scales == pytest.approx((0.0, 1.0, 2.0, 3.0))


def test_a_single_step_counts_as_the_last():
    assert guidance_scales(guidance_schedules.build({"name": "linear", "scale": 3.0}), 1) == (3.0,)


@pytest.mark.parametrize("scale", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["constant", "linear"])
def test_a_scale_without_meaning_is_refused(name, scale):
    with pytest.raises(ValueError, match=rf"guidance schedule '{name}': scales must be finite and >= 0"):
        guidance_schedules.build({"name": name, "scale": scale})

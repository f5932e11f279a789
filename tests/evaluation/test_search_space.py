import json
from dataclasses import asdict, replace

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.search_space import SearchSpace, _spread_tokens, list_schedules
from maskgit_pl.schedules import mask_schedules
from tests.evaluation.searching import OWN, SPACE


@pytest.mark.slow
def test_a_trial_depends_only_on_seed_and_index() -> None:
    first, second = ([SPACE.trial(number, seed=3) for number in range(20)] for _ in range(2))
    assert first == second
    assert SPACE.trial(0, seed=3) == SPACE.trial(0, seed=4) == OWN
    assert [SPACE.trial(number, seed=4) for number in range(1, 20)] != first[1:]
    assert len({json.dumps(asdict(trial), default=str) for trial in first if trial}) == 20


@pytest.mark.slow
def test_every_trial_can_be_decoded_and_all_parts_are_searched() -> None:
    made = [SPACE.trial(number, seed=0) for number in range(1, 200)]
    for decoding in made:
        assert decoding is not None
        decoding.build_decoder(mask_schedules.build("cosine")).plan([49], 49)
        decoding.scales()
        assert decoding.tokens_per_step is None
    selectors = {
        each.token_selector if isinstance(each.token_selector, str) else each.token_selector["name"] for each in made
    }
    assert selectors == {"confidence", "random", "halton", "margin", "entropy", "moment", "remdm", "p2", "edit"}
    assert {each.num_steps for each in made} == {2, 4, 8}
    temperatures = [each.sampling_temperature for each in made]
    assert any(isinstance(value, tuple) for value in temperatures)
    assert 1.0 in temperatures
    assert any(each.top_k for each in made)
    assert any(each.top_p for each in made)
    assert any(not any(each.scales()) for each in made)


WITH_SCHEDULES = replace(SPACE, schedules=list_schedules(), num_tokens=49)


@pytest.mark.slow
def test_half_of_the_trials_have_a_schedule_of_their_own_and_the_rest_is_the_search_without() -> None:
    plain, made = ([space.trial(number, seed=0) for number in range(1, 300)] for space in (SPACE, WITH_SCHEDULES))
    assert [replace(each, mask_schedule=None, tokens_per_step=None) for each in made] == plain
    changed = [each for each, own in zip(made, plain, strict=True) if each != own]
    assert 0.4 < len(changed) / len(made) < 0.55
    specs = [each.mask_schedule for each in changed if each.mask_schedule is not None]
    assert {spec if isinstance(spec, str) else spec["name"] for spec in specs} == {*mask_schedules.build_all(), "pow"}
    assert all(0.5 <= spec["exponent"] <= 4 for spec in specs if isinstance(spec, dict))
    assert len({spec["exponent"] for spec in specs if isinstance(spec, dict)}) > 5
    for each in made:
        each.check(49, is_autoregressive=False)
        each.build_decoder(mask_schedules.build("cosine")).plan([49], 49)


@pytest.mark.slow
def test_free_numbers_of_tokens_are_positive_sum_to_all_and_lie_near_a_power_schedule() -> None:
    space = replace(SPACE, schedules=("free",), num_tokens=49)
    made = [space.trial(number, seed=1) for number in range(1, 200)]
    lists = [each.tokens_per_step for each in made if each.tokens_per_step is not None]
    assert len(lists) > 50
    assert len(set(lists)) > 45
    assert all(sum(tokens) == 49 and min(tokens) >= 1 for tokens in lists)
    assert not any(each.tokens_per_step for each in made if "entropy" in str(each.token_selector))
    # As many steps as tokens leave one for each; equal factors give the schedule itself.
    assert _spread_tokens(5, 3.0, [0.1, 0.9, 0.5, 0.2, 0.7]) == (1, 1, 1, 1, 1)
    assert _spread_tokens(20, 1.0, [0.5] * 4) == (5, 5, 5, 5)
    assert _spread_tokens(49, 2.0, [0.5] * 4) == (4, 9, 15, 21)


def test_a_grid_has_every_named_schedule() -> None:
    space = SearchSpace(OWN, ("halton",), (2,), 256, can_guide=True, schedules=("linear", "pow", "free"), num_tokens=49)
    made = [space.trial(number, seed=0, method="grid") for number in range(1, 200)]
    found = [json.dumps(each.mask_schedule) for each in made if each is not None]
    specs = ("null", '"linear"', '{"name": "pow", "exponent": 1.5}', '{"name": "pow", "exponent": 2.5}')
    assert {name: found.count(name) for name in found} == dict.fromkeys(specs, 4 * 3)


def test_arguments_in_a_mapping_are_fixed_and_a_model_without_null_class_keeps_its_guidance() -> None:
    own = DecodingConfig(4)
    space = SearchSpace(own, ({"name": "remdm", "strategy": "loop", "eta": 0.33},), (4,), 256, can_guide=False)
    for method in ("random", "grid"):
        for number in range(1, 9):
            decoding = space.trial(number, seed=0, method=method)
            assert isinstance(decoding.token_selector, dict)
            assert decoding.token_selector["eta"] == 0.33
            assert "choice_temperature" in decoding.token_selector
            assert decoding.guidance == own.guidance


def test_a_grid_search_visits_each_point_once_and_ends() -> None:
    space = SearchSpace(OWN, ("halton", "margin"), (2, 4), 256, can_guide=True)
    size = 2 * (1 + 3) * 4 * 3
    made = [space.trial(number, seed=0, method="grid") for number in range(1, size + 2)]
    assert made[-1] is None
    assert len({json.dumps(asdict(each)) for each in made[:-1]}) == size
    assert made[:-1] != [space.trial(number, seed=1, method="grid") for number in range(1, size + 1)]


def test_the_trials_of_a_grid_end_with_it() -> None:
    space = replace(SPACE, selectors=("halton",), num_steps=(4,))
    grid = list(space.iter_trials(10**12, seed=0, method="grid"))
    assert grid[0] == OWN
    assert space.trial(len(grid), seed=0, method="grid") is None
    assert grid == [space.trial(number, seed=0, method="grid") for number in range(len(grid))]
    assert len(list(space.iter_trials(7, seed=0))) == 7


def test_a_search_that_wrote_its_winner_is_resumed_with_its_first_trial() -> None:
    assert SPACE.resume([], trials=12, seed=0) == SPACE
    begun = [OWN, DecodingConfig(3)]  # this search, and an older one
    tuned = replace(SPACE, baseline=SPACE.trial(5, seed=0))
    assert tuned.resume(begun, trials=12, seed=0) == SPACE
    assert tuned.resume(begun, trials=5, seed=0) == tuned  # trial 5 is none of these
    foreign = replace(SPACE, baseline=DecodingConfig(3))
    assert foreign.resume([OWN], trials=12, seed=0) == foreign

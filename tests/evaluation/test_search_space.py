import json
from dataclasses import asdict, replace

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.search_space import SearchSpace
from maskgit_pl.schedules import mask_schedules
from tests.evaluation.searching import OWN, SPACE


def test_a_trial_depends_only_on_seed_and_index() -> None:
    first, second = ([SPACE.trial(number, seed=3) for number in range(20)] for _ in range(2))
    assert first == second
    assert SPACE.trial(0, seed=3) == SPACE.trial(0, seed=4) == OWN
    assert [SPACE.trial(number, seed=4) for number in range(1, 20)] != first[1:]
    assert len({json.dumps(asdict(trial), default=str) for trial in first if trial}) == 20


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


def test_a_search_that_wrote_its_winner_is_resumed_with_its_first_trial() -> None:
    assert SPACE.resume([], trials=12, seed=0) == SPACE
    begun = [OWN, DecodingConfig(3)]  # this search, and an older one
    tuned = replace(SPACE, baseline=SPACE.trial(5, seed=0))
    assert tuned.resume(begun, trials=12, seed=0) == SPACE
    assert tuned.resume(begun, trials=5, seed=0) == tuned  # trial 5 is none of these
    foreign = replace(SPACE, baseline=DecodingConfig(3))
    assert foreign.resume([OWN], trials=12, seed=0) == foreign

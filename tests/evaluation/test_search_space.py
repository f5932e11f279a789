from dataclasses import replace

import optuna
import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.search_space import SearchSpace, _share_tokens
from maskgit_pl.registry import describe
from maskgit_pl.schedules import mask_schedules
from tests.evaluation.searching import OWN, SPACE


def draw(space: SearchSpace, count: int) -> list[DecodingConfig]:
    """Returns the decodings of random trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.draw(study.ask()) for _ in range(count)]


def names(specs: list) -> set[str]:
    return {spec if isinstance(spec, str) else spec["name"] for spec in specs}


@pytest.mark.slow
def test_every_trial_can_be_decoded_and_all_parts_are_searched() -> None:
    drawn = draw(SPACE, 200)
    for decoding in drawn:
        decoding.check(49, is_autoregressive=False)
        decoding.build_decoder(mask_schedules.build("cosine")).plan([49], 49)
    assert names([each.token_selector for each in drawn]) == {describe(spec).split()[0] for spec in SPACE.selectors}
    assert names([each.guidance for each in drawn]) >= {"constant", "linear", "cosine", "interval"}
    assert {each.num_steps for each in drawn} == {2, 4, 8}
    assert {type(each.sampling_temperature) for each in drawn} == {float, tuple}
    assert any(each.top_k for each in drawn)
    assert any(each.top_p for each in drawn)
    assert any(not any(each.scales()) for each in drawn)
    schedules = [each.mask_schedule for each in drawn if each.mask_schedule is not None]
    assert names(schedules) == {*mask_schedules.build_all(), "pow"}
    assert len({spec["exponent"] for spec in schedules if isinstance(spec, dict)}) > 5
    assert any(each.mask_schedule is None and each.tokens_per_step is None for each in drawn)


def test_free_numbers_of_tokens_are_positive_and_sum_to_all() -> None:
    drawn = draw(replace(SPACE, schedules=("free",)), 60)
    lists = [each.tokens_per_step for each in drawn if each.tokens_per_step is not None]
    assert len(set(lists)) > 10
    assert all(sum(tokens) == 49 and min(tokens) >= 1 for tokens in lists)
    assert not any(each.tokens_per_step for each in drawn if "entropy" in str(each.token_selector))
    assert _share_tokens(5, [0.1, 0.9, 0.5, 0.2, 0.7]) == (1, 1, 1, 1, 1)
    assert _share_tokens(20, [1, 1, 1, 1]) == (5, 5, 5, 5)


def test_what_is_fixed_is_not_searched() -> None:
    remdm = {"name": "remdm", "strategy": "loop", "eta": 0.33}
    space = replace(SPACE, selectors=(remdm,), schedules=(), can_guide=False)
    for decoding in draw(space, 20):
        assert decoding.token_selector == remdm | {"choice_temperature": decoding.token_selector["choice_temperature"]}
        assert (decoding.guidance, decoding.mask_schedule) == (OWN.guidance, OWN.mask_schedule)


def test_a_codebook_of_two_codes_is_searched() -> None:
    assert {each.top_k for each in draw(replace(SPACE, codebook_size=2), 20)} == {None, 2}


def test_unknown_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        replace(SPACE, schedules=("free", "pow", "cosin"))

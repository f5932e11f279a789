"""Decoding settings: what they build and what they refuse."""

import json
from dataclasses import asdict

import pytest

from maskgit_pl.decoding import (
    CodeSampling,
    DecodingConfig,
    ParallelDecoder,
)
from maskgit_pl.decoding.selectors import Random
from maskgit_pl.schedules import mask_schedules
from tests.decoding.fakes import partly_known, run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_steps": 3, "tokens_per_step": (8, 8)},
            "tokens_per_step must hold a number for each of the 3 steps, got 2 numbers; set num_steps to 2",
        ),
        ({"num_steps": 2, "tokens_per_step": (16, 0)}, "tokens_per_step must be integers >= 1, got"),
        (
            {"num_steps": 2, "tokens_per_step": (8, 9)},
            r"tokens_per_step must sum to 16, the tokens per image, in 2 integers >= 1, got \[8, 9\] with sum 17",
        ),
        (
            {"num_steps": 2, "tokens_per_step": (8, 8), "token_selector": "entropy"},
            "tokens_per_step must not be set for token selector EntropyBounded",
        ),
        ({"top_k": 0}, r"top_k must be an integer in \[1, inf\), got 0"),
        ({"top_p": 0.0}, r"top_p must be a number in \(0, 1\], got 0.0"),
        ({"sampling_temperature": (1.0, -1.0)}, r"sampling_temperature must be a number in \[0, inf\), got -1.0"),
        (
            {"sampling_temperature": [1.0, 2.0, 3.0]},
            "sampling_temperature must be .* two of them for the first and the last step",
        ),
    ],
)
def test_a_configuration_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(partly_known([16]), DecodingConfig(**options).build_decoder(mask_schedules.build("cosine")))


def test_a_config_makes_the_decoder_around_the_schedule_object_it_is_given():
    config = DecodingConfig(
        num_steps=3, token_selector="random", guidance={"name": "linear", "scale": 4.0}, sampling_temperature=0.9
    )
    gamma = mask_schedules.build("square")
    made = config.build_decoder(gamma)
    assert made.mask_schedule is gamma
    assert made == ParallelDecoder(gamma, Random(), num_steps=3, sampling=CodeSampling(0.9))
    assert config.scales() == (0.0, 2.0, 4.0)
    own = DecodingConfig(mask_schedule={"name": "pow", "exponent": 3.0}).build_decoder(gamma)
    assert own.mask_schedule == mask_schedules.build({"name": "pow", "exponent": 3.0})


def test_a_config_comes_back_from_json_equal():
    config = DecodingConfig(3, sampling_temperature=(1.0, 0.5), tokens_per_step=(1, 5, 10), top_k=3)
    assert DecodingConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_a_config_with_an_unknown_selector_or_guidance_is_refused():
    with pytest.raises(ValueError, match="unknown token selector 'confident': did you mean 'confidence'"):
        DecodingConfig(token_selector="confident").build_decoder(mask_schedules.build("cosine"))
    with pytest.raises(ValueError, match="unknown guidance schedule 'line'"):
        DecodingConfig(guidance="line").scales()

"""Decoding settings: the decoders that they build, and the values that they refuse."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from maskgit_pl.decoding import AutoregressiveDecoder, DecodingConfig, ParallelDecoder
from maskgit_pl.decoding.config import AutoregressiveDecoding
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import Random
from maskgit_pl.schedules import mask_schedules
from tests.decoding.fakes import partly_known, run

SQUARE = mask_schedules.build("square")


def test_a_configuration_builds_its_decoder_around_the_given_schedule():
    config = DecodingConfig(
        num_steps=3, token_selector="random", guidance={"name": "linear", "scale": 4.0}, sampling_temperature=0.9
    )
    built = config.build_decoder(SQUARE)
    assert built.mask_schedule is SQUARE
    assert built == ParallelDecoder(SQUARE, Random(), num_steps=3, sampling=CodeSampling(0.9))
    assert config.scales() == (0.0, 2.0, 4.0)
    other = DecodingConfig(mask_schedule={"name": "pow", "exponent": 3.0}).build_decoder(SQUARE)
    assert other.mask_schedule == mask_schedules.build({"name": "pow", "exponent": 3.0})


def test_autoregressive_settings_take_one_step_per_token():
    config = AutoregressiveDecoding({"name": "linear", "scale": 2.0}, (1.0, 0.5), 9).to_config(49)
    assert config.is_autoregressive
    assert config.build_autoregressive_decoder(49) == AutoregressiveDecoder(49, CodeSampling((1.0, 0.5), 9))
    assert len(config.scales()) == 49


def test_a_configuration_is_equal_after_json():
    config = DecodingConfig(3, sampling_temperature=(1.0, 0.5), tokens_per_step=(1, 5, 10), top_k=3)
    assert DecodingConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3, "tokens_per_step": (8, 8)}, "tokens_per_step must sum to 16, .* in 3 integers >= 1, got"),
        ({"num_steps": 2, "tokens_per_step": (16, 0)}, "tokens_per_step must sum to 16, .* in 2 integers >= 1, got"),
        ({"num_steps": 2, "tokens_per_step": (8, 9)}, r"tokens_per_step must sum to 16, .* with sum 17"),
        ({"num_steps": 17}, "num_steps must be <= 16, the tokens per image, got 17"),
        ({"top_k": 0}, r"top_k must be an integer in \[1, inf\), got 0"),
        ({"sampling_temperature": [1.0, 2.0, 3.0]}, "sampling_temperature must be .* two of them for the first and"),
    ],
)
def test_parallel_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(partly_known([16]), DecodingConfig(**options).build_decoder(SQUARE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 8}, "num_steps must be 12 for an autoregressive model, one step per token, got 8"),
        ({"token_selector": "confidence"}, "token_selector must not be set for .* got 'confidence'"),
        ({"mask_schedule": "cosine"}, "mask_schedule must not be set for .* got 'cosine'; leave it out"),
    ],
)
def test_parallel_settings_of_an_autoregressive_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(AutoregressiveDecoding().to_config(12), **options).build_autoregressive_decoder(12)


def test_logits_of_all_positions_are_refused():
    decoder, everywhere = (
        ParallelDecoder(SQUARE, Random(), num_steps=4),
        lambda tokens, _: torch.zeros(*tokens.shape, 7),
    )
    with pytest.raises(ValueError, match=r"shape \(1, 15, 'K'\), .*, got \(1, 16, 7\)"):
        run(partly_known([16]), decoder, everywhere)

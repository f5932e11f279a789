"""The options of measurements, and decodings in measurements."""

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.options import (
    decoding_key,
    round_to_classes,
    with_steps,
)


def test_another_number_of_steps_drops_the_tokens_per_step() -> None:
    assert with_steps(DecodingConfig(2, tokens_per_step=(1, 15)), 3) == DecodingConfig(3)


def test_the_key_of_a_decoding_is_its_fields_without_defaults() -> None:
    assert decoding_key(DecodingConfig()) == decoding_key(DecodingConfig(sampling_temperature=1.0, top_k=None))
    changed = decoding_key(DecodingConfig(4, sampling_temperature=(1.2, 0.8)))
    assert changed["sampling_temperature"] == [1.2, 0.8]
    assert set(changed) == {"num_steps", "token_selector", "guidance", "sampling_temperature"}


def test_all_classes_have_the_same_number_of_images_at_least_two() -> None:
    assert [round_to_classes(count, 3) for count in (6, 7, 14)] == [6, 6, 12]
    with pytest.raises(ValueError, match=r"^num_images must be >= 20 \(2 per class\), got 19"):
        round_to_classes(19, 10)

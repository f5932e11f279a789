"""Options of a call: their names, the settings that replace one another, and classes."""

from dataclasses import replace

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.pipeline.options import SETTINGS, ClassIndex, Request, replace_settings

OWN = DecodingConfig(4, "halton", {"name": "linear", "scale": 1.0}, tokens_per_step=(1, 1, 2, 12))
CLASSES = ClassIndex(("Ankle boot", "T-shirt", "7"), 3)


def test_options_are_separated_from_settings():
    given = {"seed": 5, "batch_size": 2, "num_steps": 3, "guidance_scale": 2.0, "top_k": None}
    request = Request.of(CLASSES, OWN, ["7", 0], given)
    decoding = DecodingConfig(3, "halton", {"name": "linear", "scale": 2.0})
    assert request == Request(labels=[2, 0], seeds=[5, 6], decoding=decoding, batch_size=2)


def test_a_part_of_a_request_keeps_the_seed_of_each_result():
    request = Request.of(CLASSES, OWN, [0, 1, 2], {"seed": 7, "batch_size": 2, "negative_class": "T-shirt"})
    parts = [request.part(rows) for rows in request.batches()]
    assert [part.seeds for part in parts] == [[7, 8], [9]]
    assert [part.negative_label for part in parts] == [1, 1]


def test_an_argument_of_a_plug_in_is_replaced_in_its_specification():
    assert replace_settings(OWN, {}) == replace_settings(OWN, dict.fromkeys(SETTINGS)) == OWN
    config = replace_settings(OWN, {"guidance_scale": 3, "choice_temperature": 0.5})
    assert config.guidance == {"name": "linear", "scale": 3}
    assert config.token_selector == {"name": "halton", "choice_temperature": 0.5}
    assert replace_settings(OWN, {"guidance": "cosine", "guidance_scale": 3}).guidance == {"name": "cosine", "scale": 3}


def test_tokens_per_step_num_steps_and_mask_schedule_replace_one_another():
    listed = replace_settings(OWN, {"tokens_per_step": [4, 4, 8]})
    assert (listed.num_steps, listed.tokens_per_step) == (3, (4, 4, 8))
    assert replace_settings(OWN, {"decoding": listed, "num_steps": 5}).tokens_per_step is None
    scheduled = replace_settings(OWN, {"mask_schedule": "cosine"})
    assert (scheduled.mask_schedule, scheduled.tokens_per_step, scheduled.num_steps) == ("cosine", None, 4)
    with pytest.raises(ValueError, match=r"mask_schedule must be left out with tokens_per_step.*got 'cosine'"):
        replace_settings(OWN, {"mask_schedule": "cosine", "tokens_per_step": [8, 8]})


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match="option 'negative_clas': did you mean 'negative_class'"):
        Request.of(CLASSES, OWN, 0, {"negative_clas": 1})
    with pytest.raises(TypeError, match="option 'temperature': did you mean 'sampling_temperature'"):
        Request.of(CLASSES, OWN, 0, {"temperature": 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"):
        replace_settings(OWN, {"seed": 1})


def test_words_of_the_command_line_are_names_before_numbers():
    assert [CLASSES.parse(word) for word in ("7", "1")] == [2, 1]
    with pytest.raises(ValueError, match=r"class must be an index in \[0, 3\) or a name, got -1"):
        CLASSES.parse("-1")
    with pytest.raises(ValueError, match=r"classes must have a name between commas, got .7,,0."):
        CLASSES.parse_list("7,,0")
    assert CLASSES.parse_list(" T-shirt, 0 ,7", max_shown=2) == [1, 0, 2]
    assert [CLASSES.parse_list("all", max_shown=most) for most in (10, 2, 1)] == [[0, 1, 2], [0, 1], [0]]
    assert replace(CLASSES, names=("x", "all")).parse_list("all") == [1]  # a class of that name

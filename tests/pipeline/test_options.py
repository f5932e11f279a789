""""""

import dataclasses
import inspect
import re

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.pipeline import EditOptions, GenerateOptions
from maskgit_pl.pipeline.bulk import BulkOptions
from maskgit_pl.pipeline.options import SETTINGS, class_ids, parse_class, parse_classes, read_options, replace_settings

OWN = DecodingConfig(4, "halton", {"name": "linear", "scale": 1.0}, tokens_per_step=(1, 1, 2, 12))


def documented_arguments(kind: type) -> set[str]:
    """Returns the names in the ``Args`` section of the docstring of a class."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    return set(re.findall(r"^ {4}(\w+): ", section, re.MULTILINE))


def test_options_and_settings_are_told_apart():
    given = {"seed": 5, "dilation": 2, "num_steps": 3, "guidance_scale": 2.0, "top_k": None}
    options, decoding = read_options(EditOptions, given, OWN)
    assert options == EditOptions(seed=5, dilation=2)
    assert decoding == DecodingConfig(3, "halton", {"name": "linear", "scale": 2.0})


@pytest.mark.parametrize("kind", [GenerateOptions, EditOptions, BulkOptions])
def test_no_option_has_the_name_of_a_setting_and_each_is_documented(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert names & {*SETTINGS, "decoding"} == set()
    documented = {name for each in kind.__mro__ for name in documented_arguments(each)}
    assert names <= documented


def test_every_setting_is_a_field_or_an_argument_of_a_plug_in():
    fields = {field.name for field in dataclasses.fields(DecodingConfig)}
    assert fields == documented_arguments(DecodingConfig)
    assert set(SETTINGS) - fields == {"guidance_scale", "choice_temperature"}


def test_nothing_given_changes_nothing():
    assert replace_settings(OWN, {}) == replace_settings(OWN, dict.fromkeys(SETTINGS)) == OWN


def test_an_argument_of_a_plug_in_is_replaced_in_whatever_spec_there_is():
    made = replace_settings(OWN, {"guidance_scale": 3, "choice_temperature": 0.5})
    assert made.guidance == {"name": "linear", "scale": 3}
    assert made.token_selector == {"name": "halton", "choice_temperature": 0.5}
    assert replace_settings(OWN, {"guidance": "cosine", "guidance_scale": 3}).guidance == {"name": "cosine", "scale": 3}


def test_a_mask_schedule_takes_the_place_of_the_model_s_own_list():
    made = replace_settings(OWN, {"mask_schedule": "cosine"})
    assert (made.mask_schedule, made.tokens_per_step, made.num_steps) == ("cosine", None, 4)
    with pytest.raises(ValueError, match=r"mask_schedule must be left out with tokens_per_step.*got 'cosine'"):
        replace_settings(OWN, {"mask_schedule": "cosine", "tokens_per_step": [8, 8]})


def test_what_is_neither_is_answered_with_the_nearest_name():
    with pytest.raises(TypeError, match="option 'negative_clases': did you mean 'negative_classes'"):
        read_options(GenerateOptions, {"negative_clases": 1}, OWN)
    with pytest.raises(TypeError, match="option 'dilation'"):
        read_options(GenerateOptions, {"dilation": 1}, OWN)
    with pytest.raises(TypeError, match="option 'seed'"):
        replace_settings(OWN, {"seed": 1})


NAMES = ("Ankle boot", "T-shirt", "7")


def test_a_word_is_a_name_if_there_is_one_and_else_a_number():
    assert parse_class("7", NAMES) == "7"
    assert parse_class("1", NAMES) == 1
    assert parse_class("-1", NAMES) == -1  # which is refused later, as a number
    assert parse_classes(" T-shirt, 0 ,,7", NAMES, max_shown=2) == ["T-shirt", 0, "7"]
    assert class_ids(parse_classes("7,1", NAMES, max_shown=2), NAMES, null_label=None) == [2, 1]


@pytest.mark.parametrize(("most", "shown"), [(10, [0, 1, 2]), (2, [0, 1]), (1, [0])])
def test_all_is_as_many_classes_as_are_shown_evenly_spread(most, shown):
    assert parse_classes("all", NAMES, max_shown=most) == shown
    assert parse_classes("all", ("all", "x"), max_shown=most) == ["all"]  # a class of that name


def test_no_class_is_the_null_class_of_models_that_have_it():
    assert class_ids([None, "t-SHIRT"], NAMES, null_label=3) == [3, 1]
    with pytest.raises(ValueError, match="class must not be None: the model was trained without a null class"):
        class_ids([None], NAMES, null_label=None)

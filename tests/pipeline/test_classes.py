import pytest

from maskgit_pl.pipeline.options import class_ids, parse_class, parse_classes

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

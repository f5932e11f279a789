"""Sizes, channels and file names of images: one form of each size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch

from maskgit_pl.checks import (
    as_image_size,
    build_dataclass,
    check_channels,
    check_choice,
    check_image_size,
    check_integer,
    check_keys,
    check_number,
    check_seed,
    height_width,
    image_file_name,
    is_image_file_name,
    pixels_text,
    plain_list,
    plain_number,
    plain_size,
    shorten,
)


@dataclass(frozen=True)
class Sizes:
    depth: int
    rate: float = 0.0
    kind: Literal["a", "b"] = "a"
    spec: str | Mapping[str, Any] = "x"
    grid: tuple[int, int] = (1, 1)
    names: tuple[str, ...] = ()
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_integer("depth", self.depth, "[1, 8]")


@pytest.mark.parametrize("value", [0, 9, 1.0, True, "1", None, pytest.param(10**5000, id="huge")])
def test_an_integer_outside_its_interval_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"^depth must be an integer in \[1, 8\], got .{1,90}$"):
        check_integer("depth", value, "[1, 8]")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1.0, -0.1, "0", False, None, pytest.param(10**400, id="huge")]
)
def test_a_number_outside_its_interval_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"^decay must be a (finite )?number in \[0, 1\), got .{1,90}$"):
        check_number("decay", value, "[0, 1)")


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1 - 2**-53])
def test_ends_of_an_interval_belong_to_it_as_the_notation_says(value: float) -> None:
    assert check_number("decay", value, "[0, 1)") == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.array(3), 3),
        (torch.tensor(3), 3),
        (np.float32(0.5), 0.5),
        (3, 3),
        (0.5, 0.5),
        (2**70, 2**70),
    ],
)
def test_numbers_of_libraries_become_plain(value: object, expected: float) -> None:
    made = plain_number(value)
    assert (type(made), made) == (type(expected), expected)
    assert plain_list(value) is None


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), torch.tensor(0.5), "3", b"3", None, 1j])
def test_what_is_no_number_stays_as_it_is(value: object) -> None:
    assert plain_number(value) is value
    assert plain_list(value) is None


@pytest.mark.parametrize("values", [np.array([1, 2]), torch.tensor([1, 2]), (1, np.int8(2)), iter([1, 2]), range(1, 3)])
def test_all_lists_of_numbers_become_plain_lists(values: object) -> None:
    assert plain_number(values) is values
    made = plain_list(values)
    assert made == [1, 2]
    assert {type(each) for each in made} == {int}


@pytest.mark.parametrize("value", [-1, 2**32, 0.0, True, None, "1"])
def test_a_seed_is_an_integer_of_32_bits(value: object) -> None:
    assert [check_seed("seed", each) for each in (0, 2**32 - 1)] == [0, 2**32 - 1]
    with pytest.raises(ValueError, match=r"^--seed must be an integer in \[0, 2\*\*32\), got"):
        check_seed("--seed", value)


def test_a_choice_is_answered_with_the_list_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of left, right, got 'rigth'; did you mean 'right'\?"):
        check_choice("kind", "rigth", ("left", "right"))


def test_keys_are_named_when_unknown_or_missing() -> None:
    with pytest.raises(ValueError, match=r"f\.json: unknown key 'dept': did you mean 'depth'\? known keys: depth"):
        check_keys("f.json", {"dept"}, known=["depth"])
    with pytest.raises(ValueError, match=r"f\.json: the key 'depth' is missing"):
        check_keys("f.json", {}, known=["depth"], required=["depth"])


@pytest.mark.parametrize(
    "values",
    [
        [],
        {},
        {"depth": "1"},
        {"depth": 9},
        {"depth": True},
        {"depth": 1, "rate": "x"},
        {"depth": 1, "kind": "c"},
        {"depth": 1, "spec": 3},
        {"depth": 1, "spec": {3: 1}},
        {"depth": 1, "grid": [1, 2, 3]},
        {"depth": 1, "grid": 7},
        {"depth": 1, "names": ["a", 1]},
        {"depth": 1, "names": "ab"},
        {"depth": 1, "top_k": 1.5},
        {"depth": 1, "deep": 1},
    ],
)
def test_values_of_the_wrong_type_are_refused_with_file_and_key(values: Any) -> None:
    with pytest.raises(ValueError, match=r"^config.json[:. ]"):
        build_dataclass(Sizes, values, "config.json")


def test_values_of_the_right_type_are_taken() -> None:
    values = {"depth": 2, "rate": 1, "kind": "b", "spec": {"name": "x"}, "grid": [7, 7], "names": ["a"], "top_k": None}
    taken = build_dataclass(Sizes, values, "config.json")
    assert taken == Sizes(2, 1.0, "b", {"name": "x"}, (7, 7), ("a",), None)
    assert isinstance(taken.rate, float)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [1] * 10**6, {i: i for i in range(1000)}, pytest.param(10**5000, id="huge"), b"\0" * 1000],
    ids=["str", "list", "dict", "int", "bytes"],
)
def test_no_value_fills_a_message(value: object) -> None:
    assert len(shorten(value)) < 120


def test_control_and_bidi_characters_are_escaped() -> None:
    assert shorten("\x1b[31m\u202e") == "'\\x1b[31m\\u202e'"


@pytest.mark.parametrize(("given", "size"), [(8, 8), ([8, 8], 8), ((8, 8), 8), ([8, 16], (8, 16)), ((16, 8), (16, 8))])
def test_a_size_has_one_form_which_files_keep(given, size):
    assert check_image_size("size", given, "[1, 64]") == as_image_size(given) == size
    assert as_image_size(plain_size(size)) == size
    assert height_width(given) == height_width(size)


@pytest.mark.parametrize("given", [0, True, 65, [8], [8, 8, 8], [8, 0], [8.0, 8], [True, 8], "8", None, {}, [[8], 8]])
def test_anything_else_is_no_size(given):
    with pytest.raises(ValueError, match=r"^size must be an integer in \[1, 64\]"):
        check_image_size("size", given, "[1, 64]")


def test_messages_show_the_width_first():
    assert (pixels_text(8), pixels_text((24, 40))) == ("8 x 8", "40 x 24")


def test_names_of_generated_images_are_known_again():
    names = [image_file_name(label, seed) for label, seed in ((None, 0), (3, 7), (12345, 2**32 - 1))]
    assert names[:2] == ["no-class-seed-000000.png", "class-0003-seed-000007.png"]
    assert all(map(is_image_file_name, names))
    for name in ("class-3-seed-000007.png", "class-0003-seed-000007.jpg", "x-class-0003-seed-000007.png", "photo.png"):
        assert not is_image_file_name(name)


@pytest.mark.parametrize("channels", [0, 2, 4, True, 3.0, "3", None])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match=r"channels must be one of 1 \(grey\), 3 \(RGB\), got"):
        check_channels("channels", channels)


@dataclass(frozen=True)
class Inner:
    depth: int
    kind: Literal["a", "b"] = "a"


ACCEPTED = [
    (int, 3), (float, 3), (float, 0.5), (bool, True), (str, "x"), (int | None, None), (Any, {"x": [1]}),
    (Literal["a", 1], 1), (tuple[int, int], [7, 7]), (tuple[int, int], (7, 7)), (tuple[int, ...], []),
    (list[str], ["a"]), (Sequence[float], [1, 2.5]), (str | dict[str, Any], {"name": "pow", "exponent": 3}),
    (Mapping[str, Any], {}), (Inner | None, {"depth": 1}), (float | tuple[float, float], [1, 0.5]),
]  # fmt: skip
REFUSED = [
    (int, True), (int, 1.0), (int, "1"), (float, True), (float, "1"), (bool, 1), (str, 1), (int | None, "null"),
    (Literal["a", 1], "b"), (tuple[int, int], [1]), (tuple[int, int], 7), (list[str], "ab"),
    (tuple[int, ...], ["a"]), (str | dict[str, Any], 3), (Mapping[str, Any], {3: 1}), (Inner, "inner.yaml"),
    (Inner | None, [1]),
]  # fmt: skip


def built(annotation: Any, value: object) -> Any:
    return build_dataclass(make_dataclass("One", [("value", annotation)], frozen=True), {"value": value}, "a.json")


@pytest.mark.parametrize(("annotation", "value"), ACCEPTED)
def test_a_value_of_the_annotated_type_is_taken(annotation: Any, value: object) -> None:
    built(annotation, value)


@pytest.mark.parametrize(("annotation", "value"), REFUSED)
def test_a_value_of_another_type_is_refused(annotation: Any, value: object) -> None:
    with pytest.raises(ValueError, match=r"^a\.json[.:].*value"):
        built(annotation, value)


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (int | None, "x", "value must be an integer, got 'x'"),
        (int | str, 0.5, "value must be an integer or a string, got 0.5"),
        (Literal["one", "two"], "tow", "value must be 'one' or 'two', got 'tow'; did you mean 'two'?"),
        (list[str | dict[str, Any]], [3], "value must be a list with a string or a mapping as each item, got [3]"),
        (tuple[float, float], [1], "value must be a list of the right length, got [1]"),
        (Inner, {"depth": "x"}, "value.depth must be an integer, got 'x'"),
        (Inner, {}, "value.depth must be given"),
        (Inner | str, {"kind": "a"}, "value must be a mapping with the key 'depth' or a string, got {'kind': 'a'}"),
    ],
)
def test_what_is_accepted_is_said_in_words(annotation: Any, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'a.json.{text}')}$"):
        built(annotation, value)


def test_an_annotation_that_files_cannot_hold_is_left_to_the_dataclass() -> None:
    assert built(torch.Tensor, 3).value == 3


@dataclass(frozen=True)
class OfAPlugIn:
    count: int = 0
    late: NotThere | None = None  # type: ignore[name-defined]  # noqa: F821  # imported for type checkers only


class Pair(NamedTuple):
    first: int
    second: int


@dataclass(frozen=True)
class WithDevice:
    width: int
    device: torch.device | None = None
    pair: Pair = Pair(1, 2)  # noqa: RUF009  # a default that is a tuple of a class

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device or "cpu"))


def test_the_types_of_a_plug_in_are_its_own_and_its_other_fields_are_checked() -> None:
    assert build_dataclass(OfAPlugIn, {"count": 1}, "a.json") == OfAPlugIn(1)
    made = build_dataclass(WithDevice, {"width": 1, "device": "cpu"}, "a.json")
    assert (made.device, made.pair) == (torch.device("cpu"), Pair(1, 2))
    with pytest.raises(ValueError, match=r"^a\.json\.width must be an integer, got 'x'$"):
        build_dataclass(WithDevice, {"width": "x"}, "a.json")

"""Checks of single values, and of the plain values of files against a dataclass."""

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
    plain_list,
    plain_number,
    plain_size,
)
from maskgit_pl.text import shorten

REFUSALS = [
    *((check_integer, ("depth", value, "[1, 8]"), r"^depth must be an integer in \[1, 8\], got .{1,90}$")
      for value in (0, 9, 1.0, True, "1", None, 10**5000)),
    *((check_number, ("decay", value, "[0, 1)"), r"^decay must be a number in \[0, 1\), got .{1,90}$")
      for value in (math.nan, math.inf, -math.inf, 1.0, -0.1, "0", False, None, 10**400)),
    *((check_seed, ("--seed", value), r"^--seed must be an integer in \[0, 2\*\*32\), got")
      for value in (-1, 2**32, 0.0, True)),
    *((check_image_size, ("size", value, "[1, 64]"), r"^size must be an integer in \[1, 64\]")
      for value in (0, True, 65, [8], [8, 8, 8], [8, 0], [8.0, 8], [True, 8], "8", None, {}, [[8], 8])),
    *((check_channels, ("channels", value), r"channels must be one of 1 \(grey\), 3 \(RGB\), got")
      for value in (0, 2, 4, True, 3.0, "3", None)),
    (check_choice, ("kind", "rigth", ("left", "right")),
     r"kind must be one of left, right, got 'rigth'; did you mean 'right'\?"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "arguments", "text"), REFUSALS)
def test_refusals(check: Any, arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(*arguments)


def test_the_ends_of_an_interval_follow_its_notation() -> None:
    assert [check_number("decay", value, "[0, 1)") for value in (0, 0.5, 1 - 2**-53)] == [0, 0.5, 1 - 2**-53]
    assert [check_seed("seed", value) for value in (0, 2**32 - 1)] == [0, 2**32 - 1]


def test_keys_are_named_when_unknown_or_missing() -> None:
    with pytest.raises(ValueError, match=r"f\.json: unknown key 'dept': did you mean 'depth'\? known keys: depth"):
        check_keys("f.json", {"dept"}, known=["depth"])
    with pytest.raises(ValueError, match=r"f\.json: the key 'depth' is missing"):
        check_keys("f.json", {}, known=["depth"], required=["depth"])


def test_numbers_of_libraries_become_plain_and_other_values_stay() -> None:
    numbers = (np.int64(3), np.array(3), torch.tensor(3), np.float32(0.5), np.array(0.5), torch.tensor(0.5))
    for value, expected in zip(numbers, (3, 3, 3, 0.5, 0.5, 0.5), strict=True):
        number = plain_number(value)
        assert (type(number), number) == (type(expected), expected)
    for value in (True, np.bool_(True), torch.tensor(True), torch.ones(1), "3", b"3", None, 1j, range(2)):
        assert plain_number(value) is value


def test_every_list_of_numbers_becomes_a_plain_list() -> None:
    for values in (np.array([1, 2]), torch.tensor([1, 2]), (1, np.int8(2)), iter([1, 2]), range(1, 3)):
        numbers = plain_list(values)
        assert numbers == [1, 2]
        assert {type(number) for number in numbers} == {int}
    assert [plain_list(value) for value in (np.array(3), 3, "3", b"3", None)] == [None] * 5


def test_no_value_fills_a_message_or_controls_the_terminal() -> None:
    for value in ("x" * 10**6, [1] * 10**6, {i: i for i in range(1000)}, 10**5000, b"\0" * 1000):
        assert len(shorten(value)) < 120
    assert shorten("\x1b[31m\u202e") == "'\\x1b[31m\\u202e'"


@pytest.mark.parametrize(("given", "size"), [(8, 8), ([8, 8], 8), ((8, 8), 8), ([8, 16], (8, 16)), ((16, 8), (16, 8))])
def test_a_size_has_one_form_which_files_keep(given, size):
    assert check_image_size("size", given, "[1, 64]") == as_image_size(given) == size
    assert as_image_size(plain_size(size)) == size
    assert height_width(given) == height_width(size)


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


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (int | None, "x", "value must be an integer, got 'x'"),
        (Literal["one", "two"], "tow", "value must be 'one' or 'two', got 'tow'; did you mean 'two'?"),
        (tuple[float, float], [1], "value must be a list of the right length, got [1]"),
        (Inner, {"depth": "x"}, "value.depth must be an integer, got 'x'"),
        (Inner, {}, "value.depth must be given"),
    ],
)
def test_messages_describe_the_accepted_types_in_words(annotation: Any, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'a.json.{text}')}$"):
        built(annotation, value)


def test_values_of_the_annotated_type_are_taken() -> None:
    for annotation, value in ACCEPTED:
        built(annotation, value)
    assert isinstance(built(float, 1).value, float)
    assert built(torch.Tensor, 3).value == 3  # files cannot hold it: the dataclass converts it


@pytest.mark.parametrize(("annotation", "value"), REFUSED)
def test_a_value_of_another_type_is_refused(annotation: Any, value: object) -> None:
    with pytest.raises(ValueError, match=r"^a\.json[.:].*value"):
        built(annotation, value)


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


def test_fields_of_a_plug_in_are_checked_but_for_types_of_its_own() -> None:
    assert build_dataclass(OfAPlugIn, {"count": 1}, "a.json") == OfAPlugIn(1)
    made = build_dataclass(WithDevice, {"width": 1, "device": "cpu"}, "a.json")
    assert (made.device, made.pair) == (torch.device("cpu"), Pair(1, 2))
    with pytest.raises(ValueError, match=r"^a\.json\.width must be an integer, got 'x'$"):
        build_dataclass(WithDevice, {"width": "x"}, "a.json")

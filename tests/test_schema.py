from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from maskgit_pl.checks import describe, fits, schema_of


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
    (Literal["a", 1], True), (Literal["a", 1], "b"), (tuple[int, int], [1]), (tuple[int, int], 7), (list[str], "ab"),
    (tuple[int, ...], ["a"]), (str | dict[str, Any], 3), (Mapping[str, Any], {3: 1}), (Inner, "inner.yaml"),
    (Inner | None, [1]),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "value"), ACCEPTED)
def test_a_value_of_the_annotated_type_fits(annotation: Any, value: object) -> None:
    assert fits(value, schema_of(annotation))


@pytest.mark.parametrize(("annotation", "value"), REFUSED)
def test_a_value_of_another_type_does_not_fit(annotation: Any, value: object) -> None:
    assert not fits(value, schema_of(annotation))


def test_a_dataclass_is_an_object_that_admits_its_fields_only() -> None:
    assert schema_of(Inner) == {
        "type": "object",
        "properties": {"depth": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "additionalProperties": False,
    }


def test_a_type_that_files_cannot_hold_has_no_schema() -> None:
    with pytest.raises(TypeError, match="has no JSON Schema"):
        schema_of(bytes)


def test_what_is_accepted_is_said_in_words() -> None:
    assert describe(schema_of(int | None)) == "an integer or null"
    assert describe(schema_of(Literal["a", "b"])) == "'a' or 'b'"
    assert describe(schema_of(tuple[float, float])) == "a list of a number and a number"

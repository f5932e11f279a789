"""Layers and their merge, and the text of flags."""

import pytest

from maskgit_pl.runs.layers import (
    merge,
    parse_spec,
    parse_specs,
    value_at,
    without_keys,
)


def test_later_trees_override_keys_and_replace_named_objects():
    trees = [
        {"a": {"x": 1, "y": 2}, "spec": {"name": "pow", "exponent": 3}, "word": "cosine", "null": None},
        {"a": {"x": 5}, "spec": {"name": "log"}, "word": {"rate": 2}, "null": {"z": 1}},
        {"spec": {"base": 2}},
    ]
    assert merge(trees) == {
        "a": {"x": 5, "y": 2},
        "spec": {"name": "log", "base": 2},
        "word": {"name": "cosine", "rate": 2},
        "null": {"z": 1},
    }
    assert trees[0]["spec"] == {"name": "pow", "exponent": 3}


def test_a_dotted_key_is_read_and_removed():
    tree = {"a": {"b": {"c": 1, "d": None}}, "word": "x"}
    assert [value_at(tree, key) for key in ("a.b.c", "a.b.d", "a.x.c", "word.x")] == [1, None, None, None]
    assert without_keys(tree, ("a.b.c", "a.b.d", "a.x.c", "word.x", "gone")) == {"a": {"b": {}}, "word": "x"}
    assert without_keys(tree, ("word", "a.b")) == {"a": {}}
    assert tree == {"a": {"b": {"c": 1, "d": None}}, "word": "x"}


REMDM = {"name": "remdm", "eta": 0.4}


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_specs, "halton, {name: remdm, eta: 0.4}", ["halton", REMDM]),
        (parse_specs, '{"name": "remdm", "eta": 0.4},halton,', [REMDM, "halton"]),
        (parse_spec, "linear", "linear"),
        (parse_spec, "1e-3", "1e-3"),  # a name is no YAML
        (parse_spec, "true", "true"),
        (parse_spec, '{"name": "remdm", "eta": 4e-1}', REMDM),
        (parse_spec, "{name: remdm, eta: 0.4}", REMDM),
        (parse_specs, "classifier,inception=a.pt", ["classifier", "inception=a.pt"]),
    ],
)
def test_flags_are_parsed(parse, text, value) -> None:
    assert parse("--x", text) == value

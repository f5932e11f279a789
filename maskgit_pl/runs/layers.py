"""The values of recipes and flags before they are checked: layers of plain values, their merge, and the text of flags.

A flag overrides one value of a recipe by its dotted key: ``--KEY=VALUE``. Other flags of commands hold
numbers, names or mappings: their parsers take the name of the flag, for errors, and its text, and raise a
``ValueError`` for a text of another form. Imports no torch at its top.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from maskgit_pl.files import check_plain, parse_yaml
from maskgit_pl.text import shorten

Kind = Literal["tokenizer", "transformer", "autoregressive", "distillation"]
"""The kinds of modules that a recipe trains."""

DERIVED_KEYS = {
    "model.seed": "data.seed",
    "model.image_size": "data.image_size",
    "model.network.in_channels": "data.in_channels",
    "model.global_batch": "data.global_batch",
    "model.accumulation": "data.global_batch and data.max_batch_per_device",
}
"""Keys of modules that no recipe can set, each with the key that determines it."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Overrides of single recipe values: flags, or a mapping of dotted keys."""


@dataclass(frozen=True)
class Layer:
    """The values of one file or flag.

    Args:
        origin: Name of the file or flag, for messages.
        tree: Nested mappings of plain values.
    """

    origin: str
    tree: Mapping[str, Any]


def merge(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges trees recursively; later values override earlier ones.

    A mapping with the key ``name`` specifies a registered object and replaces the earlier value. A mapping
    without ``name`` adds arguments to the object that an earlier tree names.

    A mapping with the key ``backbone`` (``model.network``) that names another backbone than the earlier trees drops the
    keys of the old one, except those that all backbones have, the fields of ``BackboneConfig``. The keys of the new one
    start from its defaults.
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            result[key] = _override(result.get(key), value)
    return result


def _override(old: Any, new: Any) -> Any:
    if not isinstance(new, Mapping):
        return new
    if "name" in new:
        return dict(new)
    # The earlier tree names the object without arguments.
    if isinstance(old, str):
        return {"name": old, **new}
    kept = old if isinstance(old, Mapping) else {}
    if "backbone" in new:
        from maskgit_pl.networks.backbone import DEFAULT_BACKBONE, BackboneConfig  # torch takes seconds to import

        if new["backbone"] != kept.get("backbone", DEFAULT_BACKBONE):
            of_all = {field.name for field in fields(BackboneConfig)}
            kept = {key: value for key, value in kept.items() if key in of_all}
    return merge([kept, new])


def value_at(tree: Any, key: str) -> Any:
    """Returns the value of a dotted key such as ``data.source``, or None if the tree does not have it."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def without_keys(tree: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of a tree without dotted keys, which it need not have."""
    copy = merge([tree])
    for key in keys:
        group, _, leaf = key.rpartition(".")
        node = value_at(copy, group) if group else copy
        if isinstance(node, dict):
            node.pop(leaf, None)
    return copy


def flag_words(overrides: Overrides) -> tuple[str, ...]:
    """Returns overrides as flags. Python values become JSON, which is also YAML."""
    if isinstance(overrides, Mapping):
        return tuple(f"--{key}={json.dumps(value, default=str)}" for key, value in overrides.items())
    return tuple(overrides)


def split_flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the text of each flag.

    Raises:
        ValueError: if a word is not a flag, or a flag has no value.
    """
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if not re.fullmatch(r"--[A-Za-z_][\w.]*(=.*)?", word, re.DOTALL):
            raise ValueError(f"unrecognized argument {shorten(word)}; recipe values are set with --KEY=VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not waiting or waiting[-1].startswith("--"):
                raise ValueError(f"flag --{key} must have a value")
            text = waiting.pop()
        yield key, text


def flag_layer(key: str, text: str) -> Layer:
    """Returns the layer of one flag, whose text is YAML.

    Raises:
        ValueError: if the text is not YAML.
    """
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"flag --{key}: {error}") from error
    # a.b.c = value becomes {a: {b: {c: value}}}.
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_plain(tree)
    return Layer(f"flag --{key}", tree)


def split_values(text: str) -> list[str]:
    """Splits a text at the commas that are not inside a mapping or a list. Empty parts are dropped."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def parse_spec(flag: str, text: str) -> str | dict[str, Any]:
    """Parses a plug-in: a mapping in YAML with its name and arguments; any other text is its name, as it is."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        spec: dict[str, Any] = parse_yaml(text)
    except ValueError as error:
        rule = "must be a name or a mapping such as '{name: remdm, eta: 0.4}'"
        raise ValueError(f"{flag} {rule}, got {shorten(text)} ({error})") from error
    return spec


def parse_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses names and mappings separated by commas, such as ``confidence, {name: remdm, eta: 0.4}``."""
    return [parse_spec(flag, word) for word in split_values(text) or [text]]

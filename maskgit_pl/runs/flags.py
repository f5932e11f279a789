"""Flags that override single values of a recipe: ``--KEY=VALUE`` with dotted keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maskgit_pl.checks import shorten
from maskgit_pl.runs.layers import Layer
from maskgit_pl.runs.recipe_checks import schema_at
from maskgit_pl.safe_yaml import check_plain, parse_yaml
from maskgit_pl.schema import Schema, fits

__all__ = ["Overrides", "flag_layer", "flag_words", "split_flags"]

Overrides = Sequence[str] | Mapping[str, Any]
"""Overrides of single recipe values: flags, or a mapping of dotted keys."""


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


def flag_layer(key: str, text: str, schema: Schema) -> Layer:
    """Returns the layer of one flag.

    The text is parsed as YAML if the result fits the type of the key. Otherwise it is the value itself, so that a path
    may be named ``[a``.

    Raises:
        ValueError: if the text is not a safe value.
    """
    own = schema_at(schema, key.split("."))  # None for an unknown key, which check_layer reports
    try:
        value = parse_yaml(text)
        check_plain(value, key)
    except ValueError:
        if own is None or not fits(text, own):
            raise
        value = text
    # For example a name such as `on`, which YAML reads as a bool.
    if own is not None and not fits(value, own) and fits(text, own):
        value = text
    # a.b.c = value becomes {a: {b: {c: value}}}.
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_plain(tree)
    return Layer(f"flag --{key}", tree)

"""Texts of flags as numbers, names and mappings."""

from __future__ import annotations

import json
from typing import Any

from maskgit_pl.checks import shorten

__all__ = ["parse_features", "parse_json_spec", "parse_list", "parse_numbers", "parse_spec", "parse_specs"]


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parses whole numbers, such as numbers of steps: ``4,8,16``, ``4-16``, or both; each once, in the order given.

    Args:
        flag: Name of the flag, for the error.
        text: What was written.

    Raises:
        ValueError: if there is none, or something else, a number below 1, or a range that falls.
    """
    found: list[int] = []
    for word in filter(None, map(str.strip, text.split(","))):
        first, dash, last = word.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise ValueError(f"{flag} {text}: numbers such as 4,8,16 or a range such as 4-16 are needed, got {word!r}")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high:
            raise ValueError(f"{flag} {text}: numbers of at least 1 that rise are needed, got {word!r}")
        found += range(low, high + 1)
    if not found:
        raise ValueError(f"{flag} {text!r}: at least one number is needed, such as 8")
    return tuple(dict.fromkeys(found))


def parse_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses names and mappings, separated by commas: ``confidence, {name: remdm, eta: 0.4}``.

    Args:
        flag: Name of the flag, for the error.
        text: What was written.

    Raises:
        ValueError: if there is none, or one is neither.
    """
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    specs = [parse_spec(flag, word.strip()) for word in words if word.strip()]
    if not specs:
        raise ValueError(f"{flag} {text!r}: at least one name is needed")
    for spec in specs:
        if not isinstance(spec, str | dict):
            raise ValueError(f"{flag} {text}: names or mappings are needed, got {spec!r}")
    return specs


def parse_spec(flag: str, text: str) -> Any:
    """Parses one name, number or mapping; ``{"name": "remdm"}`` and ``{name: remdm}`` are the same.

    Args:
        flag: Name of the flag, for the error.
        text: What was written, in YAML.

    Raises:
        ValueError: if it is a mapping that cannot be read.
    """
    import yaml

    try:
        spec = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{flag} {shorten(text)}: a name or a mapping such as '{{name: remdm, eta: 0.4}}' is needed ({why})"
        ) from error
    if not isinstance(spec, str | dict | int | float) or isinstance(spec, bool):
        raise ValueError(
            f"{flag} {text}: a name or a mapping such as '{{name: remdm, eta: 0.4}}' is needed, got {spec!r}"
        )
    return spec


def parse_features(text: str) -> list[str | dict[str, Any]]:
    """Parses the feature networks of ``--features``; a name, ``NAME=PATH``, ``timm:MODEL=FILE`` or a mapping each.

    Raises:
        ValueError: if there is none, one comes twice, or one is neither.
    """
    specs = parse_specs("--features", text)
    names = [str(spec if isinstance(spec, str) else spec.get("name")).partition("=")[0] for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--features {text}: each network once is enough, got {', '.join(twice)} twice")
    return specs


def parse_json_spec(flag: str, text: str) -> str | dict[str, Any]:
    """Parses the name, or the mapping in JSON, of a plug-in.

    Raises:
        ValueError: if it looks like JSON and is no mapping with a name.
    """
    if not text.lstrip().startswith(("{", "[", '"')):
        return text
    example = 'write a name, or a mapping such as \'{"name": "...", "argument": 0.1}\''
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} {text}: not JSON ({error}); {example}") from error
    if not isinstance(mapping, dict) or not isinstance(mapping.get("name"), str):
        raise ValueError(f"{flag} {text}: a mapping with a name is needed; {example}")
    return mapping


def parse_list(flag: str, text: str, kind: type[int] | type[float]) -> tuple[float, ...]:
    """Parses numbers with commas between them.

    Raises:
        ValueError: if a word is no number of this kind.
    """
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{flag} must be {what} with commas between them, got {text}") from error

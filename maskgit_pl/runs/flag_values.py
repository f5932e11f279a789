"""Parses the text of flags: numbers, names and mappings. A parser takes the name of the flag, for errors, and its text.

Every parser raises a ``ValueError`` for a text of another form. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Any

from maskgit_pl.checks import ImageSize, as_image_size, shorten
from maskgit_pl.files import parse_yaml

__all__ = [
    "parse_features",
    "parse_image_size",
    "parse_integers",
    "parse_named_spec",
    "parse_numbers",
    "parse_spec",
    "parse_specs",
    "split_values",
]

_MAX_NUMBER = 100_000  # more than the tokens of any image; a range is a list of its numbers


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


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parses numbers in [1, 100000] and ranges, such as ``4,8,16`` or ``4-16``; each number counts once."""
    numbers: dict[int, None] = {}
    for word in split_values(text) or [text]:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word)
        first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
        if not 1 <= first <= last <= _MAX_NUMBER:
            raise ValueError(
                f"{flag} must be numbers such as 4,8,16 or a range such as 4-16, got {shorten(word)}; the smallest is "
                f"1, the largest {_MAX_NUMBER}"
            )
        numbers.update(dict.fromkeys(range(first, last + 1)))
    return tuple(numbers)


def parse_integers(flag: str, text: str) -> tuple[int, ...]:
    """Parses integers separated by commas, such as ``0,1``."""
    words = split_values(text)
    if not words or not all(word.isdecimal() and len(word) < 20 for word in words):
        raise ValueError(f"{flag} must be integers >= 0 such as 0,1, got {shorten(text)}")
    return tuple(map(int, words))


def parse_image_size(flag: str, text: str) -> ImageSize:
    """Parses the size of images in pixels: a side such as ``64``, or height and width such as ``48,64``."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:,\s*(\d{1,9})\s*)?", text)
    if match is None:
        raise ValueError(f"{flag} must be a side such as 64, or height,width such as 48,64, got {shorten(text)}")
    return as_image_size([int(match[1]), int(match[2] or match[1])])


def parse_spec(flag: str, text: str) -> Any:
    """Parses one name, number or mapping in YAML. ``{"name": "remdm"}`` and ``{name: remdm}`` are the same."""
    rule = f"{flag} must be a name or a mapping such as '{{name: remdm, eta: 0.4}}'"
    try:
        spec = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{rule}, got {shorten(text)} ({error})") from error
    if not isinstance(spec, str | dict | int | float) or isinstance(spec, bool):
        raise ValueError(f"{rule}, got {spec!r}")
    return spec


def parse_named_spec(flag: str, text: str) -> str | dict[str, Any]:
    """Parses a plug-in: a mapping with its name and arguments; what does not begin like one is its name, as it is."""
    if not text.lstrip().startswith(("{", "[", '"')):
        return text
    spec = parse_spec(flag, text)
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ValueError(f"{flag} must be a name or a mapping such as '{{name: remdm, eta: 0.4}}', got {text}")
    return spec


def parse_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses names and mappings separated by commas, such as ``confidence, {name: remdm, eta: 0.4}``."""
    specs = [parse_spec(flag, word) for word in split_values(text)]
    if not specs:
        raise ValueError(f"{flag} must have at least one name, got {text!r}")
    for spec in specs:
        if not isinstance(spec, str | dict):
            raise ValueError(f"{flag} must be names or mappings, got {spec!r} in {text}")
    return specs


def parse_features(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses feature networks: names, ``NAME=PATH``, ``timm:MODEL=FILE`` or mappings, each network once."""
    specs = parse_specs(flag, text)
    names = [str(spec if isinstance(spec, str) else spec.get("name")).partition("=")[0] for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{flag} must name each network once, got {', '.join(twice)} twice")
    return specs

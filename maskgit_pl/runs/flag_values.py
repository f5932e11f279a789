"""Parses the text of flags: numbers, names and mappings. Used by the command line before torch is imported."""

from __future__ import annotations

from typing import Any

from maskgit_pl.checks import ImageSize, as_image_size, shorten
from maskgit_pl.files import parse_json, parse_yaml

__all__ = [
    "parse_features",
    "parse_image_size",
    "parse_integers",
    "parse_json_spec",
    "parse_list",
    "parse_numbers",
    "parse_spec",
    "parse_specs",
    "split_values",
]

_MAX_NUMBER = 100_000  # more than the tokens of any image; a range is a list of its numbers


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parses positive integers and ranges, such as ``4,8,16`` or ``4-16``. Duplicates are dropped, the order is kept.

    Args:
        flag: Name of the flag for the error.
        text: Value of the flag.

    Raises:
        ValueError: if there is no number, a word is not a number, a number is not in [1, 100000], or a range is
            reversed.
    """
    found: dict[int, None] = {}
    for word in filter(None, map(str.strip, text.split(","))):
        first, dash, last = word.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(word) > 20:
            raise ValueError(f"{flag} must be numbers such as 4,8,16 or a range such as 4-16, got {shorten(word)}")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high:
            raise ValueError(f"{flag} must be numbers >= 1 and rising ranges, got {word!r} in {text}")
        if high > _MAX_NUMBER:
            raise ValueError(f"{flag} must be numbers <= {_MAX_NUMBER}, got {shorten(word)}")
        found.update(dict.fromkeys(range(low, high + 1)))
    if not found:
        raise ValueError(f"{flag} must have at least one number such as 8, got {text!r}")
    return tuple(found)


def parse_integers(flag: str, text: str) -> tuple[int, ...]:
    """Parses integers separated by commas, such as ``0,1``.

    Raises:
        ValueError: if there is none, or a word is not an integer.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and len(word) < 20 for word in words):
        raise ValueError(f"{flag} must be integers >= 0 such as 0,1, got {shorten(text)}")
    return tuple(map(int, words))


def parse_image_size(flag: str, text: str) -> ImageSize:
    """Parses the size of images: a side such as ``64``, or height and width such as ``48,64``, in pixels.

    Raises:
        ValueError: if the text has another form.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) > 2 or not all(word.isdecimal() and len(word) < 10 for word in words):
        raise ValueError(f"{flag} must be a side such as 64, or height,width such as 48,64, got {shorten(text)}")
    return as_image_size([int(words[0]), int(words[-1])])


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


def parse_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses names and mappings separated by commas, such as ``confidence, {name: remdm, eta: 0.4}``.

    Args:
        flag: Name of the flag for the error.
        text: Value of the flag.

    Raises:
        ValueError: if the text is empty, or a part is neither a name nor a mapping.
    """
    specs = [parse_spec(flag, word) for word in split_values(text)]
    if not specs:
        raise ValueError(f"{flag} must have at least one name, got {text!r}")
    for spec in specs:
        if not isinstance(spec, str | dict):
            raise ValueError(f"{flag} must be names or mappings, got {spec!r} in {text}")
    return specs


def parse_spec(flag: str, text: str) -> Any:
    """Parses one name, number or mapping. ``{"name": "remdm"}`` and ``{name: remdm}`` are the same.

    Args:
        flag: Name of the flag for the error.
        text: Value of the flag in YAML.

    Raises:
        ValueError: if the text is not valid YAML or has another type.
    """
    try:
        spec = parse_yaml(text)
    except ValueError as error:
        raise ValueError(
            f"{flag} must be a name or a mapping such as '{{name: remdm, eta: 0.4}}', got {shorten(text)} ({error})"
        ) from error
    if not isinstance(spec, str | dict | int | float) or isinstance(spec, bool):
        raise ValueError(f"{flag} must be a name or a mapping such as '{{name: remdm, eta: 0.4}}', got {spec!r}")
    return spec


def parse_features(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses feature networks: names, ``NAME=PATH``, ``timm:MODEL=FILE`` or mappings.

    Raises:
        ValueError: if the text is empty, a network is given twice, or a part has another form.
    """
    specs = parse_specs(flag, text)
    names = [str(spec if isinstance(spec, str) else spec.get("name")).partition("=")[0] for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{flag} must name each network once, got {', '.join(twice)} twice")
    return specs


def parse_json_spec(flag: str, text: str) -> str | dict[str, Any]:
    """Parses the name of a plug-in, or a JSON mapping with its name and arguments.

    Raises:
        ValueError: if the text begins like JSON but is not a mapping with a name.
    """
    if not text.lstrip().startswith(("{", "[", '"')):
        return text
    rule = f'{flag} must be a name or a JSON mapping such as \'{{"name": "NAME", "argument": 0.1}}\''
    try:
        mapping = parse_json(text, "the value")
    except ValueError as error:
        raise ValueError(f"{rule}, got {text} ({error})") from error
    if not isinstance(mapping.get("name"), str):
        raise ValueError(f"{rule}, got {text}")
    return mapping


def parse_list(flag: str, text: str, kind: type[int] | type[float]) -> tuple[float, ...]:
    """Parses numbers separated by commas.

    Raises:
        ValueError: if a word is not a number of this kind.
    """
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError as error:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"{flag} must be {what} separated by commas, got {text}") from error

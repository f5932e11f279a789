"""Checks of values from users and files. Every message has the form ``NAME must RULE, got VALUE``.

Used by configuration dataclasses in ``__post_init__`` and by all readers of untrusted files.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, SupportsIndex, TypeVar, get_type_hints

from maskgit_pl.schema import Schema, describe, fits, schema_of

__all__ = [
    "build_dataclass",
    "check_choice",
    "check_class_names",
    "check_integer",
    "check_keys",
    "check_number",
    "check_seed",
    "check_sha256",
    "did_you_mean",
    "plain_list",
    "plain_number",
    "shorten",
]

T = TypeVar("T")

_MAX_SHOWN = 80  # characters of a value in a message


def shorten(value: object) -> str:
    """Returns ``repr(value)``, at most 80 characters long, with control characters escaped."""
    # A long list would fill the terminal, and repr() of it takes time.
    if isinstance(value, list | tuple | dict | set) and len(value) > _MAX_SHOWN:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value[: _MAX_SHOWN + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # an integer of over 4,300 digits; a structure nested too deep
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def did_you_mean(name: str, choices: Collection[str]) -> str:
    """Returns ``"did you mean 'x'?"`` for the choice closest to ``name``, or an empty string if none is close."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def plain_number(value: object) -> object:
    """Returns a number of NumPy, or an integer in a tensor, as an ``int`` or a ``float``, and other values unchanged.

    Methods that users call from Python apply it before the checks below, which accept plain numbers only, because
    values from files are plain and values for files must be.
    """
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or bool(getattr(value, "ndim", 0)):
        return value
    with suppress(TypeError):  # arrays and tensors of floats have the method, too
        if isinstance(value, SupportsIndex):
            return operator.index(value)
    return float(value) if isinstance(value, Real) else value


def plain_list(value: object) -> list[Any] | None:
    """Returns the elements of a list, an array or another iterable, with plain numbers; None for a single value."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or getattr(value, "ndim", None) == 0:
        return None
    return [plain_number(each) for each in value]


def check_integer(name: str, value: object, interval: str) -> int:
    """Checks that ``value`` is an integer in ``interval``.

    Args:
        name: Name of the value for the message, such as a flag.
        value: The value. A bool is not an integer.
        interval: Interval in mathematical notation, such as ``"[1, 1024]"``, ``"[0, inf)"`` or ``"[0, 2**32)"``.

    Returns:
        ``value``.

    Raises:
        ValueError: if ``value`` is not an integer or not in ``interval``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not _contains(interval, value):
        raise ValueError(f"{name} must be an integer in {interval}, got {shorten(value)}")
    return value


def check_number(name: str, value: object, interval: str) -> float:
    """Checks that ``value`` is a finite number in ``interval``.

    Args:
        name: Name of the value for the message, such as a flag.
        value: An int or a float. A bool is not a number.
        interval: Interval in mathematical notation, such as ``"[0, 1)"`` or ``"(0, inf)"``.

    Returns:
        ``value``.

    Raises:
        ValueError: if ``value`` is not a number, not finite, or not in ``interval``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ValueError(f"{name} must be a finite number in {interval}, got {shorten(value)}")
    if not _contains(interval, value):
        raise ValueError(f"{name} must be a number in {interval}, got {shorten(value)}")
    return value


def check_seed(name: str, value: object) -> int:
    """Checks that ``value`` is a seed: an integer in [0, 2**32).

    Returns:
        ``value``.

    Raises:
        ValueError: if it is not.
    """
    return check_integer(name, value, "[0, 2**32)")


def check_sha256(name: str, value: object) -> str:
    """Checks that ``value`` is a SHA-256 in hex.

    Returns:
        ``value``.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{name} must be a SHA-256 of 64 hex digits, got {shorten(value)}")
    return value


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Checks that ``value`` is one of ``choices``.

    Returns:
        ``value``.

    Raises:
        ValueError: if it is not. The message lists the choices and names the closest one.
    """
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shorten(value)}; {hint}".removesuffix("; "))
    return value


def check_keys(where: str, given: Collection[str], *, known: Collection[str], required: Collection[str] = ()) -> None:
    """Checks the keys of a mapping from a file.

    Args:
        where: File and key of the mapping, for the message.
        given: Keys of the mapping.
        known: Allowed keys.
        required: Keys that must not be missing.

    Raises:
        ValueError: if a key is unknown (the message names the closest known key) or a required key is missing.
    """
    for key in given:
        if key not in known:
            hint = f"{did_you_mean(str(key), known)} ".lstrip()
            raise ValueError(
                f"{where}: unknown key {shorten(key)}: {hint}known keys: {', '.join(sorted(known)) or 'none'}"
            )
    for key in required:
        if key not in given:
            raise ValueError(f"{where}: the key {key!r} is missing")


def check_class_names(where: str, names: object, num_classes: int) -> tuple[str, ...]:
    """Checks the class names from a file.

    Args:
        where: File and key, for the message.
        names: Value from the file, which must be a list of strings.
        num_classes: Required number of names.

    Returns:
        ``names``.

    Raises:
        ValueError: if ``names`` is anything else.
    """
    if not isinstance(names, list | tuple) or len(names) != num_classes or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{where} must be a list of {num_classes} strings, one for each class, got {shorten(names)}")
    return tuple(names)


def build_dataclass(kind: type[T], values: object, where: str) -> T:
    """Builds a dataclass from the plain values of a file, after checking its keys and the types of its values.

    Args:
        kind: Dataclass whose ``__post_init__`` checks ranges.
        values: Mapping from the file. JSON lists are accepted for tuples.
        where: File and key of ``values``, for the message.

    Raises:
        ValueError: if ``values`` is not a mapping, has unknown or missing keys or values of another type, or if
            ``kind`` raises a ``ValueError``. The message begins with ``where``.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {shorten(values)}")
    every = fields(kind)  # type: ignore[arg-type]  # a type variable cannot be bound to dataclasses
    own: dict[str, Field[Any]] = {field.name: field for field in every if field.init}
    required = [n for n, field in own.items() if field.default is MISSING and field.default_factory is MISSING]
    check_keys(where, values, known=own, required=required)
    schemas = _schemas(kind)
    for key, value in values.items():
        schema = schemas.get(key, {})
        if not fits(value, schema):
            raise ValueError(f"{where}.{key} must be {describe(schema)}, got {shorten(value)}{_hint(value, schema)}")
    # __post_init__ knows its fields, not the file: the message gets the place in front.
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _schemas(kind: type) -> dict[str, Schema]:
    """Returns the schemas of the annotations that are plain types. Plug-ins may have others, and check them."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # names that are imported for type checkers only
        return {}
    schemas = {}
    for name, hint in hints.items():
        with suppress(TypeError):
            schemas[name] = schema_of(hint)
    return schemas


def _hint(value: object, schema: Schema) -> str:
    """Returns ``; did you mean 'x'?`` for a value close to one of an enum, else an empty string."""
    close = did_you_mean(value, [str(choice) for choice in schema.get("enum", ())]) if isinstance(value, str) else ""
    return f"; {close}" if close else ""


def _is_finite(value: int | float) -> bool:
    return isinstance(value, int) or math.isfinite(value)


def _contains(interval: str, value: int | float) -> bool:
    # Round brackets exclude the end, square brackets include it.
    low, high = (_end(word) for word in interval[1:-1].split(","))
    above = low < value if interval[0] == "(" else low <= value
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def _end(word: str) -> float:
    # "2**32" and "inf" are both allowed.
    base, _, exponent = word.partition("**")
    end: float = float(base) ** float(exponent or 1)
    return end

"""Checks of values from users and files. Every message has the form ``NAME must RULE, got VALUE``.

Used by configuration dataclasses in ``__post_init__`` and by all readers of untrusted files. Imports nothing heavy, so
that a wrong key is reported immediately. In this order: single values, the mappings of files (keys, dataclasses), JSON
Schemas of annotations (2020-12, which editors understand), and the sizes, channels and file names of images.
"""

from __future__ import annotations

import math
import operator
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "CHANNELS",
    "ImageSize",
    "Schema",
    "as_image_size",
    "build_dataclass",
    "check_channels",
    "check_choice",
    "check_class_names",
    "check_image_size",
    "check_integer",
    "check_keys",
    "check_number",
    "check_seed",
    "check_sha256",
    "describe",
    "did_you_mean",
    "fits",
    "height_width",
    "image_file_name",
    "is_image_file_name",
    "pixels_text",
    "plain_list",
    "plain_number",
    "plain_size",
    "schema_of",
    "shorten",
]

Schema = dict[str, Any]

ImageSize: TypeAlias = int | tuple[int, int]
"""The side of square images, or (height, width), in pixels."""

T = TypeVar("T")

CHANNELS = {1: "grey", 3: "RGB"}
"""The numbers of channels of images, and what they hold."""

_MAX_SHOWN = 80  # characters of a value in a message
_FILE_NAME = re.compile(r"(no-class|class-\d{4,})-seed-\d{6,}\.png")  # of image_file_name

_TYPES: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping",
}
# Python counts a bool as an int; JSON Schema does not.
_FITS: dict[str, Callable[[object], bool]] = {
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
}


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


def schema_of(annotation: Any) -> Schema:
    """Returns the JSON Schema of an annotation.

    Args:
        annotation: A plain type, dataclass, ``Literal``, union, tuple, sequence, mapping or ``Any``.

    Raises:
        TypeError: if the annotation is of another kind.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return {}
    if annotation is None:
        annotation = type(None)
    if annotation in _TYPES:
        return {"type": _TYPES[annotation]}
    # A dataclass is a mapping with exactly its fields.
    if isinstance(annotation, type) and is_dataclass(annotation):
        hints = get_type_hints(annotation)
        properties = {field.name: schema_of(hints[field.name]) for field in fields(annotation) if field.init}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(each) for each in arguments]}
    # tuple[float, float] has a fixed length; tuple[int, ...] is handled as a sequence below.
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        items, count = [schema_of(each) for each in arguments], len(arguments)
        return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object"}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": schema_of(arguments[0])}
    raise TypeError(f"{annotation} has no JSON Schema here")


def fits(value: object, schema: Schema) -> bool:
    """Returns True if a plain value fits a schema of ``schema_of``. Keys of mappings are not compared.

    An integer fits ``number``, a tuple fits ``array``, and a bool fits only ``boolean``.
    """
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        # 1 == True in Python, so types are compared too.
        return any(value == choice and type(value) is type(choice) for choice in schema["enum"])
    if schema.get("type") == "array":
        return isinstance(value, list | tuple) and _items_fit(value, schema)
    return "type" not in schema or _FITS[schema["type"]](value)


def _items_fit(values: Sequence[object], schema: Schema) -> bool:
    if "prefixItems" in schema:
        return len(values) == len(schema["prefixItems"]) and all(map(fits, values, schema["prefixItems"]))
    return all(fits(each, schema["items"]) for each in values)


def describe(schema: Schema) -> str:
    """Returns the values that a schema accepts in words, such as ``"an integer or null"``."""
    if "anyOf" in schema:
        return " or ".join(describe(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(repr(each) if isinstance(each, str) else str(each).lower() for each in schema["enum"])
    if "prefixItems" in schema:
        return "a list of " + " and ".join(describe(each) for each in schema["prefixItems"])
    if schema.get("type") == "array":
        return f"a list of items that are each {describe(schema['items'])}"
    return _NAMES.get(schema.get("type", ""), "any value")


def check_image_size(name: str, size: object, interval: str) -> ImageSize:
    """Checks the size of images.

    Args:
        name: Name of the value for the message, such as a flag.
        size: An integer, or a list or tuple [height, width].
        interval: Range of a side, such as ``"[1, 8192]"``.

    Returns:
        The size in its one form; see ``as_image_size``.

    Raises:
        ValueError: if it is anything else, or a side is out of range.
    """
    if isinstance(size, list | tuple) and len(size) == 2:
        return as_image_size([check_integer(name, side, interval) for side in size])
    if not isinstance(size, int):
        raise ValueError(
            f"{name} must be an integer in {interval}, or [height, width] of two such integers, got {shorten(size)}"
        )
    return check_integer(name, size, interval)


def check_channels(name: str, channels: object) -> int:
    """Checks the number of channels of images.

    Raises:
        ValueError: if it is not 1 or 3.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels not in CHANNELS:
        known = ", ".join(f"{number} ({what})" for number, what in CHANNELS.items())
        raise ValueError(f"{name} must be one of {known}, got {shorten(channels)}")
    return channels


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns the height and the width of a size."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def as_image_size(size: int | Sequence[int]) -> ImageSize:
    """Returns a size in its one form: the side of a square, else (height, width)."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def plain_size(size: int | Sequence[int]) -> int | list[int]:
    """Returns a size as JSON and YAML restore it: the side of a square, else [height, width]."""
    size = as_image_size(size)
    return size if isinstance(size, int) else list(size)


def pixels_text(size: int | Sequence[int]) -> str:
    """Returns a size for messages: width x height, as PIL and file managers show it."""
    height, width = height_width(size)
    return f"{width} x {height}"


def image_file_name(label: int | None, seed: int) -> str:
    """Returns the name of the PNG file of a generated image, such as ``class-0003-seed-000007.png``.

    Args:
        label: Class of the image; None is "no class".
        seed: Seed of the image.
    """
    name = "no-class" if label is None else f"class-{label:04d}"
    return f"{name}-seed-{seed:06d}.png"


def is_image_file_name(name: str) -> bool:
    """Returns True if a name can be one of ``image_file_name``."""
    return _FILE_NAME.fullmatch(name) is not None

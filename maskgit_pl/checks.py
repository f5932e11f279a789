"""Checks of values from users and files. Every message has the form ``NAME must RULE, got VALUE``.

Used by configuration dataclasses in ``__post_init__`` and by all readers of untrusted files. Imports nothing
heavy, so that a wrong key is reported immediately. In this order: single values, the mappings of files (keys,
dataclasses, whose types pydantic checks), and the sizes and channels of images.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

from maskgit_pl.text import did_you_mean, shorten

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import SchemaValidator

ImageSize: TypeAlias = int | tuple[int, int]
"""The side of square images, or (height, width), in pixels."""

MAY_CHANGE = {"may_change": True}
"""Metadata of a field of a model's configuration that a resumed run may change; all other fields are fixed."""

T = TypeVar("T")

CHANNELS = {1: "grey", 3: "RGB"}
"""The numbers of channels of images, and what they hold."""


_CONVERTED = ("int", "float", "str", "bool", "list", "dict")  # types to which pydantic would convert other values

_RULES = {  # first word of the type of an error of pydantic -> what the value must be
    "int": "an integer",
    "float": "a number",
    "string": "a string",
    "bool": "true or false",
    "none": "null",
    **dict.fromkeys(("list", "sequence", "tuple"), "a list"),
    **dict.fromkeys(("dict", "mapping", "dataclass"), "a mapping"),
}
_BOUNDS = {  # the same for the ranges in annotations
    "finite_number": "finite",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
}


class WrongValue(NamedTuple):
    """A wrong value, and the message."""

    key: tuple[str, ...]  # that leads to the value, such as ("data", "seed")
    text: str
    kind: Literal["missing", "type", "value"]  # the last is what a dataclass refuses


def check_integer(name: str, value: object, interval: str) -> int:
    """Returns ``value`` if it is an integer in ``interval``; raises a ``ValueError`` if it is not.

    Args:
        name: Name of the value for the message, such as a flag.
        value: The value. A bool is not an integer.
        interval: Interval in mathematical notation, such as ``"[1, 1024]"``, ``"[0, inf)"`` or ``"[0, 2**32)"``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not _contains(interval, value):
        raise ValueError(f"{name} must be an integer in {interval}, got {shorten(value)}")
    return value


def check_integers(settings: object, prefix: str = "", **intervals: str) -> None:
    """Checks integers of a dataclass: each name with its interval; see ``check_integer``. None is no value.

    The prefix is that of the names in the message, such as ``"data."``.
    """
    for name, interval in intervals.items():
        if getattr(settings, name) is not None:
            check_integer(f"{prefix}{name}", getattr(settings, name), interval)


def check_number(name: str, value: object, interval: str) -> float:
    """Returns ``value`` if it is a finite number, int or float, in ``interval``; raises a ``ValueError`` if it is not.

    Args:
        name: Name of the value for the message, such as a flag.
        value: The value. A bool is not a number.
        interval: Interval in mathematical notation, such as ``"[0, 1)"`` or ``"(0, inf)"``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not _contains(interval, value):
        raise ValueError(f"{name} must be a number in {interval}, got {shorten(value)}")
    return value


def check_seed(name: str, value: object) -> int:
    """Returns ``value`` if it is a seed, an integer in [0, 2**32); raises a ``ValueError`` if it is not."""
    return check_integer(name, value, "[0, 2**32)")


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Returns ``value`` if it is one of ``choices``; else raises a ``ValueError`` that names the closest one."""
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shorten(value)}; {hint}".removesuffix("; "))
    return value


def _contains(interval: str, value: int | float) -> bool:
    # Round brackets exclude the end, square brackets include it.
    low, high = (_end(word) for word in interval[1:-1].split(","))
    above = low < value if interval[0] == "(" else low <= value
    below = value < high if interval[-1] == ")" else value <= high
    return above and below and abs(value) != math.inf


def _end(word: str) -> float:
    # "2**32" and "inf" are both allowed.
    base, _, exponent = word.partition("**")
    end: float = float(base) ** float(exponent or 1)
    return end


def check_folder(name: str, path: object) -> str:
    """Returns the path of a pretrained folder as a string; raises a ``ValueError`` for anything else, such as a module.

    The module of a stage writes such a folder.
    """
    if not isinstance(path, str | PathLike):
        raise ValueError(
            f"{name} must be the path of a pretrained folder, got a {type(path).__name__}; write the folder with "
            "export() of the trained module, and give its path"
        )
    return str(path)


def plain_number(value: Any) -> Any:
    """Returns a number of NumPy, or the number in a tensor or an array, as an ``int`` or a ``float``.

    Other values are unchanged, also bools. Methods that users call from Python apply it before the checks below, which
    accept plain numbers only, because values from files are plain and values for files must be.
    """
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or bool(getattr(value, "ndim", 0)):
        return value
    value = value.item() if hasattr(value, "item") else value
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value


def plain_list(value: object) -> list[Any] | None:
    """Returns the elements of a list, an array or another iterable, with plain numbers; None for a single value."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or getattr(value, "ndim", None) == 0:
        return None
    return [plain_number(item) for item in value]


def check_keys(where: str, given: Collection[str], *, known: Collection[str], required: Collection[str] = ()) -> None:
    """Raises a ``ValueError`` if a mapping has a key that is not ``known``, or lacks one that is ``required``.

    The message begins with ``where``, and names the closest known key.
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
    """Returns the class names from a file; raises a ``ValueError`` if they are no list of ``num_classes`` strings."""
    if not isinstance(names, list | tuple) or len(names) != num_classes or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{where} must be a list of {num_classes} strings, one for each class, got {shorten(names)}")
    return tuple(names)


def build_dataclass(kind: type[T], values: object, where: str) -> T:
    """Builds a dataclass from the plain values of a file, after checking its keys and the types of its values.

    Args:
        kind: Dataclass whose annotations give the types, and whose ``__post_init__`` checks ranges.
        values: Mapping from the file. JSON lists are accepted for tuples, and integers for floats.
        where: File and key of ``values``, for the message.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {shorten(values)}")
    by_name = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]  # T is a dataclass
    required = [n for n, field in by_name.items() if field.default is MISSING and field.default_factory is MISSING]
    check_keys(where, values, known=by_name, required=required)
    try:
        return validate(kind, values)
    except ValueError as error:
        raise ValueError(describe_wrong_values(error, values, where)[0].text) from error


def validate(kind: type[T], values: Mapping[str, Any]) -> T:
    """Builds a dataclass from plain values. Types are compared strictly, as in JSON: a bool is no number."""
    validator = _validator(cast(Hashable, kind))
    return kind(**values) if validator is None else cast(T, validator.validate_python([values])[0])


@cache
def type_adapter(kind: type) -> TypeAdapter[Any]:
    """Returns pydantic's adapter of the lists of a dataclass, which refuses unknown keys also in inner dataclasses."""
    from pydantic import ConfigDict, TypeAdapter

    # A plug-in may have types that no file can hold: its __post_init__ converts them.
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return TypeAdapter(list[kind], config=settings)  # type: ignore[valid-type]  # a value names the type


@cache
def _validator(kind: type) -> SchemaValidator | None:
    """Returns the validator of a dataclass; None if a plug-in imports names of its annotations for type checkers."""
    from pydantic_core import SchemaValidator

    adapter = type_adapter(cast(Hashable, kind))
    return SchemaValidator(_strict(adapter.core_schema)) if adapter.pydantic_complete else None


def _strict(schema: Any) -> Any:
    """Returns a schema that converts only lists to tuples, mappings to dataclasses, and integers to floats."""
    if type(schema) in (list, tuple):
        return type(schema)(_strict(part) for part in schema)
    if type(schema) is not dict:
        return schema
    if schema.get("type") == "is-instance":  # of a type that no file can hold
        return {"type": "any"}
    parts = {name: part if name == "default" else _strict(part) for name, part in schema.items()}
    return {**parts, "strict": True} if schema.get("type") in _CONVERTED else parts


def describe_wrong_values(
    error: ValueError, values: Mapping[str, Any], where: str, *, keys: Collection[str] = ()
) -> list[WrongValue]:
    """Returns what is wrong with values that ``validate`` has refused, in the order of the fields.

    Args:
        error: The error of ``validate``.
        values: The values.
        where: Their file and key.
        keys: Known dotted keys. A message of a dataclass that begins with the name of a field continues its key.
    """
    if not hasattr(error, "errors"):
        return [_refused_value(where, (), str(error), keys)]
    errors_by_key: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        key = _key_of(detail["loc"], values, is_missing=detail["type"] == "missing")
        errors_by_key.setdefault(key, []).append(detail)
    return [_describe_wrong_value(key, detail, values, where, keys) for key, detail in errors_by_key.items()]


def _key_of(location: Sequence[str | int], values: Any, *, is_missing: bool) -> tuple[str, ...]:
    """Returns the keys of a location: without the members of unions and the items of lists."""
    key: list[str] = []
    for part in location:
        if isinstance(values, Mapping) and isinstance(part, str):
            if part not in values and not (is_missing and part is location[-1]):
                break
            key.append(part)
            values = values.get(part)
        elif not isinstance(part, int):  # a member of a union
            break
    return tuple(key)


def _describe_wrong_value(
    key: tuple[str, ...],
    details: Sequence[Mapping[str, Any]],
    values: Any,
    where: str,
    keys: Collection[str],
) -> WrongValue:
    first = details[0]
    if first["type"] in ("value_error", "assertion_error"):
        return _refused_value(where, key, str(first["ctx"]["error"]), keys)
    path = ".".join((where, *key) if where else key)
    for part in key:
        if first["type"] == "missing" and part not in values:
            return WrongValue(key, f"{path} must be given", "missing")
        values = values[part]
    expected = " ".join(detail.get("ctx", {}).get("expected", "") for detail in details)
    choices = re.findall("'([^']*)'", expected)
    close = did_you_mean(values, choices) if isinstance(values, str) else ""
    rule = " or ".join(dict.fromkeys(map(_rule_of, details)))
    if isinstance(values, str) and re.fullmatch(r"[\w, .:-]{1,40}", values) and "a list" in rule and not close:
        close = f"write [{values}]"
    if isinstance(values, list | tuple):
        rule = f"a list with {rule} as each item" if "a list" not in rule else rule
    return WrongValue(key, f"{path} must be {rule}, got {shorten(values)}{close and f'; {close}'}", "type")


def _rule_of(detail: Mapping[str, Any]) -> str:
    """Returns what a value must be, in words."""
    last = detail["loc"][-1]
    if detail["type"] == "missing" and isinstance(last, str):  # in a dataclass that is a member of a union
        return f"a mapping with the key {last!r}"
    if detail["type"] in ("missing", "too_long", "too_short"):
        return "a list of the right length"
    if detail["type"] in _BOUNDS:
        return _BOUNDS[detail["type"]].format(**detail.get("ctx", {}))
    return _RULES.get(detail["type"].partition("_")[0]) or str(detail.get("ctx", {}).get("expected") or detail["msg"])


def _refused_value(where: str, key: tuple[str, ...], message: str, keys: Collection[str]) -> WrongValue:
    """Puts the place in front of the message of a dataclass, which knows its fields and not its file."""
    path = ".".join((where, *key) if where else key)
    word = re.split(r"[.:\s]", message, maxsplit=1)[0]
    if path and not message.startswith((f"{path}.", f"{path}:")):
        is_field = ".".join((*key, word)) in keys
        message = f"{path}.{message}" if is_field else f"{path}: {message}"
    return WrongValue(tuple(re.split(r"[:\s]", message, maxsplit=1)[0].split(".")), message, "value")


def check_image_size(name: str, size: object, interval: str) -> ImageSize:
    """Returns the size of images in its one form (see ``as_image_size``); raises a ``ValueError`` for anything else.

    Args:
        name: Name of the value for the message, such as a flag.
        size: An integer, or a list or tuple [height, width].
        interval: Range of a side, such as ``"[1, 8192]"``.
    """
    if isinstance(size, list | tuple) and len(size) == 2:
        return as_image_size([check_integer(name, side, interval) for side in size])
    if not isinstance(size, int):
        raise ValueError(
            f"{name} must be an integer in {interval}, or [height, width] of two such integers, got {shorten(size)}"
        )
    return check_integer(name, size, interval)


def check_channels(name: str, channels: object) -> int:
    """Returns the number of channels of images if it is 1 or 3; raises a ``ValueError`` if it is not."""
    if isinstance(channels, bool) or not isinstance(channels, int) or channels not in CHANNELS:
        accepted = ", ".join(f"{number} ({what})" for number, what in CHANNELS.items())
        raise ValueError(f"{name} must be one of {accepted}, got {shorten(channels)}")
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

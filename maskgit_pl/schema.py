"""JSON Schemas of type annotations, and checks of plain values against them.

Used for recipes, ``config.json`` and ``decoding.json``. Imports nothing heavy, so that a wrong key is reported
immediately. The schemas are JSON Schema 2020-12, which editors understand.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["Schema", "describe", "fits", "schema_of"]

Schema = dict[str, Any]

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
        return {"type": "array", "prefixItems": [schema_of(each) for each in arguments], **_length(len(arguments))}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object"}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": schema_of(arguments[0])}
    raise TypeError(f"{annotation} has no JSON Schema here")


def _length(count: int) -> Schema:
    return {"minItems": count, "maxItems": count}


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

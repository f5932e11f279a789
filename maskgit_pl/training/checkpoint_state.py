"""Conversion of a checkpoint to plain JSON, with names in place of tensors. Used by ``checkpoint_files``.

JSON has no tuples, no numeric keys and no non-finite numbers, so a mapping with one key gives the type of each value:
``{"list": [...]}``, ``{"tuple": [...]}``, ``{"items": [[key, value], ...]}``, ``{"tensor": name}``,
``{"float": "nan"}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from maskgit_pl.checks import shorten

__all__ = ["StateFormatError", "join_state", "split_state"]

_MAX_DEPTH = 32  # nesting depth; Lightning's checkpoints have 10
_NOT_FINITE = ("nan", "inf", "-inf")


def split_state(value: Any, key: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Splits a value into plain JSON and tensors.

    Args:
        value: Tensors and plain values in mappings, lists and tuples.
        key: Key of ``value`` in the checkpoint, such as ``/state_dict``.
        tensors: Mapping to which the tensors are added, named by their keys.
        depth: Nesting depth of ``value``.

    Returns:
        Plain JSON with the names of the tensors.

    Raises:
        TypeError: if a value is neither a tensor nor plain. The message names its key.
        ValueError: if ``join_state`` would refuse it: values that are nested too deep, a key that is not finite, or two
            tensors with one key.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"checkpoint {shorten(key)}: values must be nested at most {_MAX_DEPTH} deep; save flat mappings or tensors"
        )
    if isinstance(value, Tensor):
        if key in tensors:
            raise ValueError(f"checkpoint {key}: keys must be unique as text, got two tensors; rename one of the keys")
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_key(k, key), split_state(v, f"{key}/{k}", tensors, depth + 1)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [split_state(item, f"{key}/{i}", tensors, depth + 1) for i, item in enumerate(value)]}
    # JSON has no non-finite numbers.
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return _plain(value, key)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint {key or '/'}: tensors and plain values only, got {type(value).__name__}")


def _key(value: Any, key: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"checkpoint {key or '/'}: keys of a mapping must be finite, got {value}; use text as the key")
    return _plain(value, key)


class StateFormatError(ValueError):
    """Values that are not in the format of ``split_state``."""


def join_state(node: Any, read: Callable[[str], Any], depth: int = 0) -> Any:
    """Inverts ``split_state``.

    Args:
        node: Parsed JSON of a file, or a part of it.
        read: Function that returns the tensor of a name.
        depth: Nesting depth of ``node``.

    Raises:
        StateFormatError: if ``node`` is not in the format of ``split_state``.
    """
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise StateFormatError("a list must be inside a mapping that gives its type")
        return node
    # The file may be hostile: limit the recursion, and accept only the five known forms.
    if depth > _MAX_DEPTH:
        raise StateFormatError(f"values must be nested at most {_MAX_DEPTH} deep")
    kind, content = next(iter(node.items()), ("", None))
    if len(node) != 1 or kind not in ("tensor", "float", "items", "list", "tuple"):
        kinds = "tensor, float, items, list, tuple"
        raise StateFormatError(f"a mapping must have one of the keys {kinds}, got {shorten(list(node))}")
    if kind in ("tensor", "float"):
        if not isinstance(content, str) or (kind == "float" and content not in _NOT_FINITE):
            raise StateFormatError(f"a {kind} must be a string, got {shorten(content)}")
        return read(content) if kind == "tensor" else float(content)
    if not isinstance(content, list):
        raise StateFormatError(f"{kind} must be a list, got {shorten(content)}")
    if kind == "items":
        return _join_items(content, read, depth)
    made: Iterator[Any] = (join_state(item, read, depth + 1) for item in content)
    return list(made) if kind == "list" else tuple(made)


def _join_items(content: list[Any], read: Callable[[str], Any], depth: int) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], list | dict):
            raise StateFormatError(f"items must be pairs of a key and a value, got {shorten(pair)}")
        if pair[0] in made:
            raise StateFormatError(f"keys of a mapping must be unique, got {shorten(pair[0])} twice")
        made[pair[0]] = join_state(pair[1], read, depth + 1)
    return made

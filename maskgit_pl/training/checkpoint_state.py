"""The values of a checkpoint as plain JSON in which names stand for tensors. Used by ``checkpoint_files``.

JSON has no tuples, no keys that are numbers and no numbers that are not finite, so a mapping of one key says what each
value is: ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"items": [[key, value], ...]}``, ``{"tensor": name}``,
``{"float": "nan"}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from maskgit_pl.checks import shorten

__all__ = ["StateFormatError", "join_state", "split_state"]

_MAX_DEPTH = 32  # of plain values inside one another; Lightning's have 10
_NOT_FINITE = ("nan", "inf", "-inf")


def split_state(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Returns plain JSON in which names stand for tensors.

    Args:
        value: Tensors and plain values in mappings, lists and tuples.
        key: Place of ``value`` in the checkpoint, such as ``/state_dict``.
        tensors: Takes the tensors by name.

    Raises:
        TypeError: if a value is neither a tensor nor plain. The message names its place.
    """
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_plain(k, key), split_state(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [split_state(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no word for it
        return {"float": str(value)}
    return _plain(value, key)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint {key or '/'}: tensors and plain values only, got {type(value).__name__}")


class StateFormatError(ValueError):
    """Values that ``split_state`` does not give."""


def join_state(node: Any, read: Callable[[str], Any], depth: int = 0) -> Any:
    """Undoes ``split_state``.

    Args:
        node: What a file holds.
        read: Gives the tensor of a name.
        depth: How deep ``node`` lies.

    Raises:
        StateFormatError: if ``split_state`` does not give such values.
    """
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise StateFormatError("a list must stand in a mapping that says what it is")
        return node
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
            raise StateFormatError(f"a key must stand once in a mapping, got {shorten(pair[0])} again")
        made[pair[0]] = join_state(pair[1], read, depth + 1)
    return made

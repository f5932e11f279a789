"""Trees of plain values from files and flags, and the one rule by which later ones are merged over earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Layer", "merge", "remove_key", "value_at"]


@dataclass(frozen=True)
class Layer:
    """Values of one origin.

    Args:
        origin: File or flag, for messages.
        tree: Nested mappings of plain values.
    """

    origin: str
    tree: Mapping[str, Any]


def merge(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges trees, later over earlier, mapping by mapping.

    A mapping with the key ``name`` spells a registered thing out and replaces what was there; one without it adds
    arguments to what an earlier tree names.
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            result[key] = _override(result.get(key), value)
    return result


def _override(old: Any, new: Any) -> Any:
    if not isinstance(new, Mapping):
        return new
    if "name" in new:
        return dict(new)
    if isinstance(old, str):
        return {"name": old, **new}
    return merge([old if isinstance(old, Mapping) else {}, new])


def value_at(tree: Any, key: str) -> Any:
    """Returns the value of a dotted key such as ``data.source``; None where a tree does not have it."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def remove_key(tree: Any, key: str) -> bool:
    """Removes a dotted key from a tree, in place; returns whether it was there."""
    *groups, leaf = key.split(".")
    for group in groups:
        tree = tree.get(group) if isinstance(tree, dict) else None
    return isinstance(tree, dict) and tree.pop(leaf, remove_key) is not remove_key

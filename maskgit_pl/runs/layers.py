"""Trees of recipe values from files and flags, and the rule that merges later ones over earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFAULT_BACKBONE", "Layer", "merge", "remove_key", "value_at"]

DEFAULT_BACKBONE = "bert"
"""The backbone of recipes that name none; ``networks.backbone`` has the same."""

_COMMON = (  # to all backbones
    "codebook_size",
    "num_classes",
    "grid",
    "class_dropout",
    "dropout",
    "condition_dim",
    "num_token_groups",
)


@dataclass(frozen=True)
class Layer:
    """The values of one file or flag.

    Args:
        origin: Name of the file or flag, for messages.
        tree: Nested mappings of plain values.
    """

    origin: str
    tree: Mapping[str, Any]


def merge(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges trees recursively; later values override earlier ones.

    A mapping with the key ``name`` specifies a registered object and replaces the earlier value. A mapping without
    ``name`` adds arguments to the object that an earlier tree names.

    A mapping with the key ``backbone`` (``model.network``) that names another backbone than the earlier trees drops the
    keys of the old one, except those that all backbones have: codebook_size, num_classes, grid, class_dropout, dropout,
    condition_dim and num_token_groups. The keys of the new one start from its defaults.
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
    # The earlier tree names the object without arguments.
    if isinstance(old, str):
        return {"name": old, **new}
    kept = old if isinstance(old, Mapping) else {}
    if "backbone" in new and new["backbone"] != kept.get("backbone", DEFAULT_BACKBONE):
        kept = {key: value for key, value in kept.items() if key in _COMMON}
    return merge([kept, new])


def value_at(tree: Any, key: str) -> Any:
    """Returns the value of a dotted key such as ``data.source``, or None if the tree does not have it."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def remove_key(tree: Any, key: str) -> bool:
    """Removes a dotted key from a tree in place. Returns True if it was there."""
    *groups, leaf = key.split(".")
    for group in groups:
        tree = tree.get(group) if isinstance(tree, dict) else None
    return isinstance(tree, dict) and tree.pop(leaf, remove_key) is not remove_key

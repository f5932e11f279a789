"""Recipe keys that had other names in version 0.1.0: the one table of old names, and their translation.

Recipe files, flags, ``config.yaml`` of a run and the settings that a checkpoint carries are translated where they are
read, with a warning that says the new names. Nothing else knows the old ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

__all__ = [
    "rename_decoding",
    "rename_measurement",
    "rename_token_selector",
    "renamed_cluster",
    "renamed_keys",
    "renamed_settings",
    "renamed_tree",
]

_log = logging.getLogger(__name__)
T = TypeVar("T")

_NEW_NAMES = {  # old key -> new key; the keys below it move along
    "model.learning_rate": "model.optimizer.learning_rate",
    "model.betas": "model.optimizer.betas",
    "model.weight_decay": "model.optimizer.weight_decay",
    "model.adamw": "model.optimizer.adamw",
}
_NEW_CLUSTERS = {"cpu": "single"}  # old file of recipes/cluster -> new file


def renamed_tree(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns a tree of recipe values with new names in place of old ones.

    Args:
        tree: Nested mappings of plain values; it is not changed.
        origin: File or flag that the tree comes from, for messages.

    Raises:
        ValueError: if a setting has both its old and its new name.
    """
    renamed: dict[str, Any] = _copied(tree)
    found = {}
    for old, new in _NEW_NAMES.items():
        group, _, leaf = old.rpartition(".")
        holder = _group(renamed, group)
        if holder is None or leaf not in holder:
            continue
        found[old] = new
        new_group, _, new_leaf = new.rpartition(".")
        new_holder = _group(renamed, new_group, make=True)
        if new_holder is None or new_leaf in new_holder:
            raise ValueError(_both(origin, old, new))
        new_holder[new_leaf] = holder.pop(leaf)
    _warn(origin, found)
    return renamed


def renamed_keys(keys: Iterable[str], origin: str) -> list[str]:
    """Returns dotted keys with new names in place of old ones.

    Args:
        keys: Dotted keys of one origin, such as ``model.learning_rate.peak``.
        origin: File or command that the keys come from, for messages.

    Raises:
        ValueError: if a setting has both its old and its new name.
    """
    given = list(keys)
    pairs = {old: new for old, new in _NEW_NAMES.items() if any(_is_at(key, old) for key in given)}
    for old, new in pairs.items():
        if any(_is_at(key, new) for key in given):
            raise ValueError(_both(origin, old, new))
    _warn(origin, pairs)
    return [_renamed(key) for key in given]


def renamed_settings(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns settings under dotted keys with new names in place of old ones; see ``renamed_keys``."""
    return dict(zip(renamed_keys(settings, origin), settings.values(), strict=True))


def rename_token_selector(spec: T) -> T | None:
    """Returns the ``token_selector`` of a decoding; ``raster`` was that of an autoregressive model, which has none."""
    return None if spec == "raster" else spec


def rename_decoding(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a file or of a ledger row with the new names in its ``decoding``."""
    decoding = content.get("decoding")
    if not isinstance(decoding, Mapping) or "token_selector" not in decoding:
        return dict(content)
    selector = rename_token_selector(decoding["token_selector"])
    return {**content, "decoding": {**decoding, "token_selector": selector}}


def rename_measurement(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of a ledger with new names: an autoregressive model was called ``sequential``."""
    renamed = rename_decoding(row)
    for column in ("model", "method"):
        if isinstance(renamed.get(column), str):
            renamed[column] = re.sub("^sequential(?=$|,)", "autoregressive", renamed[column])
    return renamed


def renamed_cluster(name: str) -> str:
    """Returns the present name of a file of ``recipes/cluster``; a name that did not change is returned as it is."""
    new = _NEW_CLUSTERS.get(name, name)
    if new != name:
        _warn("--cluster", {name: new})
    return new


def _copied(node: Any) -> Any:
    return {key: _copied(value) for key, value in node.items()} if isinstance(node, Mapping) else node


def _group(tree: dict[str, Any], key: str, *, make: bool = False) -> dict[str, Any] | None:
    """Returns the mapping at a dotted key, empty ones made on the way if asked for; None where there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.setdefault(part, {}) if make else node.get(part)
        if not isinstance(node, dict):
            return None
    return node  # type: ignore[no-any-return]  # a dict of plain values


def _is_at(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def _renamed(key: str) -> str:
    for old, new in _NEW_NAMES.items():
        if _is_at(key, old):
            return new + key.removeprefix(old)
    return key


def _both(origin: str, old: str, new: str) -> str:
    return f"{origin}: {old} is the old name of {new}, and both are given; leave {old} out"


def _warn(origin: str, pairs: Mapping[str, str]) -> None:
    if pairs:
        _warn_once(f"{origin}: " + ", ".join(f"{old} is now called {new}" for old, new in pairs.items()))


@cache
def _warn_once(text: str) -> None:
    """Warns once in a process, however often a file is read."""
    _log.warning("%s", text)

"""Translates names of version 0.1.0 to today's; the only tables of old names are here.

Names are translated where a file or a flag is read: recipe keys (recipes, flags, ``config.yaml`` of a run, settings of
a checkpoint), keys of ``config.json`` and ``store.json``, and names of tensors. All other code knows only today's
names, and checks what it reads after the translation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

__all__ = [
    "OLD_GUIDANCE_SCHEDULES",
    "drop_context_cache",
    "rename_cluster",
    "rename_config",
    "rename_decoding",
    "rename_flag",
    "rename_keys",
    "rename_measurement",
    "rename_settings",
    "rename_tensor",
    "rename_tensors",
    "rename_token_selector",
    "rename_tree",
    "restore_config",
    "restore_tensor",
]

Value = TypeVar("Value")

_log = logging.getLogger(__name__)
# Old key -> new key, of the configurations of both networks. No key of one network is an old key of the other.
_NETWORK = {
    "num_codes": "codebook_size",
    "code_width": "code_dim",
    "width": "embed_dim",
    "mlp_width": "mlp_dim",
    "channels": "base_channels",
    "multipliers": "channel_multipliers",
    "blocks_per_level": "num_res_blocks",
    "middle_blocks": "num_middle_blocks",
    "groups": "num_groups",
    "latent_width": "latent_channels",
}
# Old key -> new key, of a recipe; the keys below it move along.
_RECIPE = {
    "model.learning_rate": "model.optimizer.learning_rate",
    "model.betas": "model.optimizer.betas",
    "model.weight_decay": "model.optimizer.weight_decay",
    "model.adamw": "model.optimizer.adamw",
    "model.adversarial.r1_cost": "model.adversarial.r1_weight",
    **{f"model.network.{old}": f"model.network.{new}" for old, new in _NETWORK.items()},
}
# Old key -> new key, of ``config.json`` of a tokenizer, a transformer or both, and of ``store.json`` of tokens.
_CONFIG = {
    "num_codes": "codebook_size",
    **{f"network.{old}": f"network.{new}" for old, new in _NETWORK.items()},
}
# Old part -> new part of a tensor's name, such as ``transformer.blocks.0.mlp_hidden.weight``.
_TENSORS = {
    "words": "token_embedding",
    "positions": "position_embedding",
    "query_key_value": "qkv",
    "attention_output": "proj",
    "mlp_hidden": "fc1",
    "mlp_output": "fc2",
}
_TENSOR_PART = re.compile(rf"(?<![^./])({'|'.join(_TENSORS)})(?![^.])")  # a whole part between dots
_CLUSTERS = {"cpu": "single"}  # old file of recipes/cluster -> new file
OLD_GUIDANCE_SCHEDULES = {"column-normalised": "linear"}  # both computed the same
"""Guidance schedules of version 0.1.0 that have other names now: old name -> new name."""
# Old flag -> new flag, of all commands.
_FLAGS = {
    "--batch": "--batch-size",
    "--cas-batch": "--cas-batch-size",
    "--cas-samples": "--cas-images",
    "--cas-steps": "--cas-max-steps",
    "--flip": "--flip-probability",
    "--guidance-schedule": "--guidance",
    "--likelihood-samples": "--likelihood-images",
    "--num-ranks": "--world-size",
    "--num-samples": "--num-images",
    "--part-samples": "--part-size",
    "--plot": "--out",
    "--runs": "--runs-folder",
    "--schedule": "--schedules",
    "--selector": "--token-selector",
    "--size": "--image-size",
    "--steps": "--num-steps",
    "--temperature": "--choice-temperature",
    "--workers": "--num-workers",
}


def rename_tree(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns a tree of recipe values with new names instead of old ones, and warns once about the old ones.

    Args:
        tree: Nested mappings of plain values; it is not changed.
        origin: File or flag that the tree comes from, for messages.

    Raises:
        ValueError: if a setting has both its old and its new name.
    """
    renamed, found = _rename(tree, _RECIPE, origin)
    _warn(origin, found)
    model = renamed.get("model")
    return {**renamed, "model": drop_context_cache(model, origin)} if isinstance(model, dict) else renamed


def rename_config(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns the content of ``config.json`` or ``store.json`` with new names instead of old ones, without a warning.

    Args:
        content: The mapping that the file holds; it is not changed.
        origin: The file, for messages.

    Raises:
        ValueError: if a value has both its old and its new name.
    """
    return drop_context_cache(_rename(content, _CONFIG, origin)[0], origin)


def drop_context_cache(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns a mapping whose ``decoding`` has no ``context_cache``: earlier versions could decode approximately.

    Args:
        content: The mapping; it is not changed.
        origin: The file, for the warning about a value that was not exact.
    """
    decoding = content.get("decoding")
    if not isinstance(decoding, Mapping) or "context_cache" not in decoding:
        return dict(content)
    if decoding["context_cache"] != 1:
        _warn_once(f"{origin}: context_cache has no effect any more, decoding is exact; bfloat16 is faster")
    return {**content, "decoding": {key: value for key, value in decoding.items() if key != "context_cache"}}


def rename_keys(keys: Iterable[str], origin: str) -> list[str]:
    """Returns dotted keys of a recipe with new names instead of old ones, and warns once about the old ones.

    Args:
        keys: Dotted keys of one origin, such as ``model.learning_rate.peak``.
        origin: File or command that the keys come from, for messages.

    Raises:
        ValueError: if a setting has both its old and its new name.
    """
    given = list(keys)
    pairs = {old: new for old, new in _RECIPE.items() if any(_is_at(key, old) for key in given)}
    for old, new in pairs.items():
        if any(_is_at(key, new) for key in given):
            raise ValueError(_format_clash(origin, old, new))
    _warn(origin, pairs)
    return [_rename_key(key) for key in given]


def rename_settings(settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Returns settings by dotted keys with new names instead of old ones; see ``rename_keys``."""
    return dict(zip(rename_keys(settings, origin), settings.values(), strict=True))


def rename_token_selector(spec: Value) -> Value | None:
    """Returns the ``token_selector`` of a decoding; ``raster`` was that of an autoregressive model, which has none."""
    return None if spec == "raster" else spec


def rename_decoding(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a file or of a ledger row with the new names in its ``decoding``."""
    decoding = content.get("decoding")
    if not isinstance(decoding, Mapping) or "token_selector" not in decoding:
        return dict(content)
    selector = rename_token_selector(decoding["token_selector"])
    kept = {key: value for key, value in decoding.items() if (key, value) != ("context_cache", 1)}  # 1 was exact
    return {**content, "decoding": {**kept, "token_selector": selector}}


def rename_measurement(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of a ledger with new names: an autoregressive model was called ``sequential``."""
    renamed = rename_decoding(row)
    for column in ("model", "method"):
        if isinstance(renamed.get(column), str):
            renamed[column] = re.sub("^sequential(?=$|,)", "autoregressive", renamed[column])
    return renamed


def rename_cluster(name: str) -> str:
    """Returns the present name of a file of ``recipes/cluster``; a name that did not change is returned as it is."""
    new = _CLUSTERS.get(name, name)
    if new != name:
        _warn("--cluster", {name: new})
    return new


def rename_flag(flag: str, command: str) -> str:
    """Returns the present name of a flag of a command; a name that did not change is returned as it is."""
    if command == "train-classifier" and flag == "--steps":  # training steps; elsewhere they are decoding steps
        return "--max-steps"
    return _FLAGS.get(flag, flag)


def rename_tensor(name: str) -> str:
    """Returns the new name of a tensor; other names are returned as they are.

    Args:
        name: Name in a state dict, or a place in a checkpoint such as ``/state_dict/transformer.words.weight``.
    """
    return _TENSOR_PART.sub(lambda match: _TENSORS[match[1]], name)


def rename_tensors(tensors: Mapping[str, Value], origin: str) -> dict[str, Value]:
    """Returns a mapping of tensors with new names instead of old ones.

    Args:
        tensors: Values, such as tensors or headers, by the names in a file.
        origin: The file, for messages.

    Raises:
        ValueError: if a tensor has both its old and its new name.
    """
    renamed: dict[str, Value] = {}
    for name, value in tensors.items():
        new = rename_tensor(name)
        if new in renamed or (new != name and new in tensors):
            raise ValueError(f"{origin}: tensor {new} must occur once, got it by its old name too")
        renamed[new] = value
    return renamed


_NEW_FIELDS = (  # of networks, with the only behavior of version 0.1.0
    ("backbone", "bert"),
    ("condition_dim", 0),
    ("num_token_groups", 1),
    ("middle_attention", True),
    ("signed_images", True),
)


def restore_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a network's configuration by their names in version 0.1.0.

    Digests that identify a model in ledgers and file names are made of these, so that they stay valid. Fields that the
    version did not have are left out if their value is what the version did.
    """
    old_names = {new: old for old, new in _NETWORK.items()}
    kept = {name: value for name, value in config.items() if (name, value) not in _NEW_FIELDS}
    return {old_names.get(name, name): value for name, value in kept.items()}


def restore_tensor(name: str) -> str:
    """Returns the name of a tensor in version 0.1.0, of which digests of weights are made; see ``restore_config``."""
    old_parts = {new: old for old, new in _TENSORS.items()}
    return ".".join(old_parts.get(part, part) for part in name.split("."))


def _rename(tree: Mapping[str, Any], names: Mapping[str, str], origin: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Renames dotted keys of a tree.

    Returns:
        A copy of the tree, and the old keys that it had with their new names.

    Raises:
        ValueError: if a value has both names.
    """
    renamed: dict[str, Any] = _copy(tree)
    found = {}
    for old, new in names.items():
        group, leaf = _split(old)
        holder = _group(renamed, group)
        if holder is None or leaf not in holder:
            continue
        found[old] = new
        # The new place may be in a group that the tree does not have yet.
        new_group, new_leaf = _split(new)
        new_holder = _group(renamed, new_group, make=True)
        if new_holder is None or new_leaf in new_holder:
            raise ValueError(_format_clash(origin, old, new))
        new_holder[new_leaf] = holder.pop(leaf)
    return renamed, found


def _copy(node: Any) -> Any:
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, Mapping) else node


def _split(key: str) -> tuple[list[str], str]:
    *group, leaf = key.split(".")
    return group, leaf


def _group(tree: dict[str, Any], parts: Iterable[str], *, make: bool = False) -> dict[str, Any] | None:
    """Returns the mapping at the parts of a dotted key, or None. With ``make``, missing mappings are added."""
    node: Any = tree
    for part in parts:
        node = node.setdefault(part, {}) if make else node.get(part)
        if not isinstance(node, dict):
            return None
    return node  # type: ignore[no-any-return]  # a dict of plain values


def _is_at(key: str, group: str) -> bool:
    return key == group or key.startswith(f"{group}.")


def _rename_key(key: str) -> str:
    for old, new in _RECIPE.items():
        if _is_at(key, old):
            return new + key.removeprefix(old)
    return key


def _format_clash(origin: str, old: str, new: str) -> str:
    return f"{origin}: {old} is the old name of {new}, and both are given; leave {old} out"


def _warn(origin: str, pairs: Mapping[str, str]) -> None:
    if pairs:
        _warn_once(f"{origin}: " + ", ".join(f"{old} is now called {new}" for old, new in pairs.items()))


@cache
def _warn_once(text: str) -> None:
    """Warns once per process, also if a file is read again."""
    _log.warning("%s", text)

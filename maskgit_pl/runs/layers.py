"""Layers of recipe values from files and flags: checked against a schema, and merged. Used by ``Recipe``.

A flag overrides one value by its dotted key: ``--KEY=VALUE``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from maskgit_pl.checks import Schema, describe, fits, shorten
from maskgit_pl.files import NO_CODE, check_plain, parse_yaml

__all__ = [
    "DEFAULT_BACKBONE",
    "DERIVED_KEYS",
    "Layer",
    "Overrides",
    "check_layer",
    "flag_layer",
    "flag_words",
    "merge",
    "remove_key",
    "split_flags",
    "value_at",
]

DEFAULT_BACKBONE = "bert"
"""The backbone of recipes that name none; ``networks.backbone`` has the same."""

DERIVED_KEYS = {
    "model.seed": "data.seed",
    "model.image_size": "data.image_size",
    "model.network.in_channels": "data.in_channels",
    "model.global_batch": "data.global_batch",
    "model.accumulation": "data.global_batch and data.max_batch_per_device",
}
"""Keys of modules that no recipe can set, each with the key that determines it."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Overrides of single recipe values: flags, or a mapping of dotted keys."""

_COMMON = (  # keys of all backbones
    "codebook_size",
    "num_classes",
    "grid",
    "class_dropout",
    "dropout",
    "condition_dim",
    "num_token_groups",
)
_STEPS = "runs are counted in steps; set trainer.max_steps"
_REASONS = {  # keys that users of Lightning expect -> the reason why a recipe has no such key
    **{key: f"it follows {other}" for key, other in DERIVED_KEYS.items()},
    "trainer.max_epochs": _STEPS,
    "trainer.min_epochs": _STEPS,
    "trainer.min_steps": _STEPS,
    "trainer.fast_dev_run": _STEPS,
    "trainer.max_time": "end a run with SIGTERM or the job's time limit: it saves, and the same command resumes it",
    "trainer.check_val_every_n_epoch": "set trainer.val_check_interval, in steps",
    "trainer.accumulate_grad_batches": "it follows data.global_batch and data.max_batch_per_device",
    "trainer.default_root_dir": "use --runs-folder and --run",
    "trainer.enable_checkpointing": "set checkpoint_every, keep_last and keep_every",
    "trainer.use_distributed_sampler": "the data module divides the samples among the ranks",
    "trainer.logger": "name the loggers with the key loggers, such as loggers: [tensorboard, csv]",
    "trainer.callbacks": "name the callbacks with the key callbacks, such as callbacks: [device_stats]",
    "trainer.plugins": f"{NO_CODE}; plugins require your own Trainer in Python",
    "trainer.profiler": "name it with the key profiler, such as profiler: simple",
}


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


def flag_words(overrides: Overrides) -> tuple[str, ...]:
    """Returns overrides as flags. Python values become JSON, which is also YAML."""
    if isinstance(overrides, Mapping):
        return tuple(f"--{key}={json.dumps(value, default=str)}" for key, value in overrides.items())
    return tuple(overrides)


def split_flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the text of each flag.

    Raises:
        ValueError: if a word is not a flag, or a flag has no value.
    """
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if not re.fullmatch(r"--[A-Za-z_][\w.]*(=.*)?", word, re.DOTALL):
            raise ValueError(f"unrecognized argument {shorten(word)}; recipe values are set with --KEY=VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not waiting or waiting[-1].startswith("--"):
                raise ValueError(f"flag --{key} must have a value")
            text = waiting.pop()
        yield key, text


def flag_layer(key: str, text: str, schema: Schema) -> Layer:
    """Returns the layer of one flag.

    The text is parsed as YAML if the result fits the type of the key. Otherwise it is the value itself, so that a path
    may be named ``[a``.

    Raises:
        ValueError: if the text is not a safe value.
    """
    own = _schema_at(schema, key.split("."))  # None for an unknown key, which check_layer reports
    try:
        value = parse_yaml(text)
        check_plain(value, key)
    except ValueError:
        if own is None or not fits(text, own):
            raise
        value = text
    # For example a name such as `on`, which YAML reads as a bool.
    if own is not None and not fits(value, own) and fits(text, own):
        value = text
    # a.b.c = value becomes {a: {b: {c: value}}}.
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_plain(tree)
    return Layer(f"flag --{key}", tree)


def check_layer(layer: Layer, schema: Schema) -> None:
    """Checks the keys and types of a layer against a schema.

    Raises:
        ValueError: if a key is unknown or cannot be set, or its value has a wrong type. The message names the origin,
            the key, and the closest known key.
    """
    try:
        _check_tree(layer.tree, schema, schema)
    except ValueError as error:
        is_named = layer.origin.startswith("flag --") and str(error).startswith(layer.origin[7:])
        raise ValueError(f"flag --{error}" if is_named else f"{layer.origin}: {error}") from error


def _check_tree(node: Any, schema: Schema, root: Schema, path: str = "") -> None:
    """Checks the keys and types of a part of a tree; see ``check_layer``."""
    group = _group(schema)
    if isinstance(node, dict) and "name" in node and _takes_spec(schema):
        return  # a registered object with its own keys, which building it will check
    if isinstance(node, dict) and group is not None:
        for key, value in node.items():
            where = f"{path}.{key}" if path else key
            is_open = _is_open(schema) and isinstance(key, str)
            if where in DERIVED_KEYS or (key not in group and not is_open):
                raise ValueError(_explain_unknown_key(where, root))
            _check_tree(value, group.get(key, {}), root, where)
    elif isinstance(node, dict) and "name" not in node and _takes_spec(schema):
        return  # arguments of an object that an earlier layer names
    elif not fits(node, schema):
        raise ValueError(f"{path} must be {describe(schema)}, got {shorten(node)}")


def _explain_unknown_key(key: str, root: Schema) -> str:
    if key in _REASONS:
        return f"{key} cannot be set: {_REASONS[key]}"
    group, _, leaf = key.rpartition(".")
    known = [name for name in _keys(root) if name not in DERIVED_KEYS]
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    # First candidates: similar names in the same group.
    close = [beside[each] for each in get_close_matches(leaf, beside, n=1)]
    # Second: the same name in another group.
    close += [name for name in known if name.rpartition(".")[2] == leaf]
    kind = (_schema_at(root, group.split(".")) or {}).get("title", "")
    if kind.startswith("backbone"):
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}: {hint}keys of {kind}: {', '.join(sorted(beside))}"
    if not close:
        return f"unknown key {key!r}; base.yaml of recipes/tokenizer and recipes/transformer shows the keys"
    if key in close:  # a key with dots in a file
        nested = key.replace(".", ": {") + ": ..." + "}" * key.count(".")
        return f"unknown key {key!r}: keys of a file are nested, as in {nested}; dots are for flags"
    return f"unknown key {key!r}: did you mean {close[0]!r}?"


def _schema_at(schema: Schema, parts: Sequence[str]) -> Schema | None:
    """Returns the schema of a key: None if unknown, ``{}`` for the arguments of a registered object."""
    for part in parts:
        group = _group(schema)
        if group is None:
            return {} if _takes_spec(schema) else None
        if part not in group:
            return {} if _is_open(schema) else None
        schema = group[part]
    return schema


def _keys(schema: Schema, path: str = "") -> Iterator[str]:
    """Yields the dotted keys of all values."""
    for key, each in (_group(schema) or {}).items():
        where = f"{path}.{key}" if path else key
        yield where
        yield from _keys(each, where)


def _group(schema: Schema) -> Mapping[str, Schema] | None:
    """Returns the schemas of the keys of a group (which may be optional), or None for a value."""
    for each in (schema, *schema.get("anyOf", ())):
        if "properties" in each:
            properties: Mapping[str, Schema] = each["properties"]
            return properties
    return None


def _takes_spec(schema: Schema) -> bool:
    """Returns True if a value specifies a registered object, by name or as a mapping."""
    return any(each.get("type") == "object" and "properties" not in each for each in schema.get("anyOf", (schema,)))


def _is_open(schema: Schema) -> bool:
    """Returns True if a group may have keys that the schema does not know, such as those of a plug-in."""
    return schema.get("additionalProperties") is True or (_group(schema) is not None and _takes_spec(schema))

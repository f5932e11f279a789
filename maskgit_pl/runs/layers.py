"""Layers of recipe values from files and flags, and their merge. Used by ``Recipe``.

A flag overrides one value by its dotted key: ``--KEY=VALUE``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from maskgit_pl.checks import shorten
from maskgit_pl.files import NO_CODE, check_plain, parse_yaml

__all__ = [
    "DEFAULT_BACKBONE",
    "DERIVED_KEYS",
    "Kind",
    "Layer",
    "Overrides",
    "explain_unknown_key",
    "flag_layer",
    "flag_words",
    "merge",
    "remove_key",
    "split_flags",
    "value_at",
]

Kind = Literal["tokenizer", "transformer", "autoregressive"]
"""The kinds of modules that a recipe trains."""

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
        readings: Other trees that the text of a flag may mean, if the first does not fit the type of its key.
        fault: The reason why the text of a flag is not YAML.
    """

    origin: str
    tree: Mapping[str, Any]
    readings: tuple[Mapping[str, Any], ...] = ()
    fault: str | None = None


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


def flag_layer(key: str, text: str) -> Layer:
    """Returns the layer of one flag, whose text is YAML.

    A name such as ``on``, which YAML reads as a bool, and a path such as ``[a`` are strings where the key takes one; a
    single item is the list of this item where the key takes a list.
    """
    readings: list[Any] = [text]
    fault = None
    try:
        value = parse_yaml(text)
        check_plain(value, key)
        readings = [value, *([text] if value != text else []), [value]]
    except ValueError as error:
        fault = str(error)
    trees = []
    for reading in readings:
        # a.b.c = value becomes {a: {b: {c: value}}}.
        tree: Any = reading
        for part in reversed(key.split(".")):
            tree = {part: tree}
        trees.append(tree)
    check_plain(trees[0])
    return Layer(f"flag --{key}", trees[0], tuple(trees[1:]), fault)


def explain_unknown_key(key: str, known: Sequence[str], *, backbone: str) -> str:
    """Returns the message for a key that a recipe cannot have.

    Args:
        key: The dotted key.
        known: All dotted keys of the recipe.
        backbone: Name of the backbone, whose keys ``model.network`` has; empty for stage 1.
    """
    if key in _REASONS:
        return f"{key} cannot be set: {_REASONS[key]}"
    group, _, leaf = key.rpartition(".")
    known = [name for name in known if name not in DERIVED_KEYS]
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    # First candidates: similar names in the same group.
    close = [beside[each] for each in get_close_matches(leaf, beside, n=1)]
    # Second: the same name in another group.
    close += [name for name in known if name.rpartition(".")[2] == leaf]
    if backbone and group == "model.network":
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}: {hint}keys of backbone {backbone}: {', '.join(sorted(beside))}"
    if not close:
        return f"unknown key {key!r}; base.yaml of recipes/tokenizer and recipes/transformer shows the keys"
    if key in close:  # a key with dots in a file
        nested = key.replace(".", ": {") + ": ..." + "}" * key.count(".")
        return f"unknown key {key!r}: keys of a file are nested, as in {nested}; dots are for flags"
    return f"unknown key {key!r}: did you mean {close[0]!r}?"

"""Recipes: YAML files and flags of a run, read safely and merged once into one tree of plain values.

Merge order: base, data set, RECIPE from left to right, cluster; flags come last. A recipe is data: it holds numbers,
words, lists and mappings under known keys, names registered things, and is never parsed a second time, so that no value
can name a class, a function or another file to be read. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from maskgit_pl.checks import shorten
from maskgit_pl.old_names import renamed_keys, renamed_tree
from maskgit_pl.runs.recipe_schema import Kind, load_schema
from maskgit_pl.registry import nearest
from maskgit_pl.schema import Schema, describe, fits

__all__ = [
    "DEFAULT_DATASET",
    "STAGES",
    "Layer",
    "Plan",
    "Recipe",
    "Stage",
    "merged",
    "read_run_config",
    "read_yaml",
    "recipe_files",
    "recipes_folder",
]

Stage = Literal["tokenizer", "transformer"]

STAGES: tuple[Stage, ...] = ("tokenizer", "transformer")
DEFAULT_DATASET = "fashion-mnist"
_MAX_BYTES = 200_000  # PyYAML reads about 200 kB a second
_MAX_DEPTH = 16

_FOLLOWS = {  # keys of a module that other keys decide
    "model.seed": "data.seed",
    "model.image_size": "data.image_size",
    "model.network.in_channels": "data.in_channels",
    "model.global_batch": "data.global_batch",
    "model.accumulation": "data.global_batch and data.max_batch_per_device",
}
_CODE = "recipes name registered things, never classes"
_STEPS = "runs are counted in steps; set trainer.max_steps"
_REASONS = {  # keys that Lightning's users look for, and why no recipe has them
    **{key: f"it follows {other}" for key, other in _FOLLOWS.items()},
    "trainer.max_epochs": _STEPS,
    "trainer.min_epochs": _STEPS,
    "trainer.min_steps": _STEPS,
    "trainer.fast_dev_run": _STEPS,
    "trainer.max_time": "end a run with SIGTERM or the job's time limit: it saves, and the same command resumes it",
    "trainer.check_val_every_n_epoch": "set trainer.val_check_interval, in steps",
    "trainer.accumulate_grad_batches": "it follows data.global_batch and data.max_batch_per_device",
    "trainer.default_root_dir": "use --runs and --run (make: RUN=)",
    "trainer.enable_checkpointing": "set checkpoint_every, keep_last and keep_every",
    "trainer.use_distributed_sampler": "the data module shares the samples out over the ranks",
    "trainer.logger": f"{_CODE}; runs log to TensorBoard, and other loggers take a Trainer of your own in Python",
    "trainer.callbacks": f"{_CODE}; callbacks take a Trainer of your own in Python",
    "trainer.plugins": f"{_CODE}; plugins take a Trainer of your own in Python",
    "trainer.profiler": f"{_CODE}; a profiler takes a Trainer of your own in Python",
}
# Keys without a meaning for a transformer with causal attention: it masks nothing, and draws one token after another.
_MASKED_ONLY = (
    "model.mask_schedule",
    "model.min_mask_ratio",
    "model.decoding.num_steps",
    "model.decoding.token_selector",
    "model.decoding.tokens_per_step",
    "model.decoding.mask_schedule",
    "model.decoding.context_cache",
)


@dataclass(frozen=True)
class Layer:
    """Values of one origin.

    Args:
        origin: File or flag, for messages.
        tree: Nested mappings of plain values.
    """

    origin: str
    tree: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """The values of a run: those of its files, then those of its flags. Later layers win.

    Args:
        stage: Stage that is trained.
        kind: Kind of module that it trains, as files and flags together say.
        files: Layers of the files in merge order, without ``left_out``.
        flags: Layers of the flags in the order in which they were given.
        words: The flags as they were given.
        left_out: Keys of each file that were dropped, since they have no meaning under causal attention.
    """

    stage: Stage
    kind: Kind
    files: tuple[Layer, ...]
    flags: tuple[Layer, ...] = ()
    words: tuple[str, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, stage: Stage, files: Iterable[Path], words: Sequence[str] = ()) -> Recipe:
        """Reads, checks and merges files and flags.

        Args:
            stage: Stage that is trained.
            files: Recipe files in merge order.
            words: Flags, ``--KEY=VALUE`` or ``--KEY VALUE`` with dotted keys.

        Raises:
            ValueError: if a file is not a safe recipe, a key is unknown or has a value of another type, or a flag has
                no meaning for the model. The message names file or flag and key.
        """
        return cls.of(stage, [Layer(f"recipe {file}", read_yaml(file)) for file in files], words)

    @classmethod
    def of(cls, stage: Stage, files: Sequence[Layer], words: Sequence[str] = ()) -> Recipe:
        """Checks and merges layers that are read already; see ``read``."""
        kind = _kind(stage, files, words)
        left_out: dict[str, list[str]] = {}
        if kind == "autoregressive":
            files, left_out = _without_masking(files)
        schema = load_schema(kind)
        for layer in files:
            _check_layer(layer, schema)
        return cls(stage, kind, tuple(files), left_out=left_out).with_flags(words)

    def with_flags(self, words: Sequence[str]) -> Recipe:
        """Returns the recipe with further flags, checked as in ``read``."""
        schema = load_schema(self.kind)
        given = list(_flags(words))
        keys = renamed_keys((key for key, _ in given), "flags")
        added = [_flag_layer(key, text, schema) for key, (_, text) in zip(keys, given, strict=True)]
        for layer in added:
            if self.kind == "autoregressive":
                _refuse_masking(layer)
            _check_layer(layer, schema)
        return replace(self, flags=(*self.flags, *added), words=(*self.words, *words))

    @cached_property
    def tree(self) -> dict[str, Any]:
        """All values as one tree."""
        return merged([layer.tree for layer in (*self.files, *self.flags)])

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key such as ``data.source``; None where nothing says it."""
        return _value(self.tree, key)

    @property
    def names(self) -> str:
        """The files, for people."""
        return " + ".join("/".join(Path(layer.origin).with_suffix("").parts[-2:]) for layer in self.files)


@dataclass(frozen=True)
class Plan:
    """A stage of a run as its command names it, with what the checks before it have found.

    Args:
        recipe: Its values, and the stage.
        shards: Data folder.
        folder: ``runs/RUN``; the stage's own folder is in it.
        tokenizer: Pretrained tokenizer folder, for stage 2.
        pretrained: Pretrained folder of this stage whose weights a new run starts from, and whose sizes it takes.
    """

    recipe: Recipe
    shards: Path
    folder: Path
    tokenizer: Path | None = None
    pretrained: Path | None = None

    @property
    def stage(self) -> Stage:
        """The stage that is trained."""
        return self.recipe.stage

    @property
    def stage_folder(self) -> Path:
        """``runs/RUN/STAGE``: checkpoints, logs and records of the stage."""
        return self.folder / self.stage

    @property
    def checkpoints(self) -> Path:
        """``runs/RUN/STAGE/checkpoints``."""
        return self.stage_folder / "checkpoints"


def recipes_folder() -> Path:
    """Returns ``recipes/`` of the working directory, else the copy that was installed with the package.

    Raises:
        FileNotFoundError: if neither is there.
    """
    candidates = (Path("recipes"), Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes")
    for folder in candidates:
        if (folder / "transformer" / "base.yaml").is_file():
            return folder
    raise FileNotFoundError("recipes: no folder recipes/ here; run from the repository, or reinstall maskgit_pl")


def recipe_files(stage: Stage, *, dataset: str, names: Iterable[str], cluster: str) -> list[Path]:
    """Finds the files of a run in merge order.

    Args:
        stage: Stage whose recipes are taken.
        dataset: Its file is ``<dataset>.yaml``; without one, ``own-images.yaml``. The default data set's is the base.
        names: RECIPE, from left to right. A name must be a recipe of some stage; this stage takes those it has.
        cluster: A file of ``recipes/cluster``.

    Raises:
        FileNotFoundError: if no stage has a recipe of a name. The message lists the names and the closest one.
    """
    folder = recipes_folder()
    files = [folder / stage / "base.yaml"]
    if dataset != DEFAULT_DATASET:
        own = folder / stage / f"{dataset}.yaml"
        files.append(own if own.is_file() else folder / stage / "own-images.yaml")
    for name in names:
        homes = [each for each in STAGES if (folder / each / f"{name}.yaml").is_file()]
        if not homes:
            known = {file.stem for each in STAGES for file in (folder / each).glob("*.yaml")}
            raise FileNotFoundError(f"recipe {name!r}: no such file in {folder}: {nearest(name, known)}")
        if stage in homes:
            files.append(folder / stage / f"{name}.yaml")
    on = folder / "cluster" / f"{cluster}.yaml"
    if not on.is_file():
        known = {file.stem for file in on.parent.glob("*.yaml")}
        raise FileNotFoundError(f"cluster {cluster!r}: no such file in {on.parent}: {nearest(cluster, known)}")
    return [*files, on]


# Reading


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases (a few bytes can unfold to gigabytes) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML is untyped
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed in recipes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            fault = "is not a word" if not isinstance(key, str) else "stands twice" if key in seen else None
            if fault is not None:
                text = f"the key {shorten(key)} {fault}"
                raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
            seen.add(key)
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made


_PlainLoader.add_implicit_resolver(  # YAML 1.2's floats: 1e-3 is a number, too
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML file as plain values; keys of version 0.1.0 get their new names.

    Raises:
        ValueError: if it is over 200 kB, not YAML, nested too deep, not a mapping, or holds an alias, a repeated key, a
            number that is not finite, a value that is not plain, a key that names code, or a key and its old name. The
            message is one line.
    """
    if file.exists() and not file.is_file():  # a FIFO would be waited for
        raise ValueError(f"recipe {file} must be a regular file")
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"recipe {file} must have at most {_MAX_BYTES} bytes, got {file.stat().st_size}")
    try:
        tree = _parse(file.read_text(encoding="utf-8"))
        if tree is not None and not isinstance(tree, dict):
            raise ValueError(f"a mapping is needed, got {shorten(tree)}")
        _check_plain(tree)
    except ValueError as error:
        raise ValueError(f"recipe {file}: {error}") from error
    return renamed_tree(tree or {}, f"recipe {file}")


def read_run_config(file: Path) -> dict[str, Any]:
    """Reads ``config.yaml`` of a run as a recipe: without paths, which a command names, and without derived keys.

    Files of version 0.1.0 hold all settings of Lightning's Trainer; those that no recipe has are dropped.

    Raises:
        ValueError: as ``read_yaml``, or if it is not the configuration of a run.
    """
    tree = read_yaml(file)
    if not all(isinstance(tree.get(group), dict) for group in ("data", "model", "trainer")):
        raise ValueError(f"{file} must be config.yaml of a run, with the keys data, model and trainer")
    known = load_schema("tokenizer")["properties"]["trainer"]["properties"]
    tree["trainer"] = {key: value for key, value in tree["trainer"].items() if key in known}
    tree.pop("seed_everything", None)
    for key in (*_FOLLOWS, "data.path", "data.token_store", "model.tokenizer"):
        _take_out(tree, key.split("."))
    return tree


def _parse(text: str) -> Any:
    """Parses YAML; all that can go wrong is a ValueError of one line."""
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{place}{getattr(error, 'problem', None) or ' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (UnicodeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _check_plain(node: Any, path: str = "", depth: int = 0) -> None:
    """Refuses what is not plain data: other types, numbers that are not finite, keys that name code.

    Raises:
        ValueError: The key is named.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{path[:80]}: it is nested too deep")
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key in ("class_path", "init_args"):
                raise ValueError(f"{where} cannot be set: {_CODE}")
            _check_plain(value, where, depth + 1)
    elif isinstance(node, list):
        for item in node:
            _check_plain(item, path, depth + 1)
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{path} must be finite, got {node}")
    elif not isinstance(node, str | int | float | bool | None):
        raise ValueError(f"{path} must be a number, a word, a list or a mapping, got {shorten(node)}; quote it")


# Flags


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and text of each flag.

    Raises:
        ValueError: A word that is no flag, or a flag without a value.
    """
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if not re.fullmatch(r"--[A-Za-z_][\w.]*(=.*)?", word, re.DOTALL):
            raise ValueError(f"unrecognized argument {shorten(word)}; a value of a recipe is set by --KEY=VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not waiting or waiting[-1].startswith("--"):
                raise ValueError(f"flag --{key} must have a value")
            text = waiting.pop()
        yield key, text


def _flag_layer(key: str, text: str, schema: Schema) -> Layer:
    """The layer of one flag. Text is YAML where the key takes what it means, and the text itself otherwise."""
    own = _schema_at(schema, key.split("."))
    try:
        value = _parse(text)
        _check_plain(value, key)
    except ValueError:
        if own is None or not fits(text, own):
            raise
        value = text
    if own is not None and not fits(value, own) and fits(text, own):
        value = text
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    _check_plain(tree)
    origin = f"flag --{key}"
    return Layer(origin, renamed_tree(tree, origin))


# Checking


def _check_layer(layer: Layer, schema: Schema) -> None:
    try:
        _check_tree(layer.tree, schema, schema)
    except ValueError as error:
        is_named = layer.origin.startswith("flag --") and str(error).startswith(layer.origin[7:])
        raise ValueError(f"flag --{error}" if is_named else f"{layer.origin}: {error}") from error


def _check_tree(node: Any, schema: Schema, root: Schema, path: str = "") -> None:
    """Compares keys and types of a tree with a schema.

    Raises:
        ValueError: An unknown key, with the nearest; or a value of another type.
    """
    group = _group(schema)
    if isinstance(node, dict) and group is not None:
        for key, value in node.items():
            where = f"{path}.{key}" if path else key
            if where in _FOLLOWS or key not in group:
                raise ValueError(_unknown(where, root))
            _check_tree(value, group[key], root, where)
    elif isinstance(node, dict) and "name" not in node and _takes_spec(schema):
        return  # further arguments of what an earlier layer names
    elif not fits(node, schema):
        raise ValueError(f"{path} must be {describe(schema)}, got {shorten(node)}")


def _unknown(key: str, root: Schema) -> str:
    if key in _REASONS:
        return f"{key} cannot be set: {_REASONS[key]}"
    group, _, leaf = key.rpartition(".")
    known = [name for name in _keys(root) if name not in _FOLLOWS]
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    close = [beside[each] for each in get_close_matches(leaf, beside, n=1)]
    close += [name for name in known if name.rpartition(".")[2] == leaf]  # the right word in another group
    if not close:
        return f"unknown key {key!r}; base.yaml of recipes/tokenizer and recipes/transformer shows the keys"
    return f"unknown key {key!r}: did you mean {close[0]!r}?"


def _group(schema: Schema) -> Mapping[str, Schema] | None:
    """The properties of a group of keys, optional groups included; None for a value."""
    for each in (schema, *schema.get("anyOf", ())):
        if "properties" in each:
            properties: Mapping[str, Schema] = each["properties"]
            return properties
    return None


def _takes_spec(schema: Schema) -> bool:
    """Returns whether a value names a registered thing, or spells it out as a mapping."""
    return any(each.get("type") == "object" and "properties" not in each for each in schema.get("anyOf", (schema,)))


def _schema_at(schema: Schema, parts: Sequence[str]) -> Schema | None:
    """The schema of a key; None for an unknown one; any value for arguments of what is named."""
    for part in parts:
        group = _group(schema)
        if group is None:
            return {} if _takes_spec(schema) else None
        if part not in group:
            return None
        schema = group[part]
    return schema


def _keys(schema: Schema, path: str = "") -> Iterator[str]:
    """Dotted keys of all values."""
    for key, each in (_group(schema) or {}).items():
        where = f"{path}.{key}" if path else key
        yield where
        yield from _keys(each, where)


# Merging


def merged(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges trees, later over earlier, mapping by mapping.

    A mapping with the key ``name`` spells a registered thing out and replaces what was there; one without it adds
    arguments to what an earlier tree names.
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            result[key] = _laid_over(result.get(key), value)
    return result


def _laid_over(old: Any, new: Any) -> Any:
    if not isinstance(new, Mapping):
        return new
    if "name" in new:
        return dict(new)
    if isinstance(old, str):
        return {"name": old, **new}
    return merged([old if isinstance(old, Mapping) else {}, new])


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


# Causal attention


def _kind(stage: Stage, files: Sequence[Layer], words: Sequence[str]) -> Kind:
    """Which module the files and flags are for."""
    attention = _value(merged([layer.tree for layer in files]), "model.network.attention")
    for key, text in _flags(words):
        attention = text if key == "model.network.attention" else attention
    if stage == "tokenizer":
        return "tokenizer"
    return "autoregressive" if attention == "causal" else "transformer"


def _without_masking(files: Sequence[Layer]) -> tuple[list[Layer], dict[str, list[str]]]:
    """Layers without the keys that causal attention has no use for, and those keys by origin."""
    kept, left_out = [], {}
    for layer in files:
        tree = merged([layer.tree])
        keys = [key for key in _MASKED_ONLY if _take_out(tree, key.split("."))]
        kept.append(Layer(layer.origin, tree))
        if keys:
            left_out[layer.origin] = keys
    return kept, left_out


def _take_out(node: Any, path: list[str]) -> bool:
    """Removes a key; returns whether it was there."""
    if len(path) > 1:
        return isinstance(node, dict) and _take_out(node.get(path[0]), path[1:])
    return isinstance(node, dict) and node.pop(path[0], _take_out) is not _take_out


def _refuse_masking(layer: Layer) -> None:
    for key in _MASKED_ONLY:
        if _value(layer.tree, key) is not None:
            raise ValueError(
                f"{layer.origin}: with causal attention no token is masked, and tokens are drawn one after another; "
                f"{key} is for bidirectional attention; leave the flag out"
            )

"""The recipe of a run: the values of its files and flags, checked and merged into one tree of plain values.

Merge order: base, data set, RECIPE from left to right, cluster, flags. Each file and each flag is a ``Layer``. A recipe
is only data: numbers, strings, lists and mappings with known keys, and names of registered objects. It is parsed
exactly once, so that no value can name a class, a function or another file to read. The ``config.yaml`` of an earlier
run is also a recipe.

A flag overrides one value by its dotted key: ``--KEY=VALUE``. Other flags of commands hold numbers, names or
mappings: their parsers, at the end of this file, take the name of the flag, for errors, and its text.

Imports no torch at its top: ``resolve``, which owns types and ranges, is imported when a recipe is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from maskgit_pl.checks import WrongValue
from maskgit_pl.files import check_plain, parse_yaml, read_yaml
from maskgit_pl.registry import nearest
from maskgit_pl.text import shorten

Stage = Literal["tokenizer", "transformer"]
Kind = Literal["tokenizer", "transformer", "autoregressive", "distillation"]
"""The kinds of modules that a recipe trains."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Overrides of single recipe values: flags, or a mapping of dotted keys."""

STAGES: tuple[Stage, ...] = ("tokenizer", "transformer")
DEFAULT_DATASET = "fashion-mnist"
DERIVED_KEYS = {
    "model.seed": "data.seed",
    "model.image_size": "data.image_size",
    "model.network.in_channels": "data.in_channels",
    "model.global_batch": "data.global_batch",
    "model.accumulation": "data.global_batch and data.max_batch_per_device",
}
"""Keys of modules that no recipe can set, each with the key that determines it."""
_PATHS = ("data.path", "data.token_store", "model.tokenizer")
_HABITS = {"epochs": "max_steps", "max_epochs": "max_steps", "lr": "peak", "batch_size": "global_batch"}  # here
_COMMAND_PATHS = {"data": {"path": "", "token_store": ""}}  # in place of the paths that a command sets


@dataclass(frozen=True)
class Layer:
    """The values of one file or flag.

    Args:
        origin: Name of the file or flag, for messages.
        tree: Nested mappings of plain values.
    """

    origin: str
    tree: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """The values of a run from its files and flags. Made by ``read``.

    Args:
        stage: Stage to train.
        kind: Kind of module, as decided by files and flags.
        base: Merged values of the files; with causal attention without the keys of masking.
        flags: Values of each flag, in the given order.
        words: The flags as given.
        names: RECIPE: file names from left to right, without the files of every recipe.
        dataset: Name of the data set.
        cluster: File of ``recipes/cluster``; empty if the recipe repeats a run.
        config: Configuration of the repeated run, if any.
        run_name: Default name of the run, ``DATASET-RECIPE``; None if the recipe repeats a run.
        paths: Paths of the repeated run by key (``data.path``, ``model.tokenizer``); empty otherwise.
    """

    stage: Stage
    kind: Kind
    base: Mapping[str, Any]
    flags: tuple[Mapping[str, Any], ...] = ()
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    dataset: str = DEFAULT_DATASET
    cluster: str = ""
    config: Path | None = None
    run_name: str | None = None
    paths: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        stage: Stage,
        *,
        names: str | Iterable[str] = (),
        dataset: str = DEFAULT_DATASET,
        cluster: str = "single",
        overrides: Overrides = (),
    ) -> Recipe:
        """Reads a recipe by the names of its files.

        Args:
            stage: Stage to train.
            names: RECIPE, from left to right: names or paths, or a string of them separated by spaces.
            dataset: Name of the data set.
            cluster: A file of ``recipes/cluster``.
            overrides: Overrides: a mapping of dotted keys, or flags ``--KEY=VALUE`` or ``--KEY VALUE``.

        Raises:
            FileNotFoundError: if a recipe does not exist. The message names the closest one.
            ValueError: if a file is not a safe recipe, a key is unknown or has a value of a wrong type, or a
                flag has no meaning for the model. The message names the file or flag, and the key.
        """
        names = names.split() if isinstance(names, str) else list(names)
        files = recipe_files(stage, dataset=dataset, names=names, cluster=cluster)
        recipe = cls.from_files(stage, files, overrides)
        run_name = "-".join([dataset, *(Path(name).stem if _is_path(name) else name for name in names or ["base"])])
        return replace(recipe, names=tuple(names), dataset=dataset, cluster=cluster, run_name=run_name)

    @classmethod
    def from_files(cls, stage: Stage, files: Iterable[Path], overrides: Overrides = ()) -> Recipe:
        """Reads a recipe from files in merge order; see ``read``."""
        return cls.from_layers(stage, [Layer(f"recipe {file}", read_yaml(file)) for file in files], overrides)

    @classmethod
    def from_run(cls, stage: Stage, config: Path, overrides: Overrides = ()) -> Recipe:
        """Reads the recipe of an earlier run, ``runs/RUN/STAGE/config.yaml``, to repeat it; see ``read``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: see ``read``; also if the file is not the configuration of a run.
        """
        tree = read_yaml(config)
        if not all(isinstance(tree.get(group), dict) for group in ("data", "model", "trainer")):
            raise ValueError(f"{config} must be the config.yaml of a run, with the keys data, model and trainer")
        paths = {key: str(path) for key in _PATHS if (path := value_at(tree, key)) is not None}
        layer = Layer(f"recipe {config}", without_keys(tree, _PATHS))  # which a command sets
        return replace(cls.from_layers(stage, [layer], overrides), config=config, paths=paths)

    @classmethod
    def from_layers(cls, stage: Stage, layers: Sequence[Layer], overrides: Overrides = ()) -> Recipe:
        """Checks and merges layers; see ``read``."""
        words = flag_words(overrides)
        flags = _flag_layers(words)
        kind = _find_kind(stage, merge(layer.tree for layer in (*layers, *flags)))
        return cls(stage, kind, _check(kind, layers, flags), tuple(flag.tree for flag in flags), words)

    def with_overrides(self, overrides: Overrides) -> Recipe:
        """Returns the recipe with more overrides, checked as in ``read``."""
        words = flag_words(overrides)
        flags = _flag_layers(words)
        _check(self.kind, [Layer("recipe", self.tree)], flags)
        return replace(self, flags=(*self.flags, *(flag.tree for flag in flags)), words=(*self.words, *words))

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The merged tree of all values."""
        return merge([self.base, *self.flags])

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key such as ``data.source``, or None if it is not set."""
        return value_at(self.tree, key)


def recipes_folders() -> list[Path]:
    """Returns the folders in which recipes are searched, in order.

    These are ``recipes/`` of the working directory, if there is one, and that of the repository or, without
    one, of the installed package. A recipe of the first folder hides one of the same name in the second.
    """
    here, shipped = Path("recipes"), Path(__file__).parents[2] / "recipes"
    if not (shipped / "transformer" / "base.yaml").is_file():
        shipped = Path(__file__).parents[1] / "recipes"
    if not here.is_dir():
        return [shipped]
    return [here] if here.samefile(shipped) else [here, shipped]


def list_recipes(kind: Stage | Literal["cluster"]) -> dict[str, Path]:
    """Returns the files of a kind of recipe by name, sorted by name."""
    files = {file.stem: file for folder in reversed(recipes_folders()) for file in (folder / kind).glob("*.yaml")}
    return dict(sorted(files.items()))


def recipe_files(stage: Stage, *, dataset: str, names: Iterable[str], cluster: str) -> list[Path]:
    """Finds the files of a run in merge order.

    A data set without a file of its own has ``own-images.yaml``, and the default one only the base. A stage ignores
    names that only the other one has. A path counts for both, unless its folder is named after one of them.
    """
    (other,) = {*STAGES} - {stage}
    stage_files = list_recipes(stage)
    files = [stage_files["base"]]
    if dataset != DEFAULT_DATASET:
        files.append(stage_files.get(dataset, stage_files["own-images"]))
    for name in names:
        file = Path(name) if _is_path(name) else _find_named("recipe", name, list_recipes(other) | stage_files)
        if file.absolute().parent.name != other:
            files.append(file)
    return [*files, _find_named("cluster", cluster, list_recipes("cluster"))]


def _find_named(what: str, name: str, named_files: Mapping[str, Path]) -> Path:
    if name not in named_files:
        folders = " or ".join(map(str, recipes_folders()))
        raise FileNotFoundError(f"{what} {name!r}: no such file in {folders}: {nearest(name, named_files)}")
    return named_files[name]


def _is_path(name: str) -> bool:
    """Returns True if a word of RECIPE is the path of a file, such as ``my/wide.yaml``, and not a name."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def _find_kind(stage: Stage, tree: Mapping[str, Any]) -> Kind:
    """Returns the kind of module that the merged files and flags select."""
    if stage == "tokenizer":
        return "tokenizer"
    if value_at(tree, "model.distillation") is not None:
        return "distillation"
    # Backbones without causal attention refuse the key.
    return "autoregressive" if value_at(tree, "model.network.attention") == "causal" else "transformer"


def _flag_layers(words: Sequence[str]) -> list[Layer]:
    """Returns the layers of flags: first that of the backbone, which decides on other keys."""
    flags = sorted(split_flags(words), key=lambda flag: flag[0] != "model.network.backbone")
    return [flag_layer(*flag) for flag in flags]


def _check(kind: Kind, files: Sequence[Layer], flags: Sequence[Layer]) -> dict[str, Any]:
    """Checks the layers of a recipe, in merge order, and returns the merged values of the files.

    Values that data and tokenizer determine may be missing. Ranges of the model are then checked when the run is built.
    Files are shared with masked models: those of an autoregressive model lose the keys of masking, which flags must
    not have.
    """
    from maskgit_pl.runs.resolve import find_faults, known_keys  # lightning and torch take seconds to import

    def faults(part: Sequence[Layer]) -> list[WrongValue]:
        return find_faults(kind, merge([_COMMAND_PATHS, *(layer.tree for layer in part)]))

    if kind == "autoregressive":
        of_masking = known_keys("transformer").keys() - known_keys(kind).keys()
        files = [Layer(file.origin, without_keys(file.tree, of_masking)) for file in files]
    layers = [*files, *flags]
    for number, layer in enumerate(layers, start=1):
        with _named(layer.origin):
            network = value_at(merge(part.tree for part in layers[:number]), "model.network")
            _check_names(layer.tree, known_keys(kind, network))
    # The types of the files first: a flag must not hide a wrong one, because their values are used without flags, too.
    for part, kinds in ((files, ("type",)), (layers, ("type", "value"))):
        wrong = next((fault for fault in faults(part) if fault.kind in kinds), None)
        if wrong is not None:
            # The layer from which on the merged layers have the fault.
            culprit = max(n for n in range(len(part)) if wrong not in faults(part[:n]))
            with _named(part[culprit].origin):
                raise ValueError(wrong.text)
    return merge(file.tree for file in files)


@contextmanager
def _named(origin: str) -> Iterator[None]:
    """Puts the file or the flag in front of the message of an error; a flag is named once."""
    try:
        yield
    except ValueError as error:
        key = origin.removeprefix("flag --")
        text = f"flag --{error}" if key != origin and str(error).startswith(key) else f"{origin}: {error}"
        raise ValueError(text) from error


def _check_names(node: Mapping[str, Any], keys: Mapping[str, bool | None], path: str = "") -> None:
    """Checks the keys of a part of a tree; see ``known_keys``."""
    for name, value in node.items():
        key = f"{path}{name}"
        if key in DERIVED_KEYS or key not in keys or "." in str(name):
            raise ValueError(_explain_unknown_key(key, [known for known in keys if known not in DERIVED_KEYS]))
        is_optional = keys[key]
        if is_optional is None or (value is None and is_optional):
            continue
        if not isinstance(value, Mapping):  # else a later layer would hide that the group has lost its values
            inner = next(known for known in keys if known.startswith(f"{key}."))
            raise ValueError(f"{key} must be a mapping, got {shorten(value)}; set a key of it, such as {inner}")
        _check_names(value, keys, f"{key}.")


def _explain_unknown_key(key: str, names: Sequence[str]) -> str:
    """Returns the message for a key that no recipe has; ``names`` are those that it can have."""
    if key in DERIVED_KEYS:
        return f"{key} cannot be set: it follows {DERIVED_KEYS[key]}"
    group, _, leaf = key.replace("-", "_").rpartition(".")
    leaf = _HABITS.get(leaf, leaf)
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == group}
    # The same name in another group, or a similar name in the same group.
    close = [name for name in names if name.rpartition(".")[2] == leaf]
    close += [beside[similar] for similar in get_close_matches(leaf, beside, n=1)]
    if key in close:  # written with dots in a file
        return f"unknown key {key!r}: keys of a file are nested; dots are for flags"
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {key!r}: {hint}keys of {group or 'a recipe'}: {', '.join(sorted(beside))}"


def config_text(tree: Mapping[str, Any]) -> str:
    """Returns the text of ``config.yaml`` for all values of a run: its complete recipe, which is valid again."""
    head = "# The complete recipe of a run. To repeat it: maskgit train STAGE --config THIS_FILE --run NAME\n"
    return head + str(yaml.safe_dump(without_keys(tree, DERIVED_KEYS), sort_keys=False))


def merge(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges trees recursively; later values override earlier ones.

    A mapping with the key ``name`` specifies a registered object and replaces the earlier value. A mapping
    without ``name`` adds arguments to the object that an earlier tree names. Where an earlier tree has a list of such
    objects, the keys of a mapping are names in the list; null leaves an object out.

    A mapping with the key ``backbone`` (``model.network``) that names another backbone than the earlier trees drops the
    keys of the old one, except those that all backbones have, the fields of ``BackboneConfig``. The keys of the new one
    start from its defaults.
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
    if isinstance(old, list | tuple):
        return _override_named(old, new)
    # The earlier tree names the object without arguments.
    if isinstance(old, str):
        return {"name": old, **new}
    kept = old if isinstance(old, Mapping) else {}
    if "backbone" in new:
        from maskgit_pl.networks.backbone import DEFAULT_BACKBONE, BackboneConfig  # torch takes seconds to import

        if new["backbone"] != kept.get("backbone", DEFAULT_BACKBONE):
            of_all = {field.name for field in fields(BackboneConfig)}
            kept = {key: value for key, value in kept.items() if key in of_all}
    return merge([kept, new])


def _override_named(old: Sequence[Any], new: Mapping[str, Any]) -> list[Any]:
    names = [str(part.get("name") if isinstance(part, Mapping) else part) for part in old]
    unknown = [name for name in new if name not in names]
    if unknown:
        raise ValueError(f"{unknown[0]!r} must be a name in the list, got a list of {', '.join(names) or 'nothing'}")
    parts = [_override(part, new[name]) if name in new else part for part, name in zip(old, names, strict=True)]
    return [part for part in parts if part is not None]


def value_at(tree: Any, key: str) -> Any:
    """Returns the value of a dotted key such as ``data.source``, or None if the tree does not have it."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def without_keys(tree: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of a tree without dotted keys, which it need not have."""
    copy = merge([tree])
    for key in keys:
        group, _, leaf = key.rpartition(".")
        node = value_at(copy, group) if group else copy
        if isinstance(node, dict):
            node.pop(leaf, None)
    return copy


def flag_words(overrides: Overrides) -> tuple[str, ...]:
    """Returns overrides as flags. Python values become JSON, which is also YAML."""
    if isinstance(overrides, Mapping):
        return tuple(f"--{key}={json.dumps(value, default=str)}" for key, value in overrides.items())
    return tuple(overrides)


def split_flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the dotted key and the text of each flag."""
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if not re.fullmatch(r"--[A-Za-z_][\w.-]*(=.*)?", word, re.DOTALL):
            raise ValueError(f"unrecognized argument {shorten(word)}; recipe values are set with --KEY=VALUE")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not waiting or waiting[-1].startswith("--"):
                raise ValueError(f"flag --{key} must have a value")
            text = waiting.pop()
        yield key, text


def flag_layer(key: str, text: str) -> Layer:
    """Returns the layer of one flag, whose text is YAML."""
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"flag --{key}: {error}") from error
    # a.b.c = value becomes {a: {b: {c: value}}}.
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_plain(tree)
    return Layer(f"flag --{key}", tree)


def split_values(text: str) -> list[str]:
    """Splits a text at the commas that are not inside a mapping or a list. Empty parts are dropped."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return [word.strip() for word in words if word.strip()]


def parse_spec(flag: str, text: str) -> str | dict[str, Any]:
    """Parses a plug-in: a mapping in YAML with its name and arguments; any other text is its name, as it is."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        spec: dict[str, Any] = parse_yaml(text)
    except ValueError as error:
        rule = "must be a name or a mapping such as '{name: remdm, eta: 0.4}'"
        raise ValueError(f"{flag} {rule}, got {shorten(text)} ({error})") from error
    return spec


def parse_specs(flag: str, text: str) -> list[str | dict[str, Any]]:
    """Parses names and mappings separated by commas, such as ``confidence, {name: remdm, eta: 0.4}``."""
    return [parse_spec(flag, word) for word in split_values(text) or [text]]

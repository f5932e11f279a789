"""The recipe of a run: the values of its files and flags, checked and merged into one tree of plain values.

Merge order: base, data set, RECIPE from left to right, cluster, flags. A recipe is only data: numbers, strings, lists
and mappings with known keys, and names of registered objects. It is parsed exactly once, so that no value can name a
class, a function or another file to read. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from maskgit_pl.checks import shorten
from maskgit_pl.runs.flags import Overrides, flag_layer, flag_words, split_flags
from maskgit_pl.runs.layers import DEFAULT_BACKBONE, Layer, merge, remove_key, value_at
from maskgit_pl.runs.recipe_checks import check_layer
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET, Stage, is_recipe_path, read_run_config, recipe_files
from maskgit_pl.runs.recipe_schema import Kind, load_backbone_schema, load_schema
from maskgit_pl.safe_yaml import parse_yaml, read_yaml
from maskgit_pl.schema import Schema

__all__ = ["Recipe"]

_BACKBONE, _ATTENTION = "model.network.backbone", "model.network.attention"
# Keys that have no meaning with causal attention, which masks nothing and samples one token after another.
_MASKED_ONLY = (
    "model.mask_schedule",
    "model.min_mask_ratio",
    "model.mask_ratio",
    "model.mask_positions",
    "model.objective",
    "model.corruption",
    "model.decoding.num_steps",
    "model.decoding.token_selector",
    "model.decoding.tokens_per_step",
    "model.decoding.mask_schedule",
)


@dataclass(frozen=True)
class Recipe:
    """The values of a run from its files and flags. Made by ``read``.

    Args:
        stage: Stage to train.
        kind: Kind of module, as decided by files and flags.
        base: Merged values of the files, without ``left_out``.
        flags: Values of each flag, in the given order.
        words: The flags as given.
        files: Names of the files in merge order, for messages.
        left_out: Dropped keys of each file, which have no meaning with causal attention.
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
    files: tuple[str, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
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
            ValueError: if a file is not a safe recipe, a key is unknown or has a value of a wrong type, or a flag has
                no meaning for the model. The message names the file or flag, and the key.
        """
        if isinstance(names, str):  # the name of a file may have spaces
            names = [names] if is_recipe_path(names) and Path(names).is_file() else names.split()
        names = list(names)
        files = recipe_files(stage, dataset=dataset, names=names, cluster=cluster)
        recipe = cls.from_files(stage, files, overrides)
        run_name = "-".join(
            [dataset, *(Path(name).stem if is_recipe_path(name) else name for name in names or ["base"])]
        )
        return replace(recipe, names=tuple(names), dataset=dataset, cluster=cluster, run_name=run_name)

    @classmethod
    def from_files(cls, stage: Stage, files: Iterable[Path], overrides: Overrides = ()) -> Recipe:
        """Reads a recipe from files in merge order; see ``read``."""
        return cls.from_layers(stage, [Layer(f"recipe {file}", read_yaml(file)) for file in files], overrides)

    @classmethod
    def from_run(cls, stage: Stage, config: Path, overrides: Overrides = ()) -> Recipe:
        """Reads the recipe of an earlier run, to repeat it.

        Args:
            stage: Stage to train.
            config: Configuration of that run, ``runs/RUN/STAGE/config.yaml``.
            overrides: Overrides; see ``read``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: see ``read``; also if the file is not the configuration of a run.
        """
        if not config.is_file():
            raise FileNotFoundError(f"--config {config}: no such file; runs have runs/RUN/{stage}/config.yaml")
        tree, paths = read_run_config(config)
        return replace(cls.from_layers(stage, [Layer(f"recipe {config}", tree)], overrides), config=config, paths=paths)

    @classmethod
    def from_layers(cls, stage: Stage, layers: Sequence[Layer], overrides: Overrides = ()) -> Recipe:
        """Checks and merges layers; see ``read``."""
        words = flag_words(overrides)
        kind = _find_kind(stage, layers, words)
        left_out: dict[str, list[str]] = {}
        # Files are shared with masked models, so their masking keys are dropped; flags must not have any.
        if kind == "autoregressive":
            layers, left_out = _drop_masking_keys(layers)
        # Each layer is checked on its own, so that a message can name the file, with the keys of its backbone: that of
        # the last layer up to itself that names one.
        for number, layer in enumerate(layers, start=1):
            check_layer(layer, _schema_of(kind, merge(each.tree for each in layers[:number]), layer.origin))
        base = merge([layer.tree for layer in layers])
        files = tuple(layer.origin for layer in layers)
        return cls(stage, kind, base, files=files, left_out=left_out).with_overrides(words)

    def with_overrides(self, overrides: Overrides) -> Recipe:
        """Returns the recipe with more overrides, checked as in ``read``."""
        words = flag_words(overrides)
        given = sorted(split_flags(words), key=lambda pair: pair[0] != _BACKBONE)  # the backbone decides on other keys
        named = [flag_layer(key, text, load_schema(self.kind)).tree for key, text in given if key == _BACKBONE]
        schema = _schema_of(self.kind, merge([self.tree, *named]), f"flag --{_BACKBONE}")
        added = [flag_layer(key, text, schema) for key, text in given]
        for layer in added:
            if self.kind == "autoregressive":
                _refuse_masking(layer)
            check_layer(layer, schema)
        return replace(self, flags=(*self.flags, *(layer.tree for layer in added)), words=(*self.words, *words))

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The merged tree of all values."""
        return merge([self.base, *self.flags])

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key such as ``data.source``, or None if it is not set."""
        return value_at(self.tree, key)

    @property
    def title(self) -> str:
        """A readable name, such as ``transformer/base + transformer/log + cluster/single``."""
        return " + ".join("/".join(Path(file).with_suffix("").parts[-2:]) for file in self.files)


def _find_kind(stage: Stage, files: Sequence[Layer], words: Sequence[str]) -> Kind:
    """Returns the kind of module that files and flags select."""
    # Flags count, too, and the last one wins. They are parsed again with the schema of this kind.
    network = [value_at(layer.tree, "model.network") for layer in files]
    for key, text in sorted(split_flags(words), key=lambda pair: pair[0] != _BACKBONE):
        if key in (_BACKBONE, _ATTENTION):
            with suppress(ValueError):  # invalid YAML raises later, where the flag is read
                network.append({key.rpartition(".")[2]: parse_yaml(text)})
    if stage == "tokenizer":
        return "tokenizer"
    merged = merge({"network": each} for each in network if isinstance(each, Mapping)).get("network", {})
    # Backbones without causal attention refuse the key.
    return "autoregressive" if merged.get("attention") == "causal" else "transformer"


def _schema_of(kind: Kind, tree: Mapping[str, Any], origin: str) -> Schema:
    """Returns the schema of a layer on top of others, which depends on the backbone of the merged ``tree``.

    Raises:
        ValueError: if no backbone has this name. The message names the layer.
    """
    backbone = value_at(tree, _BACKBONE)
    if not isinstance(backbone, str | None):
        raise ValueError(f"{origin}: {_BACKBONE} must be a string, got {shorten(backbone)}")
    try:
        return load_backbone_schema(kind, backbone or DEFAULT_BACKBONE)
    except ValueError as error:
        raise ValueError(f"{origin}: {_BACKBONE}: {error}") from error


def _drop_masking_keys(files: Sequence[Layer]) -> tuple[list[Layer], dict[str, list[str]]]:
    """Returns the layers without the keys that causal attention ignores, and these keys by origin."""
    kept, left_out = [], {}
    for layer in files:
        tree = merge([layer.tree])
        keys = [key for key in _MASKED_ONLY if remove_key(tree, key)]
        kept.append(Layer(layer.origin, tree))
        if keys:
            left_out[layer.origin] = keys
    return kept, left_out


def _refuse_masking(layer: Layer) -> None:
    for key in _MASKED_ONLY:
        if value_at(layer.tree, key) is not None:
            raise ValueError(
                f"{layer.origin}: with causal attention no token is masked, and tokens are drawn one after another; "
                f"{key} is for bidirectional attention; leave the flag out"
            )

"""The recipe of a run: the values of its files and flags, checked and merged once into one tree of plain values.

Merge order: base, data set, RECIPE from left to right, cluster; flags come last. A recipe is data: it holds numbers,
words, lists and mappings under known keys, names registered things, and is never parsed a second time, so that no value
can name a class, a function or another file to be read. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from maskgit_pl.old_names import rename_keys, rename_tree
from maskgit_pl.runs.flags import Overrides, flag_layer, flag_words, split_flags
from maskgit_pl.runs.layers import Layer, merge, remove_key, value_at
from maskgit_pl.runs.recipe_checks import check_layer
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET, Stage, read_run_config, recipe_files
from maskgit_pl.runs.recipe_schema import Kind, load_schema
from maskgit_pl.runs.safe_yaml import parse_yaml, read_yaml

__all__ = ["Recipe"]

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
class Recipe:
    """The values of a run: those of its files, then those of its flags. ``read`` makes it.

    Args:
        stage: Stage that is trained.
        kind: Kind of module that it trains, as files and flags together say.
        base: Values of the files, merged, without ``left_out``.
        flags: Values of each flag, in the order in which they were given.
        words: The flags as they were given.
        files: The files in merge order, as messages name them.
        left_out: Keys of each file that were dropped, since they have no meaning under causal attention.
        names: RECIPE, names of its files from left to right, without those that every recipe has.
        dataset: Name of the data set.
        cluster: File of ``recipes/cluster``; empty where a run is repeated.
        config: Configuration of the run that is repeated, if one is.
        run_name: Default name of the run, ``DATASET-RECIPE``; None where a run is repeated.
        paths: Paths of the run that is repeated, by their keys ``data.path`` and ``model.tokenizer``; else empty.
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
            stage: Stage that is trained.
            names: RECIPE, from left to right: names, or one word with spaces between them.
            dataset: Name of the data set.
            cluster: A file of ``recipes/cluster``.
            overrides: Single values: a mapping of dotted keys, or flags ``--KEY=VALUE`` or ``--KEY VALUE``.

        Raises:
            FileNotFoundError: if there is no recipe of a name. The message has the nearest one.
            ValueError: if a file is not a safe recipe, a key is unknown or has a value of another type, or a flag has
                no meaning for the model. The message names file or flag and key.
        """
        names = names.split() if isinstance(names, str) else list(names)
        files = recipe_files(stage, dataset=dataset, names=names, cluster=cluster)
        recipe = cls.from_files(stage, files, overrides)
        run_name = "-".join([dataset, *(names or ["base"])])
        return replace(recipe, names=tuple(names), dataset=dataset, cluster=cluster, run_name=run_name)

    @classmethod
    def from_files(cls, stage: Stage, files: Iterable[Path], overrides: Overrides = ()) -> Recipe:
        """Reads a recipe from files in merge order; see ``read``."""
        return cls.from_layers(stage, [Layer(f"recipe {file}", read_yaml(file)) for file in files], overrides)

    @classmethod
    def from_run(cls, stage: Stage, config: Path, overrides: Overrides = ()) -> Recipe:
        """Reads the recipe of an earlier run, to repeat it.

        Args:
            stage: Stage that is trained.
            config: Its ``config.yaml``, ``runs/RUN/STAGE/config.yaml``.
            overrides: Single values; see ``read``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: as ``read``, or if it is not the configuration of a run.
        """
        if not config.is_file():
            raise FileNotFoundError(f"--config {config}: no such file; runs have runs/RUN/{stage}/config.yaml")
        tree, paths = read_run_config(config)
        return replace(cls.from_layers(stage, [Layer(f"recipe {config}", tree)], overrides), config=config, paths=paths)

    @classmethod
    def from_layers(cls, stage: Stage, layers: Sequence[Layer], overrides: Overrides = ()) -> Recipe:
        """Checks and merges layers that are read already; see ``read``."""
        words = flag_words(overrides)
        layers = [Layer(each.origin, rename_tree(each.tree, each.origin)) for each in layers]
        kind = _find_kind(stage, layers, words)
        left_out: dict[str, list[str]] = {}
        if kind == "autoregressive":
            layers, left_out = _drop_masking_keys(layers)
        schema = load_schema(kind)
        for layer in layers:
            check_layer(layer, schema)
        base = merge([layer.tree for layer in layers])
        files = tuple(layer.origin for layer in layers)
        return cls(stage, kind, base, files=files, left_out=left_out).with_overrides(words)

    def with_overrides(self, overrides: Overrides) -> Recipe:
        """Returns the recipe with further values on top, checked as in ``read``."""
        schema, words = load_schema(self.kind), flag_words(overrides)
        given = list(split_flags(words))
        keys = rename_keys((key for key, _ in given), "flags")
        added = [flag_layer(key, text, schema) for key, (_, text) in zip(keys, given, strict=True)]
        for layer in added:
            if self.kind == "autoregressive":
                _refuse_masking(layer)
            check_layer(layer, schema)
        return replace(self, flags=(*self.flags, *(layer.tree for layer in added)), words=(*self.words, *words))

    @cached_property
    def tree(self) -> dict[str, Any]:
        """All values as one tree."""
        return merge([self.base, *self.flags])

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key such as ``data.source``; None where nothing says it."""
        return value_at(self.tree, key)

    @property
    def title(self) -> str:
        """The files, for people, such as ``transformer/base + transformer/log + cluster/single``."""
        return " + ".join("/".join(Path(file).with_suffix("").parts[-2:]) for file in self.files)


def _find_kind(stage: Stage, files: Sequence[Layer], words: Sequence[str]) -> Kind:
    """Returns the kind of module that files and flags are for."""
    attention = value_at(merge([layer.tree for layer in files]), "model.network.attention")
    for key, text in split_flags(words):
        if key == "model.network.attention":
            with suppress(ValueError):  # what is no YAML is refused where the flag is read
                attention = parse_yaml(text)
    if stage == "tokenizer":
        return "tokenizer"
    return "autoregressive" if attention == "causal" else "transformer"


def _drop_masking_keys(files: Sequence[Layer]) -> tuple[list[Layer], dict[str, list[str]]]:
    """Layers without the keys that causal attention ignores, and those keys by origin."""
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

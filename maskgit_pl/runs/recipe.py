"""The recipe of a run: the values of its files and flags, checked and merged into one tree of plain values.

Merge order: base, data set, RECIPE from left to right, cluster, flags. A recipe is only data: numbers,
strings, lists and mappings with known keys, and names of registered objects. It is parsed exactly once, so
that no value can name a class, a function or another file to read. ``resolve`` checks the values, and
imports torch and Lightning for it. The ``config.yaml`` of an earlier run is also a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from maskgit_pl.files import read_yaml
from maskgit_pl.registry import nearest
from maskgit_pl.runs.layers import (
    Kind,
    Layer,
    Overrides,
    flag_layer,
    flag_words,
    merge,
    split_flags,
    value_at,
    without_keys,
)

Stage = Literal["tokenizer", "transformer"]

STAGES: tuple[Stage, ...] = ("tokenizer", "transformer")
DEFAULT_DATASET = "fashion-mnist"
_PATHS = ("data.path", "data.token_store", "model.tokenizer")


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

    Raises:
        FileNotFoundError: if no stage has a recipe of that name. The message lists the names and the closest one.
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
    """Checks the layers of files together with flags on top of them, and returns the merged values of the files."""
    from maskgit_pl.runs.resolve import check_layers  # lightning and torch take seconds to import

    return merge(layer.tree for layer in check_layers(kind, files, flags))

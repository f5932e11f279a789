"""Finds the files of a recipe, and reads the ``config.yaml`` of an earlier run as a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from maskgit_pl.old_names import rename_cluster
from maskgit_pl.registry import nearest
from maskgit_pl.runs.layers import remove_key, value_at
from maskgit_pl.runs.recipe_checks import DERIVED_KEYS
from maskgit_pl.runs.recipe_schema import load_schema
from maskgit_pl.runs.safe_yaml import read_yaml

__all__ = ["DEFAULT_DATASET", "STAGES", "RunConfig", "Stage", "read_run_config", "recipe_files", "recipes_folder"]

Stage = Literal["tokenizer", "transformer"]

STAGES: tuple[Stage, ...] = ("tokenizer", "transformer")
DEFAULT_DATASET = "fashion-mnist"
_PATHS = ("data.path", "data.token_store", "model.tokenizer")


class RunConfig(NamedTuple):
    """The content of ``config.yaml`` of a run.

    Attributes:
        tree: Recipe values, without paths, which a command sets, and without derived keys.
        paths: Paths in the file by dotted key, such as ``data.path``.
    """

    tree: dict[str, Any]
    paths: dict[str, str]


def recipes_folder() -> Path:
    """Returns ``recipes/`` of the working directory, else of the repository, else of the installed package.

    Raises:
        FileNotFoundError: if there is none.
    """
    candidates = (Path("recipes"), Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes")
    for folder in candidates:
        if (folder / "transformer" / "base.yaml").is_file():
            return folder
    raise FileNotFoundError("recipes: no folder recipes/ here; run from the repository, or reinstall maskgit_pl")


def recipe_files(stage: Stage, *, dataset: str, names: Iterable[str], cluster: str) -> list[Path]:
    """Finds the files of a run in merge order.

    Args:
        stage: Stage of the recipes.
        dataset: Data set with the file ``<dataset>.yaml``, or ``own-images.yaml`` if there is none. The default data
            set only has the base file.
        names: RECIPE, from left to right. A name must be a recipe of some stage; a stage ignores those of the other.
        cluster: A file of ``recipes/cluster``.

    Raises:
        FileNotFoundError: if no stage has a recipe of that name. The message lists the names and the closest one.
    """
    folder = recipes_folder()
    files = [folder / stage / "base.yaml"]
    if dataset != DEFAULT_DATASET:
        own = folder / stage / f"{dataset}.yaml"
        files.append(own if own.is_file() else folder / stage / "own-images.yaml")
    for name in names:
        # A name may exist for one stage or for both.
        homes = [each for each in STAGES if (folder / each / f"{name}.yaml").is_file()]
        if not homes:
            known = {file.stem for each in STAGES for file in (folder / each).glob("*.yaml")}
            raise FileNotFoundError(f"recipe {name!r}: no such file in {folder}: {nearest(name, known)}")
        if stage in homes:
            files.append(folder / stage / f"{name}.yaml")
    return [*files, _cluster_file(folder / "cluster", cluster)]


def _cluster_file(folder: Path, name: str) -> Path:
    """Finds a file of ``recipes/cluster``. An old name is translated unless a file of that name exists."""
    known = {file.stem for file in folder.glob("*.yaml")}
    found = name if name in known else rename_cluster(name)
    if found not in known:
        raise FileNotFoundError(f"cluster {name!r}: no such file in {folder}: {nearest(name, known)}")
    return folder / f"{found}.yaml"


def read_run_config(file: Path) -> RunConfig:
    """Reads ``config.yaml`` of a run.

    Files of version 0.1.0 hold all arguments of Lightning's Trainer; those that recipes do not have are dropped.

    Raises:
        ValueError: see ``read_yaml``; also if the file is not the configuration of a run.
    """
    tree = read_yaml(file)
    if not all(isinstance(tree.get(group), dict) for group in ("data", "model", "trainer")):
        raise ValueError(f"{file} must be the config.yaml of a run, with the keys data, model and trainer")
    # The settings of the Trainer are the same for all kinds of recipes.
    known = load_schema("tokenizer")["properties"]["trainer"]["properties"]
    tree["trainer"] = {key: value for key, value in tree["trainer"].items() if key in known}
    tree.pop("seed_everything", None)
    paths = {key: str(path) for key in _PATHS if (path := value_at(tree, key)) is not None}
    for key in (*DERIVED_KEYS, *_PATHS):
        remove_key(tree, key)
    return RunConfig(tree, paths)

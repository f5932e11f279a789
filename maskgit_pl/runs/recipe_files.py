"""Finds the files of a recipe, and reads the ``config.yaml`` of an earlier run as a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from maskgit_pl.registry import nearest
from maskgit_pl.runs.layers import remove_key, value_at
from maskgit_pl.runs.recipe_checks import DERIVED_KEYS
from maskgit_pl.safe_yaml import read_yaml

__all__ = [
    "DEFAULT_DATASET",
    "STAGES",
    "RunConfig",
    "Stage",
    "find_in_recipes",
    "is_recipe_path",
    "list_recipes",
    "read_run_config",
    "recipe_files",
    "recipes_folders",
]

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


def recipes_folders() -> list[Path]:
    """Returns the folders in which recipes are searched, in order.

    These are ``recipes/`` of the working directory, if there is one, and that of the repository or, without one, of the
    installed package. A recipe of the first folder hides one of the same name in the second.

    Raises:
        FileNotFoundError: if no folder has the base recipes.
    """
    here = Path("recipes")
    shipped = (Path(__file__).parents[2] / "recipes", Path(__file__).parents[1] / "recipes")
    complete = [folder for folder in (*shipped, here) if (folder / "transformer" / "base.yaml").is_file()][:1]
    if not complete:
        raise FileNotFoundError("recipes: the installation has no folder recipes/; reinstall maskgit_pl")
    if not here.is_dir():
        return complete
    return [here, *(folder for folder in complete if not here.samefile(folder))]


def find_in_recipes(name: str) -> Path | None:
    """Returns the file of a relative path, such as ``slurm/train.sbatch``, in the first folder that has it."""
    return next((file for folder in recipes_folders() if (file := folder / name).is_file()), None)


def list_recipes(kind: Stage | Literal["cluster"]) -> dict[str, Path]:
    """Returns the files of a kind of recipe by name, sorted by name."""
    found = {file.stem: file for folder in reversed(recipes_folders()) for file in (folder / kind).glob("*.yaml")}
    return dict(sorted(found.items()))


def is_recipe_path(name: str) -> bool:
    """Returns True if a word of RECIPE is the path of a file, such as ``my/wide.yaml``, and not a name."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def recipe_files(stage: Stage, *, dataset: str, names: Iterable[str], cluster: str) -> list[Path]:
    """Finds the files of a run in merge order.

    Args:
        stage: Stage of the recipes.
        dataset: Data set with the file ``<dataset>.yaml``, or ``own-images.yaml`` if there is none. The default data
            set only has the base file.
        names: RECIPE, from left to right. A name must be a recipe of some stage; a stage ignores those of the other.
            A path counts for the stage, unless the file is in a folder named after the other stage.
        cluster: A file of ``recipes/cluster``.

    Raises:
        FileNotFoundError: if a path does not exist, or no stage has a recipe of that name. The message lists the names
            and the closest one.
    """
    known: dict[Stage, dict[str, Path]] = {each: list_recipes(each) for each in STAGES}
    own = known[stage]
    files = [own["base"]]
    if dataset != DEFAULT_DATASET:
        files.append(own.get(dataset, own["own-images"]))
    for name in names:
        found = _files_by_stage(name, known)
        files += [found[stage]] if stage in found else []
    return [*files, _cluster_file(cluster)]


def _files_by_stage(name: str, known: Mapping[Stage, Mapping[str, Path]]) -> dict[Stage, Path]:
    """Returns the file of a name or path for each stage that has it; there is at least one."""
    if is_recipe_path(name):
        file = Path(name)
        if not file.is_file():
            raise FileNotFoundError(f"recipe {name}: no such file; a recipe without / and .yaml is a name")
        homes = [each for each in STAGES if each == file.absolute().parent.name] or list(STAGES)
        return dict.fromkeys(homes, file)
    found = {each: files[name] for each, files in known.items() if name in files}
    if not found:
        every = {each for files in known.values() for each in files}
        raise FileNotFoundError(
            f"recipe {name!r}: no such file in {' or '.join(map(str, recipes_folders()))}: {nearest(name, every)}"
        )
    return found


def _cluster_file(name: str) -> Path:
    """Finds a file of ``recipes/cluster``."""
    known = list_recipes("cluster")
    if name not in known:
        raise FileNotFoundError(
            f"cluster {name!r}: no such file in {recipes_folders()[-1] / 'cluster'}: {nearest(name, known)}"
        )
    return known[name]


def read_run_config(file: Path) -> RunConfig:
    """Reads ``config.yaml`` of a run.

    Raises:
        ValueError: see ``read_yaml``; also if the file is not the configuration of a run.
    """
    tree = read_yaml(file)
    if not all(isinstance(tree.get(group), dict) for group in ("data", "model", "trainer")):
        raise ValueError(f"{file} must be the config.yaml of a run, with the keys data, model and trainer")
    paths = {key: str(path) for key in _PATHS if (path := value_at(tree, key)) is not None}
    for key in (*DERIVED_KEYS, *_PATHS):
        remove_key(tree, key)
    return RunConfig(tree, paths)

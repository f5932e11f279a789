"""Finds the folders that a run reads and writes: those that are named, and those that follow from its recipe.

Everything is found and checked as far as it can be without torch, so that a wrong name is answered at once.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from maskgit_pl.files import sha256_of
from maskgit_pl.registry import nearest
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import Stage
from maskgit_pl.runs.safe_yaml import read_yaml

__all__ = [
    "SHARED_TOKENS",
    "Plan",
    "find_data",
    "find_pretrained",
    "find_tokenizer",
    "folder_of",
    "plan_run",
    "run_folder",
]

log = logging.getLogger(__name__)

_RUNS = Path("runs")
_SHARDS = Path("data/shards")
SHARED_TOKENS = "tokens"
"""Folder beside the runs that holds their token stores."""


@dataclass(frozen=True)
class Plan:
    """A stage of a run, with the folders that it reads and writes. ``plan_run`` makes it.

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


def plan_run(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> Plan:
    """Finds the folders of a run, checked as far as they can be without torch.

    Args:
        recipe: Its values, and the stage.
        run: See ``run_folder``.
        data: See ``find_data``.
        tokenizer: See ``find_tokenizer``.
        pretrained: See ``find_pretrained``.

    Raises:
        ValueError: if the name of the run is reserved, or several tokenizers could be meant.
        FileNotFoundError: if data, tokenizer or pretrained folder are not there.
    """
    shards, folder = find_data(recipe, data), run_folder(recipe, run)
    found = None
    if recipe.stage == "transformer":
        found = find_tokenizer(recipe, folder=folder, shards=shards, tokenizer=tokenizer, pretrained=pretrained)
    return Plan(recipe, shards, folder, found, find_pretrained(recipe.stage, pretrained))


def run_folder(recipe: Recipe, run: str | Path | None = None) -> Path:
    """Finds the folder of a run, ``runs/RUN``, which need not exist.

    Args:
        recipe: Says the default name, ``DATASET-RECIPE``.
        run: A name in ``runs/``, or a folder: a ``Path`` or a word with a slash.

    Raises:
        ValueError: if nothing names the run, or its name is that of the folder of token stores.
    """
    named = recipe.run_name if run is None else run
    if named is None:
        raise ValueError("a run that repeats another one must have a name of its own; name it with --run")
    folder = folder_of(named)
    if folder.name == SHARED_TOKENS:
        raise ValueError(f"--run {SHARED_TOKENS}: the folder holds the token stores of all runs; take another name")
    return folder


def folder_of(run: str | Path) -> Path:
    """Returns the folder of a run: ``runs/NAME`` for a name; a ``Path`` or a word with a slash is the folder itself."""
    return Path(run) if isinstance(run, Path) or os.sep in run else _RUNS / run


def find_data(recipe: Recipe, data: str | Path | None = None) -> Path:
    """Finds the data folder of a run: named, else that of the run that is repeated, else of the data set.

    Where the recipe reads a stream, a folder that is not named need not exist.

    Args:
        recipe: Says the data set.
        data: The folder, if it is named.

    Raises:
        FileNotFoundError: if it is not there.
    """
    shards = Path(data or recipe.paths.get("data.path") or _SHARDS / recipe.dataset)
    if not shards.is_dir() and not (data is None and recipe.get("data.source") == "stream"):
        script = Path("data") / f"{recipe.dataset.replace('-', '_')}.py"
        made = f"`python {script}` or " if script.is_file() else ""
        raise FileNotFoundError(
            f"data {shards}: no such folder; make it with {made}`maskgit data make IMAGES --out {shards}`, or name "
            "another with --data (make: DATA=)"
        )
    return shards


def find_tokenizer(
    recipe: Recipe,
    *,
    folder: Path,
    shards: Path,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> Path:
    """Finds the tokenizer of stage 2.

    The first of: the one that is named; that of the run that is repeated; the run's own; that of ``pretrained``; the
    only one that a run beside this one has trained on the same data.

    Args:
        recipe: Of the run.
        folder: Of the run.
        shards: Data folder of the run.
        tokenizer: Pretrained tokenizer folder, if it is named.
        pretrained: Pretrained folder of both stages whose weights the run begins from.

    Raises:
        FileNotFoundError: if there is none, or the run that is named does not exist.
        ValueError: if runs of these data have several; one must be named.
    """
    named = tokenizer or recipe.paths.get("model.tokenizer")
    if named is not None:
        return _check_tokenizer(Path(named))
    own = folder / "pretrained" / "tokenizer"
    if (own / "config.json").is_file():
        return own
    if pretrained is not None and (Path(pretrained) / "tokenizer" / "config.json").is_file():
        return Path(pretrained) / "tokenizer"
    if folder.name != recipe.run_name:
        _refuse_unknown_run(folder)
    found = _tokenizers_of(shards, folder.parent)
    if not found:
        raise FileNotFoundError(
            f"tokenizer {own}: not there yet; `maskgit train tokenizer` (make: train-tokenizer) trains one, "
            "--tokenizer (make: TOKENIZER=) names another"
        )
    if len(found) > 1:
        choices = ", ".join(map(str, found))
        raise ValueError(
            f"tokenizer {own}: not there, and several others of these data are; name one with --tokenizer (make: "
            f"TOKENIZER=): {choices}"
        )
    log.info("tokenizer: %s, the only one trained on %s", found[0], shards)
    return found[0]


def _check_tokenizer(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer {folder}: no config.json there; name a pretrained tokenizer folder")
    if (folder / "tokenizer" / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer {folder}: it is a folder of both stages; did you mean {folder}/tokenizer?")
    return folder


def _refuse_unknown_run(folder: Path) -> None:
    """Refuses to start stage 2 of a run that was named and does not exist: its name is probably mistyped.

    Raises:
        FileNotFoundError: The nearest run is named.
    """
    runs = [each.name for each in folder.parent.glob("*") if (each / "pretrained").is_dir()]
    if folder.is_dir() or not runs:
        return
    raise FileNotFoundError(
        f"run {folder}: no such run: {nearest(folder.name, runs)}. To start it with another run's tokenizer, name that "
        "with --tokenizer (make: TOKENIZER=)"
    )


def _tokenizers_of(shards: Path, runs: Path) -> list[Path]:
    """The tokenizers that runs have trained on a data folder, those with the same weights once."""
    found: dict[str, Path] = {}
    for config in sorted(runs.glob("*/tokenizer/config.yaml")):
        exported = config.parents[1] / "pretrained" / "tokenizer"
        path = read_yaml(config).get("data", {}).get("path")
        if (exported / "config.json").is_file() and path and Path(path).resolve() == shards.resolve():
            found.setdefault(sha256_of(exported / "model.safetensors"), exported)
    return list(found.values())


def find_pretrained(stage: Stage, pretrained: str | Path | None) -> Path | None:
    """Finds the stage's own folder in the pretrained folder whose weights a run begins from, if one is named.

    Raises:
        FileNotFoundError: if it holds no such stage.
    """
    if pretrained is None:
        return None
    folder = Path(pretrained) / stage
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"pretrained {pretrained}: no {stage}/config.json there; runs/RUN/pretrained or an imported folder is "
            "needed"
        )
    return folder

"""The plan of a run: finds the folders that it reads and writes, from names and from its recipe.

Imports no torch, so that wrong names are rejected immediately.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from maskgit_pl.checks import check_integer
from maskgit_pl.data.sources.public import how_to_get
from maskgit_pl.files import read_yaml
from maskgit_pl.runs.layers import value_at
from maskgit_pl.runs.recipe import Recipe, Stage
from maskgit_pl.text import parse_size

log = logging.getLogger(__name__)

_RUNS = Path("runs")
_SHARDS = Path("data/shards")
SHARED_TOKENS = "tokens"
"""Name of the folder beside the runs that holds their token stores."""


@dataclass(frozen=True)
class Plan:
    """A stage of a run with the folders that it reads and writes. Made by ``plan_run``.

    Args:
        recipe: Values of the run, and the stage.
        shards: Data folder.
        folder: Run folder, ``runs/RUN``; it contains the stage folder.
        tokenizer: Pretrained tokenizer folder, for stage 2.
        pretrained: Pretrained folder of this stage, with the initial weights and the sizes of a new run.
    """

    recipe: Recipe
    shards: Path
    folder: Path
    tokenizer: Path | None = None
    pretrained: Path | None = None

    @property
    def stage(self) -> Stage:
        """The stage to train."""
        return self.recipe.stage

    @property
    def stage_folder(self) -> Path:
        """The stage folder ``runs/RUN/STAGE``, with checkpoints, logs and records."""
        return self.folder / self.stage

    @property
    def checkpoints(self) -> Path:
        """The folder ``runs/RUN/STAGE/checkpoints``."""
        return self.stage_folder / "checkpoints"


class Folders(TypedDict, total=False):
    """The folders of a run, which ``fit``, ``tokenize``, ``preflight`` and ``plan_submission`` take.

    Attributes:
        run: A name in ``runs/``, or a folder: a ``Path`` or a string with a slash. Default: ``DATASET-RECIPE``.
        data: Data folder. Default: ``data/shards/DATASET``.
        tokenizer: Pretrained tokenizer folder, for stage 2. Default: the run's own, or the only one for these data.
        pretrained: Pretrained folder with the initial weights of a new run.
    """

    run: str | Path | None
    data: str | Path | None
    tokenizer: str | Path | None
    pretrained: str | Path | None


@dataclass(frozen=True)
class Machines:
    """The machines of a planned run, as far as they are known.

    Args:
        nodes: Number of nodes (default: the recipe's).
        devices: Devices of each node (default: the recipe's).
        device_memory: Memory of a GPU, such as 80GB or 24GiB (default: that of the GPU of this machine).

    Raises:
        ValueError: if a number or the memory is out of range.
    """

    nodes: int | None = None
    devices: int | None = None
    device_memory: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "devices"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), "[1, inf)")
        if self.device_memory is not None:
            try:
                parse_size(self.device_memory)
            except ValueError as error:
                raise ValueError(f"device_memory {error}") from error


def plan_run(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> Plan:
    """Finds the folders of a run. See ``Folders`` for the arguments.

    Raises:
        ValueError: if the run has no name, or several tokenizers match.
        FileNotFoundError: if data or tokenizer are not named and do not exist.
    """
    shards, folder, found = find_data(recipe, data), run_folder(recipe, run), None
    if recipe.stage == "transformer":
        found = find_tokenizer(recipe, folder=folder, shards=shards, tokenizer=tokenizer, pretrained=pretrained)
    weights = None if pretrained is None else Path(pretrained) / recipe.stage
    return Plan(recipe, shards, folder, found, weights)


def run_folder(recipe: Recipe, run: str | Path | None = None) -> Path:
    """Finds the folder of a run, which need not exist; its default name is ``DATASET-RECIPE``. See ``folder_of``.

    Raises:
        ValueError: if the run has no name.
    """
    named = recipe.run_name if run is None else run
    if named is None:
        raise ValueError("a run with --config must have its own name; set it with --run")
    return folder_of(named)


def folder_of(run: str | Path) -> Path:
    """Returns the folder of a run: ``runs/NAME`` for a name; a ``Path`` or a string with a slash is the folder."""
    return Path(run) if isinstance(run, Path) or os.sep in run else _RUNS / run


def find_data(recipe: Recipe, data: str | Path | None = None) -> Path:
    """Finds the data folder of a run: the named one, else that of the repeated run, else that of the data set.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    shards = Path(data or recipe.paths.get("data.path") or _SHARDS / recipe.dataset)
    if not shards.is_dir():
        raise FileNotFoundError(
            f"data {shards}: no such folder; {how_to_get(recipe.dataset, shards)}, or name another with --data"
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

    The first that exists of: the named one; that of the repeated run; the run's own; that of ``pretrained``;
    the only tokenizer that other runs have trained on the data folder ``shards``.

    Raises:
        FileNotFoundError: if there is no tokenizer.
        ValueError: if other runs have trained several tokenizers on the same data.
    """
    # In the order of the docstring.
    if named := tokenizer or recipe.paths.get("model.tokenizer"):
        return Path(named)
    exported = folder / "pretrained" / "tokenizer"
    if (exported / "config.json").is_file():
        return exported
    if pretrained is not None and (Path(pretrained) / "tokenizer" / "config.json").is_file():
        return Path(pretrained) / "tokenizer"
    tokenizers = _tokenizers_of(shards, folder.parent)
    if len(tokenizers) != 1:
        several = f", and there are several others for these data: {', '.join(map(str, tokenizers))}"
        raise (ValueError if tokenizers else FileNotFoundError)(
            f"tokenizer {exported}: no such folder{several if tokenizers else ''}; train one with `maskgit train "
            "tokenizer`, or name another with --tokenizer"
        )
    log.info("tokenizer: %s, the only one trained on %s", tokenizers[0], shards)
    return tokenizers[0]


def _tokenizers_of(shards: Path, runs: Path) -> list[Path]:
    """Returns the tokenizers that runs have trained on a data folder."""
    tokenizers = []
    for config in sorted(runs.glob("*/tokenizer/config.yaml")):
        exported = config.parents[1] / "pretrained" / "tokenizer"
        # The data that the run was trained on, by its own record: names of runs say nothing about it.
        data = value_at(read_yaml(config), "data.path")
        if (exported / "config.json").is_file() and Path(data).resolve() == shards.resolve():
            tokenizers.append(exported)
    return tokenizers

"""Runs with different mask schedules and the same budget, as compared in Table 3 and Figure 8 of the paper."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from maskgit_pl.errors import PreemptedError
from maskgit_pl.runs.child import run_maskgit
from maskgit_pl.runs.flags import Overrides, flag_words
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET

__all__ = ["PAPER_SCHEDULES", "train_schedules"]

log = logging.getLogger(__name__)

PAPER_SCHEDULES = ("exp", "cubic", "square", "cosine", "linear", "sqrt", "log")  # paper, Table 3


def train_schedules(
    schedules: Sequence[str] = PAPER_SCHEDULES,
    *,
    names: str = "",
    dataset: str = DEFAULT_DATASET,
    cluster: str = "single",
    overrides: Overrides = (),
    runs: Path = Path("runs"),
    data: Path | None = None,
    tokenizer: Path | None = None,
) -> list[Path]:
    """Trains a transformer with each mask schedule, one after the other, each in a separate process.

    All recipes are read before the first run starts. Finished runs are not trained again.

    Args:
        schedules: Recipe names, one per schedule.
        names: Recipe names that come before that of the schedule, separated by spaces.
        dataset: Name of the data set.
        cluster: A file of ``recipes/cluster``.
        overrides: Values on top of every recipe; see ``Recipe.read``.
        runs: Folder of the runs.
        data: Data folder; None means that of the data set.
        tokenizer: Pretrained tokenizer folder; None means the only one for these data.

    Returns:
        The run folders, in the order of ``schedules``.

    Raises:
        FileNotFoundError: if a recipe does not exist.
        ValueError: if a recipe is invalid, or a training fails; its process has printed the reason.
        PreemptedError: if a training is stopped by a signal.
    """
    words = flag_words(overrides)
    # Read before the first training, so that a mistake in the last recipe is found now.
    recipes = {
        schedule: Recipe.read(
            "transformer", names=f"{names} {schedule}", dataset=dataset, cluster=cluster, overrides=words
        )
        for schedule in schedules
    }
    folders = ["--runs-folder", str(runs)]
    folders += [] if data is None else ["--data", str(data)]
    folders += [] if tokenizer is None else ["--tokenizer", str(tokenizer)]
    trained = []
    for place, (schedule, recipe) in enumerate(recipes.items(), start=1):
        name = str(recipe.run_name)
        log.info("mask schedule %s, %d of %d: run %s", schedule, place, len(recipes), name)
        run = ["--recipe", f"{names} {schedule}".strip(), "--dataset", dataset, "--run", name, *folders]
        _maskgit(schedule, "tokenize", *run, *words)
        _maskgit(schedule, "train", "transformer", *run, "--cluster", cluster, *words)
        trained.append(runs / name)
    return trained


def _maskgit(schedule: str, command: str, *words: str) -> None:
    code, is_stopped = run_maskgit([command, *words])
    if is_stopped or code == PreemptedError.exit_code:
        raise PreemptedError(f"ablation {schedule}: stopped by a signal; repeat the command to resume")
    if code != 0:
        raise ValueError(f"ablation {schedule}: `maskgit {command}` exited with {code}; repeat the command to resume")

"""``runs.fit``: trains a stage of a run from Python, as ``maskgit train`` does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl import interruption
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import Recipe

if TYPE_CHECKING:
    from maskgit_pl.runs.stage import FitResult

__all__ = ["fit"]


def fit(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> FitResult:
    """Trains a stage of a run and exports it, or resumes it where it stopped; a finished run is left as it is.

    While it trains, SIGTERM and one Ctrl-C save the run and end it with PreemptedError; the same call resumes it. An
    error of one of several ranks ends the processes with the exit code of the command, since ranks wait for each other.
    So does a step that hangs, which cannot raise.

    Args:
        recipe: Its values, and the stage.
        run: A name in ``runs/``, or a folder: a ``Path`` or a word with a slash. Default: ``DATASET-RECIPE``.
        data: Data folder. Default: ``data/shards/DATASET``.
        tokenizer: Pretrained tokenizer folder, for stage 2. Default: the run's own, or the only one of these data.
        pretrained: Pretrained folder whose weights a new run begins from.

    Raises:
        FileNotFoundError: if data, tokenizer or pretrained folder are not there.
        ValueError: if the recipe is wrong, data or tokenizer do not fit, the run would resume with other settings, or
            another process trains it.
        RunError: if training ends early: stopped by a signal, data that cannot be read, a full disk, losses that are
            not finite. See ``maskgit_pl.errors``.
        KeyboardInterrupt: at a second Ctrl-C. The run is as after a kill: the same call resumes it.
    """
    plan = plan_run(recipe, run=run, data=data, tokenizer=tokenizer, pretrained=pretrained)
    try:
        with interruption.catch_stop_signals(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*`srun` command is available")  # Lightning's, on a login node
            from maskgit_pl.runs.stage import fit_stage  # lightning and torch take seconds to import

            return fit_stage(plan)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # what Lightning makes of it
            raise KeyboardInterrupt from stop
        raise

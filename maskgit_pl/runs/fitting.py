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
    """Trains a stage of a run and exports it. Resumes an interrupted run, and does nothing for a finished one.

    During training, SIGTERM and a first Ctrl-C save the run and raise PreemptedError; the same call resumes it. With
    several ranks, an error of one rank ends all processes with the exit code of the command, since ranks wait for each
    other. A step that hangs ends the process in the same way.

    Args:
        recipe: Values of the run, and the stage.
        run: A name in ``runs/``, or a folder: a ``Path`` or a string with a slash. Default: ``DATASET-RECIPE``.
        data: Data folder. Default: ``data/shards/DATASET``.
        tokenizer: Pretrained tokenizer folder, for stage 2. Default: the run's own, or the only one for these data.
        pretrained: Pretrained folder with the initial weights of a new run.

    Raises:
        FileNotFoundError: if data, tokenizer or pretrained folder do not exist.
        ValueError: if the recipe is invalid, data or tokenizer do not fit, the settings of the run have changed, or
            another process trains it.
        RunError: if training ends early: a stop signal, unreadable data, a full disk, non-finite losses. See
            ``maskgit_pl.errors``.
        KeyboardInterrupt: at a second Ctrl-C. The same call resumes the run from its last checkpoint.
    """
    plan = plan_run(recipe, run=run, data=data, tokenizer=tokenizer, pretrained=pretrained)
    try:
        with interruption.catch_stop_signals(), warnings.catch_warnings():
            # Lightning warns on login nodes of Slurm.
            warnings.filterwarnings("ignore", message=".*`srun` command is available")
            from maskgit_pl.runs.stage import fit_stage  # lightning and torch take seconds to import

            return fit_stage(plan)
    except SystemExit as stop:
        # Lightning turns KeyboardInterrupt into SystemExit, which would end a notebook's kernel.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise

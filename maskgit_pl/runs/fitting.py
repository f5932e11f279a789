"""``runs.fit``: trains a stage of a run from Python, as ``maskgit train`` does."""

from __future__ import annotations

import itertools
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl import processes
from maskgit_pl.launcher import launcher_rank, local_rank
from maskgit_pl.locks import hold_lock
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.recipe import Recipe

if TYPE_CHECKING:
    from maskgit_pl.runs.stage import FitResult

__all__ = ["fit"]

log = logging.getLogger(__name__)


def fit(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
    fresh: bool = False,
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
        fresh: True starts over: an existing stage folder is renamed to ``STAGE.old-N``. Nothing is deleted.

    Raises:
        FileNotFoundError: if data, tokenizer or pretrained folder do not exist.
        ValueError: if the recipe is invalid, data or tokenizer do not fit, the settings of the run have changed, or
            another process trains it; also if ``fresh`` is set for one of several ranks.
        RunError: if training ends early: a stop signal, unreadable data, a full disk, non-finite losses. See
            ``maskgit_pl.errors``.
        KeyboardInterrupt: at a second Ctrl-C. The same call resumes the run from its last checkpoint.
    """
    plan = plan_run(recipe, run=run, data=data, tokenizer=tokenizer, pretrained=pretrained)
    # The other ranks start when the folder has its new name.
    old = _set_aside(plan.stage_folder) if fresh and local_rank() == 0 else None
    try:
        with processes.catch_stop_signals(), warnings.catch_warnings():
            # Lightning warns on login nodes of Slurm.
            warnings.filterwarnings("ignore", message=".*`srun` command is available")
            from maskgit_pl.runs.stage import fit_stage  # lightning and torch take seconds to import

            return fit_stage(plan)
    except SystemExit as stop:
        # Lightning turns KeyboardInterrupt into SystemExit, which would end a notebook's kernel.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise
    finally:
        if old is not None and not plan.stage_folder.exists():  # a check has refused the new run
            old.rename(plan.stage_folder)
            log.info("%s: renamed back, since the training did not start", plan.stage_folder)


def _set_aside(folder: Path) -> Path | None:
    """Renames a stage folder to the first free ``NAME.old-N``, and returns its new name; None if there is no folder.

    Raises:
        ValueError: if a launcher started several ranks, which would not see the change together, or another process
            trains the run.
    """
    if (count := launcher_rank()[1]) > 1:
        raise ValueError(
            f"--fresh must be given to a single process, got {count} ranks; train another run (--run), or rename "
            f"{folder} yourself"
        )
    if not folder.exists():
        return None
    with hold_lock(folder, hint="train another run (--run)"):
        names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
        old = next(each for each in names if not each.exists())
        folder.rename(old)
    log.info("%s: renamed to %s; training starts at step 0. Without --fresh, the same command resumes it", folder, old)
    return old

"""``runs.fit`` and ``runs.export``: train a stage of a run, and write a checkpoint of a run as a pretrained folder.

``maskgit train`` and ``maskgit export`` call them. All checks come before torch and Lightning are imported.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.data.folders import hold_lock
from maskgit_pl.files import check_writable
from maskgit_pl.processes import catch_stop_signals, launcher_rank, local_rank
from maskgit_pl.runs.plan import Plan, folder_of, plan_run
from maskgit_pl.runs.recipe import STAGES, Recipe, Stage

if TYPE_CHECKING:
    from maskgit_pl.runs.stage import FitResult

__all__ = ["export", "fit"]

log = logging.getLogger(__name__)

# Overrides of the run's settings: a single process on this machine, without the trackers and parts of its training.
_HERE = (
    "--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1",
    "--loggers=[]", "--callbacks=[]", "--profiler=null",
)  # fmt: skip


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
    several ranks, an error that only one rank has ends its process with the exit code of the command, and the other
    ranks, which would wait for it, with 70. A step that hangs ends the process with 70, too.

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
        with catch_stop_signals():
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


def export(
    run: str | Path,
    *,
    stage: Stage | None = None,
    step: int | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    replace: bool = False,
) -> Path:
    """Writes the averaged weights of a checkpoint as a pretrained folder, as training does at its end.

    A transformer that is written to another folder than ``RUN/pretrained`` gets a copy of its tokenizer there, so that
    the folder can be sampled from, or serve as the negative model of guidance.

    Args:
        run: A name in ``runs/``, or a folder.
        stage: Stage to export. Default: each stage with a checkpoint.
        step: Step of the checkpoint. Default: the newest one.
        data: Data folder of the run, if it has moved.
        out: Pretrained folder. Default: ``RUN/pretrained``.
        replace: True replaces an earlier export.

    Returns:
        The pretrained folder.

    Raises:
        FileNotFoundError: if run, stage, checkpoint, data or tokenizer do not exist.
        FileExistsError: if the folder holds an export, and ``replace`` is False or there are other files in it.
        ValueError: if a checkpoint is incomplete, the folder is not writable, or another process writes it.
    """
    folder = folder_of(run)
    out = folder / "pretrained" if out is None else Path(out)
    stages = _stages(folder, stage)
    check_writable("--out", out, is_folder=True)
    # Locked before it is checked, so that of two processes one is refused.
    with hold_lock(out, hint="give another --out"):
        for each in stages:
            if (out / each).exists() and not replace:
                raise FileExistsError(f"{out / each} exists; replace it with --replace, or write elsewhere with --out")
        # Everything is found before torch is imported and before anything is written.
        plans = [_plan(folder, each, data, out) for each in stages]
        chosen = [_checkpoint(plan, step) for plan in plans]
        from maskgit_pl.pipeline.pretrained import check_stage_folder  # lightning and torch take seconds to import
        from maskgit_pl.runs.stage import export_checkpoint

        for each in stages:
            check_stage_folder(out / each)
        for plan, checkpoint in zip(plans, chosen, strict=True):
            export_checkpoint(plan, checkpoint, out)
    return out


def _stages(folder: Path, named: Stage | None) -> Sequence[Stage]:
    """Returns the named stage, or all trained stages, the tokenizer first."""
    stages = [named] if named else [stage for stage in STAGES if (folder / stage / "checkpoints").is_dir()]
    for stage in stages:
        if not (folder / stage / "config.yaml").is_file():
            raise FileNotFoundError(f"run {folder} has no {stage}/config.yaml from training; name a run folder")
    if not stages:
        raise FileNotFoundError(f"run {folder} has no stage with checkpoints; name a run folder, such as runs/NAME")
    return stages


def _plan(folder: Path, stage: Stage, data: str | Path | None, out: Path) -> Plan:
    """Plans the stage as it was trained, but for a single process; data and tokenizer may have moved."""
    config = folder / stage / "config.yaml"
    recipe = Recipe.from_run(stage, config, _HERE)
    shards = Path(data or recipe.paths["data.path"])
    if not shards.is_dir():
        raise FileNotFoundError(f"data {shards} of {config}: no such folder; give its present place with --data")
    tokenizer = None
    if stage == "transformer":
        # The tokenizer may have moved with the run, or may be exported by this call.
        places = [Path(recipe.paths["model.tokenizer"]), folder / "pretrained" / "tokenizer", out / "tokenizer"]
        tokenizer = next((place for place in places if (place / "config.json").is_file()), None)
        if tokenizer is None:
            raise FileNotFoundError(
                f"tokenizer {places[0]} of {config}: no such folder; copy it back, or run `maskgit export {folder} "
                "--stage tokenizer` if the run trained it"
            )
    return Plan(recipe, shards, folder, tokenizer)


def _checkpoint(plan: Plan, step: int | None) -> Path:
    """Returns the complete checkpoint of a step, or the newest one."""
    from maskgit_pl.training.checkpoint_files import complete_checkpoints, step_of

    found = {step_of(path): path for path in complete_checkpoints(plan.checkpoints)}
    if not found or step not in {None, *found}:
        there = ", ".join(map(str, found)) or "none"
        wanted = "a complete checkpoint" if step is None else f"a complete checkpoint of step {step}"
        raise FileNotFoundError(
            f"{plan.checkpoints} must hold {wanted}, got steps: {there}; name one with --step, or the other stage with "
            "--stage"
        )
    return found[max(found) if step is None else step]

"""``runs.export``: writes the averaged weights of a checkpoint as a pretrained folder. ``maskgit export`` calls it."""

from __future__ import annotations

import logging
from pathlib import Path

from maskgit_pl.files import check_writable
from maskgit_pl.folders import hold_lock
from maskgit_pl.runs.plan import Plan, find_data, folder_of
from maskgit_pl.runs.recipe import STAGES, Recipe, Stage

log = logging.getLogger(__name__)

# Overrides of the run's settings: a single process on this machine, without the trackers and parts of its training.
_HERE = (
    "--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1",
    "--loggers=[]", "--callbacks=[]", "--profiler=null",
)  # fmt: skip


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

    A transformer that is written to another folder than ``RUN/pretrained`` gets a copy of its tokenizer
    there, so that the folder can be sampled from, or serve as the negative model of guidance.

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
    stages = [stage] if stage else [part for part in STAGES if (folder / part / "checkpoints").is_dir()]
    if not stages:
        raise FileNotFoundError(f"run {folder} has no stage with checkpoints; name a run folder, such as runs/NAME")
    check_writable("--out", out, is_folder=True)
    from maskgit_pl.pretrained.networks import check_stage_folder  # torch takes a second to import

    # Locked before it is checked, so that of two processes one is refused.
    with hold_lock(out, hint="give another --out"):
        for part in stages:
            if (out / part).exists() and not replace:
                raise FileExistsError(f"{out / part} exists; replace it with --replace, or write elsewhere with --out")
            check_stage_folder(out / part)
        # Everything is found before anything is written.
        plans = [_plan(folder, part, data, out) for part in stages]
        chosen = [_checkpoint(plan, step) for plan in plans]
        for plan, checkpoint in zip(plans, chosen, strict=True):
            _export_checkpoint(plan, checkpoint, out)
    return out


def _plan(folder: Path, stage: Stage, data: str | Path | None, out: Path) -> Plan:
    """Plans the stage as it was trained, but for a single process; data and tokenizer may have moved."""
    config = folder / stage / "config.yaml"
    recipe = Recipe.from_run(stage, config, _HERE)
    shards, tokenizer = find_data(recipe, data), None
    store = recipe.paths.get("data.token_store")
    if store is not None and not (folder / "tokens").is_dir():  # named by --data.token_store
        recipe = recipe.with_overrides([f"--data.token_store={store}"])
    if stage == "transformer" and "model.tokenizer" in recipe.paths:
        # The tokenizer may have moved with the run, or was exported to the same folder before.
        places = [Path(recipe.paths["model.tokenizer"]), folder / "pretrained" / "tokenizer", out / "tokenizer"]
        tokenizer = next((path for path in places if (path / "config.json").is_file()), places[0])
    return Plan(recipe, shards, folder, tokenizer)


def _checkpoint(plan: Plan, step: int | None) -> Path:
    """Returns the complete checkpoint of a step, or the newest one."""
    from maskgit_pl.training.checkpoints import complete_checkpoints, step_of  # Lightning takes seconds

    complete = {step_of(path): path for path in complete_checkpoints(plan.checkpoints)}
    if not complete or step not in {None, *complete}:
        raise FileNotFoundError(
            f"{plan.checkpoints} must hold a complete checkpoint{'' if step is None else f' of step {step}'}, got "
            f"steps: {', '.join(map(str, complete)) or 'none'}; name one with --step, or the other stage with --stage"
        )
    return complete[max(complete) if step is None else step]


def _export_checkpoint(plan: Plan, checkpoint: Path, out: Path) -> None:
    """Exports the averaged weights of a checkpoint, which any number of ranks wrote, by a plan of one CPU process."""
    from maskgit_pl.runs.fitting import build, export_run, restore_process_state
    from maskgit_pl.training.checkpoints import load_module, step_of

    with restore_process_state():
        run = build(plan)
        load_module(run.model, checkpoint)
        log.info("%s: %s", plan.stage_folder, checkpoint.name)
        export_run(run, out, step=step_of(checkpoint))

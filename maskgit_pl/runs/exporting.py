"""``runs.export``: writes a checkpoint of a run as a pretrained folder, on a single CPU process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskgit_pl.files import check_writable
from maskgit_pl.locks import hold_lock
from maskgit_pl.runs.plan import Plan, folder_of
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import STAGES, Stage

__all__ = ["export"]

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
    if recipe.get("data.stream") is None and not shards.is_dir():
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

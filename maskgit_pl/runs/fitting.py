"""``fit`` trains a stage of a run and exports it, ``export`` exports a checkpoint.

``maskgit train`` and ``maskgit export`` call them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from maskgit_pl.data import ShardDataConfig, split_batch
from maskgit_pl.devices import describe_environment
from maskgit_pl.files import check_writable, read_json, write_text
from maskgit_pl.folders import hold_lock
from maskgit_pl.networks.weights import load_weights
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.pretrained.networks import check_stage_folder, fingerprint, has_weights_of
from maskgit_pl.processes import catch_stop_signals
from maskgit_pl.runs.build import StageRun, build, restore_process_state
from maskgit_pl.runs.plan import Folders, Plan, find_data, folder_of, plan_run
from maskgit_pl.runs.recipe import STAGES, Recipe, Stage
from maskgit_pl.runs.resolve import AUTO, config_text
from maskgit_pl.text import count_text
from maskgit_pl.tokenizer.module import Tokenizer
from maskgit_pl.training.checkpoints import (
    FolderCheckpointIO,
    SavedTensor,
    complete_checkpoints,
    newest_checkpoint,
    step_of,
)

log = logging.getLogger(__name__)

_EXPORTED = "exported.json"  # in the stage folder: the exported step, and the hash of the export
# Overrides of the run's settings: a single process on this machine, without the trackers and parts of its training.
_HERE = (
    "--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1",
    "--loggers=[]", "--callbacks=[]", "--profiler=null",
)  # fmt: skip


@dataclass(frozen=True)
class FitResult:
    """The result of a fit.

    Args:
        folder: ``runs/RUN``.
        step: Step of the exported weights.
        was_finished: True if nothing was trained.
        metrics: Last validation metrics by name, ``val/...``.
    """

    folder: Path
    step: int
    was_finished: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def pretrained(self) -> Path:
        """The pretrained folder that the run has exported, for ``MaskGIT.from_pretrained``."""
        return self.folder / "pretrained"


def fit(recipe: Recipe, *, callbacks: Sequence[Callback] = (), **folders: Unpack[Folders]) -> FitResult:
    """Trains a stage of a run and exports it. Resumes an interrupted run, and does nothing for a finished one.

    During training, SIGTERM and a first Ctrl-C save the run and raise PreemptedError; the same call resumes it. With
    several ranks, an error that only one rank has ends its process with the exit code of the command, and the other
    ranks, which would wait for it, with 70. A step that hangs ends the process with 70, too.

    Args:
        recipe: Values of the run, and the stage.
        callbacks: Callbacks of the Trainer, beside those of the recipe.
        folders: See ``Folders``.

    Raises:
        FileNotFoundError: if data, tokenizer or pretrained folder do not exist.
        ValueError: if the recipe is invalid, data or tokenizer do not fit, an output cannot be written, the
            settings of the run have changed, or another process trains it.
        FileExistsError: if there are other files in the folder of the export.
        RunError: if training ends early: a stop signal, unreadable data, a full disk, non-finite losses. See
            ``maskgit_pl.errors``.
        KeyboardInterrupt: at a second Ctrl-C. The same call resumes the run from its last checkpoint.
    """
    plan = plan_run(recipe, **folders)
    try:
        with catch_stop_signals():
            return fit_stage(plan, callbacks)
    except SystemExit as stop:
        # Lightning turns KeyboardInterrupt into SystemExit, which would end a notebook's kernel.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


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
    if stage == "transformer":
        # The tokenizer may have moved with the run, or was exported to the same folder before.
        places = [Path(recipe.paths["model.tokenizer"]), folder / "pretrained" / "tokenizer", out / "tokenizer"]
        tokenizer = next((path for path in places if (path / "config.json").is_file()), places[0])
    return Plan(recipe, shards, folder, tokenizer)


def _checkpoint(plan: Plan, step: int | None) -> Path:
    """Returns the complete checkpoint of a step, or the newest one."""
    complete = {step_of(path): path for path in complete_checkpoints(plan.checkpoints)}
    if not complete or step not in {None, *complete}:
        raise FileNotFoundError(
            f"{plan.checkpoints} must hold a complete checkpoint{'' if step is None else f' of step {step}'}, got "
            f"steps: {', '.join(map(str, complete)) or 'none'}; name one with --step, or the other stage with --stage"
        )
    return complete[max(complete) if step is None else step]


@restore_process_state()
def fit_stage(plan: Plan, callbacks: Sequence[Callback] = ()) -> FitResult:
    """Trains a stage and exports it; does nothing if the run is finished. See ``fit`` for errors."""
    run = build(plan, callbacks)
    trainer = run.trainer
    newest = newest_checkpoint(plan.checkpoints)
    if newest is not None and step_of(newest) >= trainer.max_steps and _is_exported(plan, step_of(newest)):
        if trainer.is_global_zero:
            log.info("%s: finished at %s; nothing to do", plan.stage_folder, newest.name)
        return FitResult(plan.folder, step_of(newest), was_finished=True)
    _check_tasks(trainer)
    check_run_outputs(plan)
    with hold_lock(plan.stage_folder, hint="train another run (--run)") if trainer.is_global_zero else nullcontext():
        _fit(run)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return FitResult(plan.folder, trainer.global_step, metrics=metrics)


@restore_process_state()
def _export_checkpoint(plan: Plan, checkpoint: Path, out: Path) -> None:
    """Exports the averaged weights of a checkpoint, which any number of ranks wrote, by a plan of one CPU process."""
    run = build(plan)

    def only_weights(key: str, saved: SavedTensor) -> Tensor:
        # Optimizer states are not read.
        return saved.read_all() if key.startswith("/state_dict/") else torch.empty(0)

    load_weights(run.model, FolderCheckpointIO().load_pieces(checkpoint, only_weights)["state_dict"], checkpoint)
    log.info("%s: %s", plan.stage_folder, checkpoint.name)
    _export(run, out, step=step_of(checkpoint))


def describe_start(stage_folder: Path, max_steps: int) -> str:
    """Returns a line: whether the training starts, resumes or has nothing to do."""
    newest = newest_checkpoint(stage_folder / "checkpoints")
    if newest is None:
        return f"{stage_folder}: starts from scratch"
    if max_steps <= step_of(newest):
        return f"{stage_folder}: {newest.name} has all of {max_steps} steps; training has nothing to do"
    return f"{stage_folder}: resumes from {newest.name}"


def _check_tasks(trainer: Trainer) -> None:
    """Checks that ``srun`` has started the ranks for which Lightning will wait in a Slurm job."""
    if not isinstance(getattr(trainer.strategy, "cluster_environment", None), SLURMEnvironment):
        return
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1" and trainer.world_size > 1:
        raise ValueError(
            f"{trainer.world_size} ranks must be started with srun, got 1 task in a Slurm job of several; put `srun` "
            "before the command, use recipes/slurm/train.sbatch, or start the ranks with torchrun"
        )


def check_run_outputs(plan: Plan) -> None:
    """Checks all outputs of a stage, so that a training does not end with one that cannot be written."""
    exported, name = plan.folder / "pretrained" / plan.stage, f"run {plan.folder}: output"
    for folder in (plan.checkpoints, exported):
        check_writable(name, folder, is_folder=True)
    check_stage_folder(exported)  # which the export at the end replaces
    exported_tokenizer = plan.folder / "pretrained" / "tokenizer"
    if plan.tokenizer is None or has_weights_of(exported_tokenizer, plan.tokenizer):
        return
    check_stage_folder(exported_tokenizer)
    if (plan.folder / "tokenizer" / "config.yaml").is_file() and (exported_tokenizer / "config.json").is_file():
        raise ValueError(
            f"run {plan.folder} has trained a tokenizer of its own, which the export of {plan.tokenizer} would "
            "replace; name another run with --run, or leave out --tokenizer"
        )


def _is_exported(plan: Plan, step: int) -> bool:
    """Returns True if the pretrained folder of the run holds the weights of this step, not of an earlier one."""
    try:
        record: object = read_json(plan.stage_folder / _EXPORTED)
        return record == {"step": step, "sha256": fingerprint(plan.folder / "pretrained" / plan.stage)}
    except (OSError, ValueError):
        return False


def _fit(run: StageRun) -> None:
    """Trains from the newest checkpoint to the last step, and exports; rank 0 holds the lock of the stage folder."""
    plan, trainer = run.plan, run.trainer
    newest = newest_checkpoint(plan.checkpoints)
    if plan.pretrained is not None and newest is None:
        run.model.start_from(plan.pretrained)  # only a new run: a checkpoint has its own weights
    if trainer.is_global_zero:
        _write_records(run)
        _log_start(run, newest)
    # All ranks compare it before they train.
    run.checkpoints.resumes_from = newest
    with run.watchdog.watch(trainer):
        trainer.fit(run.model, datamodule=run.datamodule, ckpt_path=newest)
        _export(run, plan.folder / "pretrained", step=trainer.global_step)
        # Launchers end the remaining ranks soon after the first one exits, so all exit together.
        trainer.strategy.barrier("exported")


def _write_records(run: StageRun) -> None:
    """Writes the resolved recipe and the environment of a run, so that it can be repeated."""
    plan, recipe = run.plan, run.plan.recipe
    run.folder.mkdir(parents=True, exist_ok=True)
    write_text(run.folder / "config.yaml", config_text(run.values))
    environment = {
        "command": sys.argv,
        "recipe": recipe.names,
        "dataset": recipe.dataset,
        "data": str(plan.shards),
        **describe_environment(),
        "world_size": run.trainer.world_size,
    }
    if plan.pretrained is not None:
        environment["pretrained"] = {"folder": str(plan.pretrained), "sha256": fingerprint(plan.pretrained)}
    write_text(run.folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _log_start(run: StageRun, newest: Path | None) -> None:
    """Logs the starting point of the run, its precision and its batch."""
    plan = run.plan
    if plan.pretrained is not None and newest is None:
        log.info("%s: starts from the weights of %s", run.folder, plan.pretrained)
    if plan.recipe.get("trainer.precision") == AUTO and run.values.trainer.precision != "32-true":
        log.info("%s: trainer.precision %s: %s", run.folder, AUTO, run.values.trainer.precision)
    run.datamodule.warn_if_enlarged()
    if run.datamodule.stream is not None:
        log.info("%s: the order of a stream is not exact: a resumed run starts another order of shards", run.folder)
    resuming = f"; resuming from {newest.name}" if newest else ""
    batch = describe_batch(run.datamodule.config, run.trainer.world_size)
    log.info("%s: global batch %s%s", run.folder, batch, resuming)


def _export(run: StageRun, folder: Path, *, step: int) -> None:
    """Writes the averaged weights; must be called on every rank."""
    module = run.model
    if isinstance(module, Tokenizer):
        module.export(folder)
    else:
        module.export(folder, class_names=run.datamodule.class_names)
        if module.global_rank == 0:
            write_card(folder)
    if module.global_rank == 0:
        if folder == run.plan.folder / "pretrained":
            record = {"step": step, "sha256": fingerprint(folder / run.plan.stage)}
            write_text(run.folder / _EXPORTED, json.dumps(record))
        log.info("exported %s", folder)


def describe_batch(data: ShardDataConfig, ranks: int) -> str:
    """Returns the shares of the global batch, such as ``64 = 2 ranks x 1 accumulation step x 32 samples``.

    Raises:
        ValueError: if the ranks cannot share it.
    """
    per_device, accumulation = split_batch(data.global_batch, data.max_batch_per_device, ranks)
    parts = (count_text(ranks, "rank"), count_text(accumulation, "accumulation step"), count_text(per_device, "sample"))
    return f"{data.global_batch} = {' x '.join(parts)}"

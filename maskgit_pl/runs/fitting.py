"""Builds module, data and Trainer of a stage from its plan, trains it, and exports it.

``runs.fit`` calls ``fit_stage``. ``exporting``, ``slurm`` and ``doctor`` only ``build`` a run, which trains nothing.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler

from maskgit_pl.data import ShardData, ShardDataConfig, split_batch
from maskgit_pl.devices import default_device, describe_environment, has_bfloat16
from maskgit_pl.errors import is_user_error
from maskgit_pl.files import check_writable, read_json, read_yaml, write_text
from maskgit_pl.folders import hold_lock
from maskgit_pl.networks.weights import ZeroWeights
from maskgit_pl.pipeline.card import write_card
from maskgit_pl.pretrained.networks import check_stage_folder, fingerprint, has_weights_of
from maskgit_pl.processes import hide_launcher
from maskgit_pl.runs.callbacks import (
    ProgressLines,
    ReconstructionPictures,
    SamplePictures,
    UnreadableReport,
    callbacks,
)
from maskgit_pl.runs.plan import Inputs, Plan, merge_values, read_inputs
from maskgit_pl.runs.recipe import config_text
from maskgit_pl.runs.resolve import (
    Precision,
    ResolvedRun,
    TokenizerRun,
    TrainerSettings,
    fixed_settings,
    free_keys,
    list_changes,
    resolve,
)
from maskgit_pl.text import count_text
from maskgit_pl.tokenizer.module import Tokenizer
from maskgit_pl.training.checkpoints import (
    Checkpoints,
    FolderCheckpointIO,
    newest_checkpoint,
    read_settings,
    step_of,
)
from maskgit_pl.training.health import HealthMonitor
from maskgit_pl.training.loggers import TolerantLogger, loggers
from maskgit_pl.training.speed import SpeedMonitor
from maskgit_pl.training.stopping import StepCheck, Watchdog, disable_sigterm_handler
from maskgit_pl.training.strategies import build_strategy, check_strategy
from maskgit_pl.transformer.autoregressive import AutoregressiveModel
from maskgit_pl.transformer.distilled_model import DistilledModel
from maskgit_pl.transformer.mvtm import MaskedTokenModel
from maskgit_pl.transformer.token_model import TokenModel

log = logging.getLogger(__name__)

AUTO = "auto"

# The smallest widths that gain from bf16-mixed (docs/speed.md). On a CPU, a step of stage 1 takes 0.75 of its time with
# 64 base channels and 0.98 with 32, and a step of stage 2 takes 0.77 to 0.88 with 128 dimensions.
_KEYS = {"tokenizer": "base_channels", "transformer": "embed_dim"}
_WIDE = {"tokenizer": {"cpu": 64, "gpu": 64}, "transformer": {"cpu": 128, "gpu": 256}}

_WEIGHTS = ("tokenizer", "teacher")  # keys of the pretrained folders that a module of stage 2 uses
_EXPORTED = "exported.json"  # in the stage folder: the exported step, and the hash of the export

# Warnings of Lightning and torch that every run triggers and no user can act on.
_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the moving averages
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    "The '.*_dataloader' does not have many workers",  # num_workers is the recipe's choice
    "The number of training batches .* is smaller than the logging interval",  # we count steps across epochs
    "Checkpoint directory .* exists and is not empty",  # a run that resumes
    "`srun` command is available",  # on a login node of Slurm
)


@contextmanager
def restore_process_state() -> Iterator[None]:
    """Restores, at its end, what building and training a run change in the process, and frees the memory of the run.

    A later stage or a notebook then computes as in a new process. Also a decorator of a function. Variables of
    the environment that Lightning sets stay.
    """
    lightning, cudnn = logging.getLogger("lightning.pytorch"), torch.backends.cudnn
    level, threads, precision = lightning.level, torch.get_num_threads(), torch.get_float32_matmul_precision()
    allow_tf32, benchmark = cudnn.allow_tf32, cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    report_thread_error = threading.excepthook
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch: untyped
    devices = range(torch.cuda.device_count()) if has_cuda else ()
    try:
        threading.excepthook = partial(_skip_tensorboard, report_thread_error)
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            yield
    finally:
        threading.excepthook = report_thread_error
        lightning.setLevel(level)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        cudnn.allow_tf32, cudnn.benchmark = allow_tf32, benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        gc.collect()  # module, data and Trainer refer to one another


def _skip_tensorboard(report: Callable[[Any], object], error: threading.ExceptHookArgs) -> None:
    """Reports the error of a thread, except that of TensorBoard's writer, which ``TolerantLogger`` reports."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        report(error)


@dataclass(frozen=True)
class StageRun:
    """A stage of a run that is ready to train. Made by ``build``.

    Args:
        plan: Folders of the run, and the stage.
        values: All values of the run, with the chosen precision.
        datamodule: Data of the stage.
        model: Module of the stage.
        trainer: The Trainer.
        checkpoints: Callback that writes checkpoints; its ``settings`` must not change when the run resumes.
        watchdog: Callback that ends a run that hangs.
    """

    plan: Plan
    values: ResolvedRun
    datamodule: ShardData
    model: Tokenizer | TokenModel
    trainer: Trainer
    checkpoints: Checkpoints
    watchdog: Watchdog


def resolve_run(plan: Plan, inputs: Inputs, values: ResolvedRun | None = None) -> ResolvedRun:
    """Returns all values of a run with the chosen precision; builds them unless they are given."""
    values = values or resolve(plan.recipe.kind, merge_values(plan, inputs))
    precision = choose_precision(values.trainer, values.model.network, plan.stage, plan.stage_folder)
    return replace(values, trainer=replace(values.trainer, precision=precision))


def choose_precision(
    trainer: TrainerSettings, network: object, stage: str, folder: Path, *, on_gpu: bool = False
) -> Precision:
    """Returns the precision of a run, which is that of its recipe unless it is ``auto``.

    1. A run that has a checkpoint keeps the precision of its last start, so that it continues as it began.
    2. A wide network trains with ``bf16-mixed`` on GPUs, or on one CPU, that have instructions for bfloat16.
    3. Any other run trains with ``32-true``: the CPUs of several ranks could choose differently.

    Args:
        trainer: Settings of the Trainer.
        network: Configuration of the network.
        stage: Stage to train.
        folder: Stage folder.
        on_gpu: True for a run on a GPU with the instructions, which this machine may lack.
    """
    if trainer.precision != AUTO:
        return trainer.precision
    if newest_checkpoint(folder / "checkpoints") is not None:  # 1.
        return cast(Precision, read_yaml(folder / "config.yaml")["trainer"]["precision"])
    device = "cpu" if trainer.accelerator == "cpu" else default_device()
    size = getattr(network, _KEYS[stage], None)
    width = _WIDE[stage]["cpu" if device == "cpu" and not on_gpu else "gpu"]
    is_wide = isinstance(size, int) and size >= width  # the keys of plug-ins are theirs
    is_one_choice = trainer.strategy == "auto" or device != "cpu"
    is_fast = on_gpu or (is_one_choice and has_bfloat16(device))
    return "bf16-mixed" if is_wide and is_fast else "32-true"  # 2. and 3.


_MODULES: dict[str, type[Tokenizer] | type[MaskedTokenModel] | type[AutoregressiveModel]] = {  # by kind of recipe
    "tokenizer": Tokenizer,
    "transformer": MaskedTokenModel,
    "autoregressive": AutoregressiveModel,
    "distillation": DistilledModel,
}


def create_module(plan: Plan, values: ResolvedRun) -> Tokenizer | TokenModel:
    """Creates the module of a run, with initial weights."""
    return _MODULES[plan.recipe.kind](values.model)


def build(
    plan: Plan,
    callbacks: Sequence[Callback] = (),
    *,
    inputs: Inputs | None = None,
    values: ResolvedRun | None = None,
) -> StageRun:
    """Builds module, data and Trainer of a run, and divides its global batch among the devices. Trains nothing.

    It changes settings of the process, such as the threads of torch, which the training needs: call it inside
    of ``restore_process_state``.

    Args:
        plan: Folders of the run, and the stage.
        callbacks: Callbacks of the Trainer, beside those of the recipe.
        inputs: What the run reads first; None reads it.
        values: All values of the run, without the chosen precision; None builds them.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hide its tips and device lists
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    inputs = inputs or read_inputs(plan)
    values = resolve_run(plan, inputs, values)
    # Threads and precision of torch come before any computation.
    if values.cpu_threads is not None:
        torch.set_num_threads(values.cpu_threads)
    torch.set_float32_matmul_precision(values.matmul_precision)
    torch.backends.cudnn.allow_tf32 = values.matmul_precision != "highest"  # for convolutions
    # Only initial weights use torch's generator: all other random numbers are functions of the recipe's seed.
    torch.manual_seed(values.data.seed)
    data, module = ShardData(values.data, inputs.data), create_module(plan, values)
    weights = {name: fingerprint(path) for name in _WEIGHTS if (path := getattr(values.model, name, None)) is not None}
    fixed = fixed_settings(values.tree, free=free_keys(values.model), data=data.fingerprint, **weights)
    _check_unchanged(plan, fixed)
    watchdog = Watchdog(plan.stage_folder, seconds=values.hang_seconds)
    checkpoints = Checkpoints(
        plan.checkpoints,
        every_n_steps=values.checkpoint_every,
        keep_last=values.keep_last,
        keep_every=values.keep_every,
        settings=fixed,
    )
    run_callbacks = _build_callbacks(plan, values, data, (StepCheck(checkpoints), watchdog, checkpoints), callbacks)
    trainer = _build_trainer(plan, values, run_callbacks, longest_wait=watchdog.longest_limit)
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps must be >= 1, got {trainer.max_steps}; a run ends at this step")
    _, accumulation = split_batch(data.config.global_batch, data.config.max_batch_per_device, trainer.world_size)
    if isinstance(module, TokenModel):
        trainer.accumulate_grad_batches = accumulation
        _check_data_fit(module, data)
    else:
        # Stage 1 optimizes manually, so the Trainer must not accumulate.
        module.accumulation = accumulation
    # Steps in a recipe, but micro-batches in Lightning.
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval *= accumulation
    return StageRun(plan, values, data, module, trainer, checkpoints, watchdog)


def build_without_weights(plan: Plan) -> tuple[ResolvedRun, Tokenizer | TokenModel]:
    """Checks all values of a run, and returns them and its module with weights of zero.

    No file is written, and the process-wide settings of torch stay as they are.
    """
    with leave_no_trace():
        values = resolve_run(plan, read_inputs(plan))
        return values, create_module(plan, values)


@contextmanager
def leave_no_trace() -> Iterator[None]:
    """Builds runs of its context outside a launcher, with weights of zero and without warnings for a training."""
    with hide_launcher(), restore_process_state(), ZeroWeights():
        warnings.simplefilter("ignore")
        yield


def _check_unchanged(plan: Plan, fixed: Mapping[str, Any]) -> None:
    """Compares the fixed settings of a run with those of its newest checkpoint."""
    newest = newest_checkpoint(plan.checkpoints)
    if newest is not None and (changed := list_changes(read_settings(newest), fixed)):
        raise ValueError(
            f"cannot resume {plan.stage_folder} from step {step_of(newest)}: settings changed "
            f"({', '.join(changed)}). Restore them, or start a new run with --run; "
            "--pretrained starts it from existing weights"
        )


def _check_data_fit(module: TokenModel, data: ShardData) -> None:
    """Checks that a module of stage 2 has the classes of its data and no vectors, and its tokenizer their tokens."""
    expected_values: dict[str, Any] = {"num_classes": data.num_classes, "condition_dim": 0}
    if data.summary.tokens is not None:
        expected_values["grid"], expected_values["codebook_size"] = data.summary.tokens
    for key, expected in expected_values.items():
        if (value := getattr(module.config.network, key)) != expected:
            raise ValueError(
                f"model.network.{key} must be {expected} for {data.config.path}, got {value}; leave the key out or "
                "use other data"
            )
    if module.config.tokenizer is None:
        return
    tokenizer = module.tokenizer  # raises if it does not fit the model
    data.require_tokenizer(
        tokenizer.fingerprint, grid=tokenizer.grid, codebook_size=tokenizer.network.config.codebook_size
    )


def _build_trainer(plan: Plan, values: ResolvedRun, run_callbacks: list[Callback], *, longest_wait: float) -> Trainer:
    """Builds the Trainer with our checkpoint format and strategies."""
    settings = values.trainer
    if plan.stage == "tokenizer" and settings.gradient_clip_val is not None:
        raise ValueError("trainer.gradient_clip_val cannot be set for the tokenizer: set model.gradient_clip")
    profilers: dict[str, type[Profiler]] = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}
    profiler = profilers.get(values.profiler or "")
    ours = {
        "strategy": build_strategy(settings.strategy, longest_wait=longest_wait),
        "profiler": None if profiler is None else profiler(dirpath=plan.stage_folder, filename="profile"),
        "logger": _build_loggers(plan, values),
        "callbacks": run_callbacks,
        "plugins": [FolderCheckpointIO()],
        "default_root_dir": plan.stage_folder,
        "use_distributed_sampler": False,  # the data module divides the global order itself
        "enable_model_summary": False,
        "enable_progress_bar": sys.stdout.isatty(),
        # Runs are counted in steps: epochs neither end a run nor start a validation.
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "enable_checkpointing": True,
    }
    try:
        trainer = Trainer(**{**asdict(settings), **ours})
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        if is_user_error(error):
            raise
        raise ValueError(
            f"trainer: accelerator {settings.accelerator!r} with devices {settings.devices!r} is not available on this "
            f"machine ({' '.join(str(error).split())}); choose others with --trainer.accelerator and "
            "--trainer.devices, or use a machine that has them, with a torch that is built for them"
        ) from error
    check_strategy(settings.strategy, values.model, stage=plan.stage, ranks=trainer.world_size)
    # A signal sets a flag that the ranks exchange once a step.
    disable_sigterm_handler(trainer)
    return trainer


def _build_loggers(plan: Plan, values: ResolvedRun) -> list[TolerantLogger]:
    """Builds the loggers of the recipe, and checks that they can be used, before anything is trained."""
    built = list[TolerantLogger]()
    for spec in values.loggers:
        name = spec if isinstance(spec, str) else str(spec.get("name"))
        if name in (other.name for other in built):  # both would continue the run in NAME-run.txt
            raise ValueError(f"loggers must name each logger once, got {name!r} twice; remove one of them")
        tracker = loggers.build(spec)
        tracker.check()
        built.append(TolerantLogger(tracker, plan.stage_folder, name=name, settings=values.tree))
    return built


def _build_callbacks(
    plan: Plan, values: ResolvedRun, data: ShardData, saving: Sequence[Callback], more: Sequence[Callback]
) -> list[Callback]:
    """Builds the callbacks of a run in their order, with those that save and end it, and with ``more`` of Python."""
    folder = plan.stage_folder
    # A progress bar for a terminal, lines for a log file.
    progress: Callback = RichProgressBar() if sys.stdout.isatty() else ProgressLines()
    pictures: list[Callback] = [ReconstructionPictures(folder)]
    if plan.stage == "transformer":  # without a tokenizer there are no pictures
        pictures = [SamplePictures(folder, class_names=data.class_names)] if values.model.tokenizer else []
    # Health comes first: another callback may save a step and end the run. Speed comes last, so that it
    # does not count the pictures after a validation.
    health = [HealthMonitor()] if isinstance(values, TokenizerRun) else []
    named = [callbacks.build(spec).create(folder) for spec in values.callbacks]
    return [*health, *saving, progress, *pictures, UnreadableReport(folder), *named, *more, SpeedMonitor(folder)]


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


@restore_process_state()
def fit_stage(
    plan: Plan,
    callbacks: Sequence[Callback] = (),
    *,
    inputs: Inputs | None = None,
    values: ResolvedRun | None = None,
) -> FitResult:
    """Trains a stage and exports it; does nothing if the run is finished. See ``runs.fit`` and ``build``."""
    run = build(plan, callbacks, inputs=inputs, values=values)
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
        export_run(run, plan.folder / "pretrained", step=trainer.global_step)
        # Launchers end the remaining ranks soon after the first one exits, so all exit together.
        trainer.strategy.barrier("exported")


def _write_records(run: StageRun) -> None:
    """Writes the resolved recipe and the environment of a run, so that it can be repeated."""
    plan, recipe, folder = run.plan, run.plan.recipe, run.plan.stage_folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", config_text(run.values.tree))
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
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _log_start(run: StageRun, newest: Path | None) -> None:
    """Logs the starting point of the run, its precision and its batch."""
    plan, folder = run.plan, run.plan.stage_folder
    if plan.pretrained is not None and newest is None:
        log.info("%s: starts from the weights of %s", folder, plan.pretrained)
    if plan.recipe.get("trainer.precision") == AUTO and run.values.trainer.precision != "32-true":
        log.info("%s: trainer.precision %s: %s", folder, AUTO, run.values.trainer.precision)
    run.datamodule.warn_if_enlarged()
    if run.datamodule.stream is not None:
        log.info("%s: trains from trusted URLs; neither the order of samples nor the resume is exact", folder)
    resuming = f"; resuming from {newest.name}" if newest else ""
    batch = describe_batch(run.datamodule.config, run.trainer.world_size)
    log.info("%s: global batch %s%s", folder, batch, resuming)


def export_run(run: StageRun, folder: Path, *, step: int) -> None:
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
            write_text(run.plan.stage_folder / _EXPORTED, json.dumps(record))
        log.info("exported %s", folder)


def describe_batch(data: ShardDataConfig, ranks: int) -> str:
    """Returns the shares of the global batch, such as ``64 = 2 ranks x 1 accumulation step x 32 samples``."""
    per_device, accumulation = split_batch(data.global_batch, data.max_batch_per_device, ranks)
    parts = (count_text(ranks, "rank"), count_text(accumulation, "accumulation step"), count_text(per_device, "sample"))
    return f"{data.global_batch} = {' x '.join(parts)}"

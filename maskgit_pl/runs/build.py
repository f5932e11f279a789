"""Builds module, data and Trainer of a stage from its recipe. Used by ``fitting``, ``slurm`` and ``doctor``."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler
from torch import Tensor

from maskgit_pl.data import ShardData, split_batch
from maskgit_pl.errors import is_user_error
from maskgit_pl.networks.weights import ZeroWeights
from maskgit_pl.pretrained.networks import fingerprint
from maskgit_pl.processes import hide_launcher
from maskgit_pl.runs.callbacks import (
    ProgressLines,
    ReconstructionPictures,
    SamplePictures,
    UnreadableReport,
    callbacks,
)
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.resolve import choose_precision, fixed_settings, list_changes, merge_values
from maskgit_pl.runs.settings import ResolvedRun, TokenizerRun, resolve
from maskgit_pl.training.checkpoints import Checkpoints, FolderCheckpointIO, newest_checkpoint, read_settings, step_of
from maskgit_pl.training.health import HealthMonitor
from maskgit_pl.training.loggers import TolerantLogger, loggers
from maskgit_pl.training.speed import SpeedMonitor
from maskgit_pl.training.stopping import StepCheck, Watchdog, disable_sigterm_handler
from maskgit_pl.training.strategies import build_strategy, check_strategy
from maskgit_pl.transformer.distillation import DistilledModel
from maskgit_pl.transformer.token_model import TokenModel

log = logging.getLogger(__name__)

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


def build(plan: Plan, callbacks: Sequence[Callback] = ()) -> StageRun:
    """Builds module, data and Trainer of a run, and divides its global batch among the devices. Trains nothing.

    It changes settings of the process, such as the threads of torch, which the training needs: call it inside
    of ``restore_process_state``.

    Raises:
        FileNotFoundError: if a token store is missing.
        ValueError: if the recipe is invalid, data or tokenizer do not fit, or the settings of the run have changed.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hide its tips and device lists
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")
    values = resolve(plan.recipe.kind, merge_values(plan))
    # Only initial weights use torch's generator: all other random numbers are functions of the recipe's seed.
    torch.manual_seed(values.data.seed)
    run = StageRun(plan, values, callbacks)
    run.add_trainer()
    module, data, trainer = run.model, run.datamodule, run.trainer
    if trainer.max_steps < 1:
        raise ValueError(f"trainer.max_steps must be >= 1, got {trainer.max_steps}; a run ends at this step")
    _, accumulation = split_batch(data.config.global_batch, data.config.max_batch_per_device, trainer.world_size)
    if isinstance(module, TokenModel):
        trainer.accumulate_grad_batches = accumulation
        for key, expected in (("num_classes", data.num_classes), ("condition_dim", data.vector_dim)):
            if (value := getattr(module.config.network, key)) != expected:
                vectors = f" with data.vectors {data.config.vectors}" if key == "condition_dim" else ""
                raise ValueError(
                    f"model.network.{key} must be {expected} for {data.config.path}{vectors}, got {value}; leave the "
                    "key out or use other data"
                )
        tokenizer = module.tokenizer  # raises if it does not fit the model
        data.require_tokenizer(
            tokenizer.fingerprint, grid=tokenizer.grid, codebook_size=tokenizer.network.config.codebook_size
        )
    else:
        # Stage 1 optimizes manually, so the Trainer must not accumulate.
        module.accumulation = accumulation
    # Steps in a recipe, but micro-batches in Lightning.
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval *= accumulation
    return run


def build_without_weights(plan: Plan) -> StageRun:
    """Builds module and data of a run without a Trainer and with weights of zero. Checks all values of its recipe.

    No file is written, and the process-wide settings of torch stay as they are.

    Raises:
        ValueError: if a value is missing, out of range or unknown. The message names the key.
    """
    with leave_no_trace():
        return StageRun(plan, resolve(plan.recipe.kind, merge_values(plan)))


@contextmanager
def leave_no_trace() -> Iterator[None]:
    """Builds runs of its context outside a launcher, with weights of zero and without warnings for a training."""
    with hide_launcher(), restore_process_state(), ZeroWeights():
        warnings.simplefilter("ignore")
        yield


class StageRun:
    """A stage of a run: module and data, and after ``add_trainer`` also the Trainer.

    Args:
        plan: Folders of the run, and the stage.
        values: All values of the run.
        callbacks: Further callbacks of the Trainer.

    Attributes:
        plan: The plan.
        values: All values of the run, with the chosen precision.
        datamodule: Data of the stage.
        model: Module of the stage.
        trainer: The Trainer. Set by ``add_trainer``.
        fixed: Settings that must not change when the run resumes. Set by ``add_trainer``.
        checkpoints: Callback that writes checkpoints. Set by ``add_trainer``.
        watchdog: Callback that ends a run that hangs. Set by ``add_trainer``.
    """

    trainer: Trainer

    def __init__(self, plan: Plan, values: ResolvedRun, callbacks: Sequence[Callback] = ()) -> None:
        self.plan, self.folder, self.callbacks = plan, plan.stage_folder, callbacks
        precision = choose_precision(values.trainer, values.model.network, plan.stage, self.folder)
        self.values = replace(values, trainer=replace(values.trainer, precision=precision))
        # Threads and precision of torch come before any computation.
        if values.cpu_threads is not None:
            torch.set_num_threads(values.cpu_threads)
        torch.set_float32_matmul_precision(values.matmul_precision)
        torch.backends.cudnn.allow_tf32 = values.matmul_precision != "highest"  # for convolutions
        self.datamodule = ShardData(values.data)
        self.model = values.module(values.model)

    def add_trainer(self) -> None:
        """Builds the Trainer with our callbacks, checkpoint format and strategies.

        Raises:
            ValueError: if the settings of the run have changed since its last checkpoint, the stage does not
                support the strategy or the precision, or the devices do not exist.
        """
        self.fixed = self._fixed_settings()
        newest = newest_checkpoint(self.folder / "checkpoints")
        if newest is not None and (changed := list_changes(read_settings(newest), self.fixed)):
            raise ValueError(
                f"cannot resume {self.folder} from step {step_of(newest)}: settings changed "
                f"({', '.join(changed)}). Restore them, or start a new run with --run; "
                "--pretrained starts it from existing weights"
            )
        values = self.values.trainer
        if self.plan.stage == "tokenizer" and values.gradient_clip_val is not None:
            raise ValueError("trainer.gradient_clip_val cannot be set for the tokenizer: set model.gradient_clip")
        self.watchdog = Watchdog(self.folder, seconds=self.values.hang_seconds)
        profilers: dict[str, type[Profiler]] = {"simple": SimpleProfiler, "pytorch": PyTorchProfiler}
        profiler = profilers.get(self.values.profiler or "")
        ours = {
            "strategy": build_strategy(values.strategy, longest_wait=self.watchdog.longest_limit),
            "profiler": None if profiler is None else profiler(dirpath=self.folder, filename="profile"),
            "logger": self._build_loggers(),
            "plugins": [FolderCheckpointIO()],
            "default_root_dir": self.folder,
            "use_distributed_sampler": False,  # the data module divides the global order itself
            "enable_model_summary": False,
            "enable_progress_bar": sys.stdout.isatty(),
            # Runs are counted in steps: epochs neither end a run nor start a validation.
            "max_epochs": -1,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": True,
        }
        try:
            trainer = Trainer(**{**asdict(values), **ours}, callbacks=self._build_callbacks())
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            if is_user_error(error):
                raise
            raise ValueError(
                f"trainer: accelerator {values.accelerator!r} with devices {values.devices!r} is not available on this "
                f"machine ({' '.join(str(error).split())}); choose others with --trainer.accelerator and "
                "--trainer.devices, or use a machine that has them, with a torch that is built for them"
            ) from error
        check_strategy(values.strategy, self.values.model, stage=self.plan.stage, ranks=trainer.world_size)
        # A signal sets a flag that the ranks exchange once a step.
        disable_sigterm_handler(trainer)
        self.trainer = trainer

    def _fixed_settings(self) -> dict[str, Any]:
        weights = {}
        if self.plan.stage == "transformer":
            weights["tokenizer"] = fingerprint(Path(self.values.model.tokenizer))
        if isinstance(self.model, DistilledModel):
            weights["teacher"] = fingerprint(Path(self.values.model.teacher))
        return fixed_settings(self.values.tree, data=self.datamodule.fingerprint, **weights)

    def _find_vectors(self, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
        return self.datamodule.vector_pool("val").draw(labels, seeds)

    def _build_loggers(self) -> list[TolerantLogger]:
        """Builds the loggers of the recipe, and checks that they can be used, before anything is trained."""
        built = list[TolerantLogger]()
        for spec in self.values.loggers:
            name = spec if isinstance(spec, str) else str(spec.get("name"))
            if name in (other.name for other in built):  # both would continue the run in NAME-run.txt
                raise ValueError(f"loggers must name each logger once, got {name!r} twice; remove one of them")
            tracker = loggers.build(spec)
            tracker.check()
            built.append(TolerantLogger(tracker, self.folder, name=name, settings=self.values.tree))
        return built

    def _build_callbacks(self) -> list[Callback]:
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            every_n_steps=self.values.checkpoint_every,
            keep_last=self.values.keep_last,
            keep_every=self.values.keep_every,
            settings=self.fixed,
        )
        # A progress bar for a terminal, lines for a log file.
        progress: Callback = RichProgressBar() if sys.stdout.isatty() else ProgressLines()
        pictures: Callback = ReconstructionPictures(self.folder)
        if self.plan.stage == "transformer":
            find_vectors = self._find_vectors if self.datamodule.config.vectors else None
            pictures = SamplePictures(self.folder, class_names=self.datamodule.class_names, find_vectors=find_vectors)
        step_check, unreadable = StepCheck(self.checkpoints), UnreadableReport(self.folder)
        # Health comes first: another callback may save a step and end the run. Speed comes last, so that it
        # does not count the pictures after a validation.
        health = [HealthMonitor()] if isinstance(self.values, TokenizerRun) else []
        named = [callbacks.build(spec).create(self.folder) for spec in self.values.callbacks]
        usual = [step_check, self.watchdog, self.checkpoints, progress, pictures, unreadable]
        return [*health, *usual, *named, *self.callbacks, SpeedMonitor(self.folder)]

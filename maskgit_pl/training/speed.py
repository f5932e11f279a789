"""Callbacks that measure training: the total time of the steps of a run, and its speed, memory and norms as metrics.

``StepClock`` keeps the total in ``training_time.json``. ``SpeedMonitor`` logs at the Trainer's logging steps, for the
steps since the last time and without validations; both stages have it:

1. ``speed/images_per_second`` of all ranks together.
2. ``speed/data_wait``, the share of the time between micro-batches, in [0, 1]: waiting for data, and copying them.
   Writing a checkpoint is no part of it, but of the time.
3. ``speed/peak_memory_gb``, 10^9 bytes: of the GPU by torch, else of the process.
4. ``speed/tflops``, 10^12 FLOPs of the model per second and device, without recomputation, and
   ``speed/model_flops_utilization``, its share of the device's peak, for the GPUs of ``training.gpus``.
5. ``train/weight_norm``, the L2 norm of the trained weights, and ``train/weight_norm_discriminator``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from maskgit_pl.checks import build_dataclass
from maskgit_pl.distributed import device_name, peak_memory
from maskgit_pl.files import read_json, write_text
from maskgit_pl.training.gpus import find_gpu

__all__ = ["WARM_UP", "SpeedMonitor", "StepClock", "TrainingTime", "read_training_time", "weight_norm"]

log = logging.getLogger(__name__)

WARM_UP = 5  # first steps of a process, which allocate memory and choose kernels
_FILE_NAME = "training_time.json"  # in the stage folder


@dataclass(frozen=True)
class TrainingTime:
    """The time of the training steps of a run, without start-up and validation.

    Args:
        steps: Number of timed steps; all processes of a resumed run together.
        cpu_seconds: CPU seconds of the process of rank 0, all threads together.
        seconds: Wall-clock seconds.
        steady_steps: Number of steps after the first ``WARM_UP`` of each process.
        steady_cpu_seconds: CPU seconds of these steps.
        steady_seconds: Wall-clock seconds of these steps.
        device: Name of the device of rank 0.
        is_cpu: True if the device is a CPU.
    """

    steps: int = 0
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    steady_steps: int = 0
    steady_cpu_seconds: float = 0.0
    steady_seconds: float = 0.0
    device: str = ""
    is_cpu: bool = True

    @property
    def cost(self) -> float:
        """The seconds of all steps: CPU seconds on a CPU, else wall-clock seconds of the device."""
        return self.cpu_seconds if self.is_cpu else self.seconds

    @property
    def cost_per_step(self) -> float | None:
        """The mean cost of a step after the warm-up; None if no step was timed."""
        steady = self.steady_cpu_seconds if self.is_cpu else self.steady_seconds
        return steady / self.steady_steps if self.steady_steps else None


def read_training_time(folder: Path) -> TrainingTime | None:
    """Reads the time of the steps of a stage; None if its folder does not record it, or the file is damaged."""
    try:
        return build_dataclass(TrainingTime, read_json(folder / _FILE_NAME), _FILE_NAME)
    except (OSError, ValueError):
        return None


class StepClock(Callback):
    """A callback that measures training steps.

    The time from the start to the end of training counts, except validation. Reading data and writing checkpoints
    count, since they belong to a step. Data workers are processes of their own, whose CPU seconds do not count.

    ``training_time.json`` is written with each checkpoint and at the end. A run that resumes continues its total.

    Args:
        folder: Folder of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / _FILE_NAME
        self.total = TrainingTime()
        self._before = TrainingTime()  # total of earlier processes
        self._now = (0.0, 0.0)  # CPU and wall-clock seconds at the last reading
        self._is_running = False
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        self._first_step = trainer.global_step
        found = read_training_time(self.file.parent)
        # A longer record has steps that are trained again, or is that of another run.
        self._before = found if found is not None and 0 < found.steps <= trainer.global_step else TrainingTime()
        self.total = replace(self._before, device=device_name(device), is_cpu=device.type == "cpu")
        self._start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Only the end of the warm-up needs a reading; later steps cost one comparison.
        if trainer.global_step - self._first_step <= WARM_UP and self._is_running:
            self._count(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_running:
            self._count(trainer)
            self._is_running = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # which comes before the start of training
            self._start()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the file beside each checkpoint; the checkpoint itself has no times, since they are not exact."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)
        self._is_running = False

    def _start(self) -> None:
        self._now, self._is_running = _read_clocks(), True

    def _count(self, trainer: Trainer) -> None:
        """Adds the time since the last reading to the total."""
        cpu, wall = _read_clocks()
        passed_cpu, passed = cpu - self._now[0], wall - self._now[1]
        self._now = cpu, wall
        own = trainer.global_step - self._first_step
        steps = self._before.steps + own - self.total.steps
        is_steady = own > WARM_UP
        total = self.total
        self.total = replace(
            total,
            steps=total.steps + steps,
            cpu_seconds=total.cpu_seconds + passed_cpu,
            seconds=total.seconds + passed,
            steady_steps=total.steady_steps + steps * is_steady,
            steady_cpu_seconds=total.steady_cpu_seconds + passed_cpu * is_steady,
            steady_seconds=total.steady_seconds + passed * is_steady,
        )

    def _write(self, trainer: Trainer) -> None:
        if self._is_running:
            self._count(trainer)
        if trainer.is_global_zero:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.file, json.dumps(asdict(self.total), indent=2) + "\n")
            except OSError as error:  # such as a full disk: the other ranks know nothing of it, and training continues
                log.warning("%s cannot be written: %s; the time of this run will be incomplete", self.file, error)


class SpeedMonitor(Callback):
    """A callback that logs speed, memory and norms.

    Rank 0 measures its own time and memory, which are about those of every rank.

    Args:
        count_flops: Function that returns the model's FLOPs in a step of all ranks. Called once, at the first logging
            step.
        tensor_float32: True if float32 products use TF32, which has another peak.
    """

    def __init__(self, count_flops: Callable[[], float], *, tensor_float32: bool = False) -> None:
        self.count_flops = count_flops
        self.tensor_float32 = tensor_float32
        self._flops: float | None = None  # of a step; 0 if they cannot be counted
        self._logged_step = 0
        self._images = 0  # of this rank, since the last logging step
        self._waited = self._passed = 0.0  # seconds since the last logging step
        self._has_saved = False  # since the last micro-batch
        self._last: float | None = None  # time of the last reading; None before the training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer.global_step)
        self._last = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        passed = self._read_clock()
        # The time after a save is that of writing, beside which the wait for one micro-batch is nothing.
        self._waited += 0.0 if self._has_saved else passed
        self._has_saved = False
        self._images += len(batch.index)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._read_clock()
        # A micro-batch that ends no step leaves global_step as it is.
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # added at run time
        if is_logged and trainer.global_step > self._logged_step:
            values = {**self._measure(trainer, pl_module), **_weight_norms(trainer.optimizers)}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            self._restart(trainer.global_step)
            self._last = time.perf_counter()  # counting FLOPs, once, is no part of a step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._has_saved = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def _restart(self, step: int) -> None:
        self._logged_step, self._images, self._waited, self._passed = step, 0, 0.0, 0.0

    def _read_clock(self) -> float:
        """Returns the seconds since the last reading, and adds them to the total."""
        now = time.perf_counter()
        passed = 0.0 if self._last is None else now - self._last
        self._last, self._passed = now, self._passed + passed
        return passed

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        steps, seconds = trainer.global_step - self._logged_step, max(self._passed, 1e-9)
        values = {
            "speed/images_per_second": self._images * trainer.world_size / seconds,
            "speed/data_wait": self._waited / seconds,
            "speed/peak_memory_gb": peak_memory(pl_module.device) / 1e9,
        }
        if trainer.is_global_zero and self._flops_of_step() > 0:
            rate = self._flops_of_step() * steps / seconds / trainer.world_size
            values["speed/tflops"] = rate / 1e12
            peak = self._peak(pl_module.device, str(trainer.precision))
            if peak is not None:
                values["speed/model_flops_utilization"] = rate / peak
        return values

    def _flops_of_step(self) -> float:
        if self._flops is None:
            try:
                self._flops = self.count_flops()
            except Exception as error:  # of a network of another package, which need not run without content
                log.warning("the FLOPs of a step cannot be counted, and are not logged: %s", error)
                self._flops = 0.0
        return self._flops

    def _peak(self, device: torch.device, precision: str) -> float | None:
        """Returns the listed peak of a device in FLOP/s, or None if it is unknown."""
        gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        return None if gpu is None else gpu.rate(precision, tensor_float32=self.tensor_float32)


@torch.no_grad()
def weight_norm(optimizer: Optimizer) -> Tensor:
    """Computes the L2 norm of all trained weights of an optimizer; must be called on every rank.

    Returns:
        Scalar float tensor, over all shards.
    """
    norm = nn.utils.get_total_norm([each.detach() for group in optimizer.param_groups for each in group["params"]])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _read_clocks() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run after the call that starts them
    return time.process_time(), time.perf_counter()


def _weight_norms(optimizers: list[Optimizer]) -> dict[str, float]:
    names = ("train/weight_norm", "train/weight_norm_discriminator")
    return {name: float(weight_norm(each)) for name, each in zip(names, optimizers, strict=False)}

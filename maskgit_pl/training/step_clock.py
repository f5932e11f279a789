"""A callback that measures the time of training steps, and keeps the total of a run in ``training_time.json``."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.checks import build_dataclass
from maskgit_pl.files import read_json, write_text
from maskgit_pl.provenance import device_name

__all__ = ["WARM_UP", "StepClock", "TrainingTime", "read_training_time"]

log = logging.getLogger(__name__)

_FILE_NAME = "training_time.json"  # in the stage folder
WARM_UP = 5  # first steps of a process, which allocate memory and choose kernels


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


def _read_clocks() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels run after the call that starts them
    return time.process_time(), time.perf_counter()


def read_training_time(folder: Path) -> TrainingTime | None:
    """Reads the time of the steps of a stage; None if its folder does not record it, or the file is damaged."""
    try:
        return build_dataclass(TrainingTime, read_json(folder / _FILE_NAME), _FILE_NAME)
    except (OSError, ValueError):
        return None

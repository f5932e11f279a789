"""The callback that measures training: the time of all steps of a run, and speed and memory as metrics.

``SpeedMonitor`` logs at the Trainer's logging steps, for the steps since the last time and without validations:

1. ``speed/images_per_second`` of all ranks together.
2. ``speed/data_wait``, the share of the time between micro-batches, in [0, 1]: waiting for data, and copying
   them. Writing a checkpoint is no part of it, but of the time.
3. ``speed/peak_memory_gb``, 10^9 bytes: of the GPU by torch, else of the process.

It keeps the total in ``training_time.json``, which the ablation reads.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.checks import build_dataclass
from maskgit_pl.devices import device_name, peak_memory
from maskgit_pl.files import read_json, try_write_text

_FILE_NAME = "training_time.json"  # in the stage folder


@dataclass(frozen=True)
class TrainingTime:
    """The time of the training steps of a run, without start-up and validation.

    Args:
        steps: Number of timed steps; all processes of a resumed run together.
        cost: Seconds of rank 0: CPU seconds of all its threads on a CPU, else wall-clock seconds of the device.
        device: Name of the device of rank 0.
        is_cpu: True if the device is a CPU.
    """

    steps: int = 0
    cost: float = 0.0
    device: str = ""
    is_cpu: bool = True


def read_training_time(folder: Path) -> TrainingTime | None:
    """Reads the time of the steps of a stage; None if its folder does not record it, or the file is damaged."""
    try:
        return build_dataclass(TrainingTime, read_json(folder / _FILE_NAME), _FILE_NAME)
    except (OSError, ValueError):
        return None


class SpeedMonitor(Callback):
    """A callback that logs speed and memory, and keeps the time of all steps.

    Rank 0 measures its own time and memory, which are about those of every rank. The time from the start to
    the end of training counts, except validation. Reading data and waiting for checkpoints count, since
    they belong to a step. Data workers are processes of their own, whose CPU seconds do not count.

    ``training_time.json`` is written with each checkpoint and at the end. A run that resumes continues its total.

    Args:
        folder: Folder of the stage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = TrainingTime()  # of earlier processes
        self._first_step = 0  # of this process
        self._cost = 0.0  # seconds of this process
        self._logged_step = 0
        self._images = 0  # of this rank, since the last logging step
        self._waited = self._passed = 0.0  # seconds since the last logging step
        self._has_saved = False  # since the last micro-batch
        self._last: tuple[float, float] | None = None  # clocks of the last reading; None outside of training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        recorded = read_training_time(self.folder)
        # A longer record has steps that are trained again, or is that of another run.
        if recorded is not None and recorded.steps <= trainer.global_step:
            self._before = recorded
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._restart(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        passed = self._read_clocks(pl_module.device)
        # The time after a save is that of the copy, beside which the wait for one micro-batch is nothing.
        self._waited += 0.0 if self._has_saved else passed
        self._has_saved = False
        self._images += len(batch.index)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._read_clocks(pl_module.device)
        # A micro-batch that ends no step leaves global_step as it is.
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # added at run time
        if is_logged and trainer.global_step > self._logged_step:
            seconds = max(self._passed, 1e-9)
            values = {
                "speed/images_per_second": self._images * trainer.world_size / seconds,
                "speed/data_wait": self._waited / seconds,
                "speed/peak_memory_gb": peak_memory(pl_module.device) / 1e9,
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            self._restart(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the time beside each checkpoint; the checkpoint itself has no times, since they are not exact."""
        self._has_saved = True
        self._write_time(trainer, pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read_clocks(pl_module.device)
        self._last = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # which comes before the start of training
            self._last = _clocks()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_time(trainer, pl_module.device)
        self._last = None

    def _restart(self, trainer: Trainer) -> None:
        self._logged_step, self._images, self._waited, self._passed = trainer.global_step, 0, 0.0, 0.0
        self._last = _clocks()

    def _read_clocks(self, device: torch.device) -> float:
        """Returns the wall-clock seconds since the last reading, and adds the time to the totals."""
        if self._last is None:
            return 0.0
        now = _clocks()
        cpu, wall = (after - before for after, before in zip(now, self._last, strict=True))
        self._last = now
        self._passed += wall
        self._cost += cpu if device.type == "cpu" else wall
        return wall

    def _write_time(self, trainer: Trainer, device: torch.device) -> None:
        if not trainer.is_global_zero:
            return
        if device.type == "cuda":
            torch.cuda.synchronize()  # kernels run after the call that starts them
        self._read_clocks(device)
        before, steps = self._before, trainer.global_step - self._first_step
        cost, is_cpu = before.cost + self._cost, device.type == "cpu"
        total = TrainingTime(before.steps + steps, cost, device_name(device), is_cpu)
        try_write_text(self.folder / _FILE_NAME, json.dumps(asdict(total), indent=2) + "\n")


def _clocks() -> tuple[float, float]:
    """Returns CPU and wall-clock seconds."""
    return time.process_time(), time.perf_counter()

"""The callback that logs how fast a run is, its memory, and the norm of its weights; both stages have it.

At the Trainer's logging steps it logs, for the steps since the last time and without validations:

1. ``speed/images_per_second`` of all ranks together.
2. ``speed/data_wait``, the share of the time between micro-batches, in [0, 1]: waiting for data, and copying them.
   Writing a checkpoint is no part of it, but of the time.
3. ``speed/peak_memory_gb``, 10^9 bytes: of the GPU by torch, else of the process.
4. ``speed/tflops``, 10^12 FLOPs of the model per second and device, without recomputation, and
   ``speed/model_flops_utilization``, its share of the device's peak, for the GPUs of ``training.gpus``.
5. ``train/weight_norm``, the L2 norm of the trained weights, and ``train/weight_norm_discriminator``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from maskgit_pl.devices import peak_memory
from maskgit_pl.training.gpus import find_gpu

__all__ = ["SpeedMonitor", "weight_norm"]

log = logging.getLogger(__name__)


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


def _weight_norms(optimizers: list[Optimizer]) -> dict[str, float]:
    names = ("train/weight_norm", "train/weight_norm_discriminator")
    return {name: float(weight_norm(each)) for name, each in zip(names, optimizers, strict=False)}


@torch.no_grad()
def weight_norm(optimizer: Optimizer) -> Tensor:
    """Computes the L2 norm of all trained weights of an optimizer; must be called on every rank.

    Returns:
        Scalar float tensor, over all shards.
    """
    norm = nn.utils.get_total_norm([each.detach() for group in optimizer.param_groups for each in group["params"]])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

"""A progress callback for batch logs and CI: one line per interval instead of a progress bar."""

from __future__ import annotations

import logging
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

__all__ = ["ProgressLines"]

log = logging.getLogger(__name__)


class ProgressLines(ProgressBar):
    """A callback that logs step, metrics, speed and remaining time, at most once per interval.

    Args:
        seconds: Minimum time between two lines, in seconds.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._is_enabled = True
        self._start = (0.0, 0)  # time and step at the start of training
        self._last = 0.0  # time of the last line

    def enable(self) -> None:
        """Turns the lines on."""
        self._is_enabled = True

    def disable(self) -> None:
        """Turns the lines off; Lightning calls this on every rank except rank 0."""
        self._is_enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.monotonic()
        self._start = (self._last, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if now - self._last >= self.seconds:
            self._last = now
            self._log_line(trainer, pl_module, now)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_line(trainer, pl_module, time.monotonic())

    def _log_line(self, trainer: Trainer, pl_module: LightningModule, now: float) -> None:
        if not self._is_enabled:
            return
        begun, first = self._start
        # Speed since the start of this process: a resumed run counts only its own steps.
        speed = (trainer.global_step - first) / max(now - begun, 1e-9)
        left = (trainer.max_steps - trainer.global_step) / speed if speed > 0 else float("inf")
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
        log.info(
            "step %d/%d  %s  %.2f steps/s  %.0f s left", trainer.global_step, trainer.max_steps, shown, speed, left
        )

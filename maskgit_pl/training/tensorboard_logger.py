"""The TensorBoard logger of a run. Training continues if it cannot write, for example on a full disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

__all__ = ["RunLogger"]

log = logging.getLogger(__name__)

_PAUSE = 60.0  # seconds without further attempts after a failure


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, except that a failed write is skipped with a warning."""

    _paused_until = 0.0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._try(lambda: super(RunLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_image(self, name: str, picture: Image.Image, step: int) -> None:
        """Writes a picture at a step."""
        self._try(lambda: self.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC"))

    @rank_zero_only
    def save(self) -> None:
        self._try(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._try(lambda: super(RunLogger, self).finalize(status))

    def _try(self, write: Callable[[], object]) -> None:
        if time.monotonic() < self._paused_until:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            # Lightning wraps an error of the writer in a ValueError.
            reason = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(reason, OSError):
                raise
            self._experiment = None  # its writer thread is dead; a new writer starts a new file
            self._paused_until = time.monotonic() + _PAUSE
            text = "%s: TensorBoard logs cannot be written: %s; training continues without them for %.0f s"
            log.warning(text, Path(self.log_dir), reason, _PAUSE)

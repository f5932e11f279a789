"""The loggers of a run: trackers that a recipe names, which get its metrics and pictures.

A recipe lists them: ``loggers: [tensorboard, {name: wandb, project: faces}]``. ``runs.fitting`` puts a
``TolerantLogger`` around each one: training continues if a tracker fails, such as on a full disk. Trackers of
other packages are installed separately; see the extras of the package.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from maskgit_pl.files import write_text
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.text import printable

log = logging.getLogger(__name__)

_PAUSE = 60.0  # seconds without further attempts after a failure
_LONGEST_WRITE = 20.0  # seconds that training waits for a write; after 100 the watchdog would end the run


class LoggerSpec:
    """The base of registered loggers: a frozen dataclass of the values in a recipe, which builds a Lightning logger."""

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        """Builds the logger. Called on rank 0 only, at the start of training and again after a failure.

        Args:
            folder: Folder of the stage, ``runs/RUN/STAGE``.
            run_id: Name of the tracker's run that a resumed training continues; None starts a new one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define create(folder, *, run_id)")

    def check(self) -> None:
        """Checks before training that the tracker can be used."""

    def run_id(self, logger: Logger) -> str | None:
        """Returns the name under which the tracker continues this run; None if it has no runs.

        A new run with a name gets the complete recipe by ``logger.log_hyperparams``.
        """
        return None

    def log_image(self, logger: Logger, name: str, picture: Image.Image, step: int) -> None:
        """Sends a picture. By default nothing is sent: the stage folder has the newest picture."""


loggers: Registry[LoggerSpec] = Registry("logger", "maskgit_pl.loggers", check=derives_from(LoggerSpec))


@loggers.register("tensorboard")
@dataclass(frozen=True)
class TensorBoard(LoggerSpec):
    """Event files in the stage folder, for ``tensorboard --logdir runs`` and ``maskgit inspect``."""

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        return TensorBoardLogger(folder, name="", version="")

    def log_image(self, logger: Logger, name: str, picture: Image.Image, step: int) -> None:
        cast(TensorBoardLogger, logger).experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")


@loggers.register("csv")
@dataclass(frozen=True)
class CSV(LoggerSpec):
    """``csv/version_N/metrics.csv`` in the stage folder; each start of the training writes another version."""

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        return CSVLogger(folder, name="csv", flush_logs_every_n_steps=1)


@loggers.register("wandb")
@dataclass(frozen=True)
class WandB(LoggerSpec):
    """Weights & Biases. A resumed training continues the same run.

    The account, its team and the server are those of the environment (``WANDB_ENTITY``, ``WANDB_BASE_URL``):
    a recipe, which may come from elsewhere, cannot choose where a run is sent.

    Args:
        project: Name of the project.
        mode: ``online``, or ``offline`` for files in the stage folder that ``wandb sync`` sends later.
    """

    project: str = "maskgit_pl"
    mode: Literal["online", "offline"] = "online"

    def check(self) -> None:
        _require("wandb")
        import wandb

        if self.mode == "online" and not wandb.login(prompt=False):
            raise ValueError("logger 'wandb' must have an API key: run `wandb login`, or set mode: offline")

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        return WandbLogger(
            name=folder.parent.name,
            save_dir=folder,
            id=run_id,
            project=self.project,
            offline=self.mode == "offline",
            group=folder.parent.name,
            job_type=folder.name,
        )

    def run_id(self, logger: Logger) -> str | None:
        return str(cast(WandbLogger, logger).experiment.id)

    def log_image(self, logger: Logger, name: str, picture: Image.Image, step: int) -> None:
        cast(WandbLogger, logger).log_image(name, [picture], step=step)


@loggers.register("mlflow")
@dataclass(frozen=True)
class MLflow(LoggerSpec):
    """MLflow. A resumed training continues the same run.

    The environment variable ``MLFLOW_TRACKING_URI`` has the address of the server. Without it, all is written
    to the database ``mlflow.db`` of the stage folder, and the pictures to ``mlflow-files``.

    Args:
        experiment: Name of the experiment.
    """

    experiment: str = "maskgit_pl"

    def check(self) -> None:
        _require("mlflow")

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        return MLFlowLogger(
            experiment_name=self.experiment,
            run_name=f"{folder.parent.name}/{folder.name}",
            tracking_uri=address or f"sqlite:///{folder.absolute() / 'mlflow.db'}",
            artifact_location=None if address else str(folder.absolute() / "mlflow-files"),
            run_id=run_id,
        )

    def run_id(self, logger: Logger) -> str | None:
        return cast(MLFlowLogger, logger).run_id

    def log_image(self, logger: Logger, name: str, picture: Image.Image, step: int) -> None:
        tracker = cast(MLFlowLogger, logger)
        tracker.experiment.log_image(tracker.run_id, picture, key=name, step=step)


class TolerantLogger(Logger):
    """A logger that skips a failed write with a warning, and builds the tracker again a minute later.

    A write that takes longer than 20 seconds is left to its thread, and others are skipped until it has ended. The name
    under which a tracker continues a run is kept in ``NAME-run.txt`` of the stage folder. A new run of the tracker gets
    ``settings``, the complete recipe.
    """

    def __init__(self, spec: LoggerSpec, folder: Path, *, name: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.folder = folder
        self.settings = settings
        self._name = name
        self._inner: Logger | None = None
        self._paused_until = 0.0
        self._writing: threading.Thread | None = None  # the last write

    @property
    def name(self) -> str:
        """The registered name of the tracker."""
        return self._name

    @property
    def version(self) -> str:
        """An empty text: the stage folder is the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the stage."""
        return str(self.folder)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: a new run of a tracker gets the complete recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends numbers at a step. Another value is a mistake of the caller, not of the tracker."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._try(lambda inner: inner.log_metrics(numbers, step))

    @rank_zero_only
    def log_image(self, name: str, picture: Image.Image, step: int) -> None:
        """Sends a picture at a step."""
        self._try(lambda inner: self.spec.log_image(inner, name, picture, step))

    @rank_zero_only
    def save(self) -> None:
        """Writes what is waiting."""
        self._try(lambda inner: inner.save())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the tracker's part of this training, after the write that is on its way."""
        if self._writing is not None:
            self._writing.join(_LONGEST_WRITE)
        if self._inner is not None:
            self._try(lambda inner: inner.finalize(status))

    def _try(self, write: Callable[[Logger], object]) -> None:
        """Writes in a thread, and waits for it: a server that does not answer must not look like a step that hangs."""
        is_busy = self._writing is not None and self._writing.is_alive()
        if is_busy or time.monotonic() < self._paused_until:
            return
        self._writing = threading.Thread(target=self._write, args=(write,), name=f"logger {self._name}", daemon=True)
        self._writing.start()
        self._writing.join(_LONGEST_WRITE)
        if self._writing.is_alive():
            text = "%s: the logger %s has not answered for %.0f s; training continues without it until it does"
            log.warning(text, self.folder, self._name, _LONGEST_WRITE)

    def _write(self, write: Callable[[Logger], object]) -> None:
        try:
            write(self._open())
        except Exception as error:  # of another package, or of a server or disk
            self._inner = None  # TensorBoard's writer thread is dead; a new logger starts a new file
            self._paused_until = time.monotonic() + _PAUSE
            cause = error.__cause__ or error  # Lightning wraps some
            why = printable(" ".join(f"{type(cause).__name__}: {cause}".split()), limit=300)
            text = "%s: the logger %s failed: %s; training continues without it for %.0f s"
            log.warning(text, self.folder, self._name, why, _PAUSE)

    def _open(self) -> Logger:
        """Returns the tracker's logger; builds it at the first call and after a failure."""
        if self._inner is None:
            file = self.folder / f"{self._name}-run.txt"
            recorded_id = file.read_text().strip() or None if file.is_file() else None
            inner = self.spec.create(self.folder, run_id=recorded_id)
            run_id = self.spec.run_id(inner)
            if recorded_id is None and run_id is not None:
                inner.log_hyperparams(dict(self.settings))
                write_text(file, f"{run_id}\n")
            self._inner = inner
        return self._inner


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"logger {package!r} must have the package {package}: pip install 'maskgit_pl[{package}]'")

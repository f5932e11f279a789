"""The registry of loggers: trackers that a recipe names, which get the metrics and pictures of a run.

A recipe lists them: ``loggers: [tensorboard, {name: wandb, project: faces}]``. ``runs.build`` puts a ``TolerantLogger``
around each one. Trackers of other packages are installed separately; see the extras of the package.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from maskgit_pl.checks import check_choice, check_integer
from maskgit_pl.registry import Registry, derives_from

__all__ = ["CSV", "LoggerSpec", "MLflow", "TensorBoard", "WandB", "loggers"]

_NEVER = 1 << 62  # steps


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
        """Checks before training that the tracker can be used.

        Raises:
            ValueError: if it cannot, such as for a missing package.
        """

    def run_id(self, logger: Logger) -> str | None:
        """Returns the name under which the tracker continues this run; None if it needs no name."""
        return None

    def log_settings(self, logger: Logger, settings: Mapping[str, Any]) -> None:
        """Sends the complete recipe of a new run."""

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
    """``csv/version_N/metrics.csv`` in the stage folder; each start of the training writes another version.

    Args:
        flush_every: Number of logged steps that are written together, >= 1.
    """

    flush_every: int = 1

    def __post_init__(self) -> None:
        check_integer("flush_every", self.flush_every, "[1, 1000000]")

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        return _CountingCSVLogger(folder, flush_every=self.flush_every)


class _CountingCSVLogger(CSVLogger):
    """A CSV logger that counts logged steps. Lightning's writes at multiples of a step, which may never be logged."""

    def __init__(self, folder: Path, *, flush_every: int) -> None:
        super().__init__(folder, name="csv", flush_logs_every_n_steps=_NEVER)
        self._flush_every = flush_every
        self._logged_steps = 0
        self._last_step: int | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        super().log_metrics(dict(metrics), step)
        if step is None or step != self._last_step:  # callbacks and module log the same step in turn
            self._logged_steps, self._last_step = self._logged_steps + 1, step
        if self._logged_steps % self._flush_every == 0:
            self.save()


@loggers.register("wandb")
@dataclass(frozen=True)
class WandB(LoggerSpec):
    """Weights & Biases. A resumed training continues the same run.

    Args:
        project: Name of the project.
        entity: User or team; None for the default one of the account.
        mode: ``online``, or ``offline`` for files in the stage folder that ``wandb sync`` sends later.
    """

    project: str = "maskgit_pl"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("online", "offline"))

    def check(self) -> None:
        _require("wandb", "wandb")
        import wandb

        if self.mode == "online" and not wandb.login(prompt=False):
            raise ValueError("logger 'wandb' must have an API key: run `wandb login`, or set mode: offline")

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        return WandbLogger(
            name=folder.parent.name,
            save_dir=folder,
            id=run_id,
            project=self.project,
            entity=self.entity,
            offline=self.mode == "offline",
            group=folder.parent.name,
            job_type=folder.name,
        )

    def run_id(self, logger: Logger) -> str | None:
        return str(cast(WandbLogger, logger).experiment.id)

    def log_settings(self, logger: Logger, settings: Mapping[str, Any]) -> None:
        logger.log_hyperparams(dict(settings))

    def log_image(self, logger: Logger, name: str, picture: Image.Image, step: int) -> None:
        cast(WandbLogger, logger).log_image(name, [picture], step=step)


@loggers.register("mlflow")
@dataclass(frozen=True)
class MLflow(LoggerSpec):
    """MLflow. A resumed training continues the same run.

    Args:
        experiment: Name of the experiment.
        tracking_uri: Address of the server; None for the environment variable ``MLFLOW_TRACKING_URI`` or, without it,
            the database ``mlflow.db`` of the stage folder, with the pictures in ``mlflow-files``.
    """

    experiment: str = "maskgit_pl"
    tracking_uri: str | None = None

    def check(self) -> None:
        _require("mlflow", "mlflow")

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        address = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return MLFlowLogger(
            experiment_name=self.experiment,
            run_name=f"{folder.parent.name}/{folder.name}",
            tracking_uri=address or f"sqlite:///{folder.absolute() / 'mlflow.db'}",
            artifact_location=None if address else str(folder.absolute() / "mlflow-files"),
            run_id=run_id,
        )

    def run_id(self, logger: Logger) -> str | None:
        return cast(MLFlowLogger, logger).run_id

    def log_settings(self, logger: Logger, settings: Mapping[str, Any]) -> None:
        logger.log_hyperparams(dict(settings))

    def log_image(self, logger: Logger, name: str, picture: Image.Image, step: int) -> None:
        own = cast(MLFlowLogger, logger)
        own.experiment.log_image(own.run_id, picture, key=name, step=step)


def _require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"logger {package!r} must have the package {package}: pip install 'maskgit_pl[{extra}]'")

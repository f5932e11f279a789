"""The wrapper around each logger of a run. Training continues if a tracker fails, such as on a full disk.

``runs.build`` builds one for each logger of the recipe.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from maskgit_pl.files import write_text
from maskgit_pl.text import printable
from maskgit_pl.training.loggers import LoggerSpec

__all__ = ["TolerantLogger"]

log = logging.getLogger(__name__)

_PAUSE = 60.0  # seconds without further attempts after a failure
_LONGEST_WRITE = 20.0  # seconds that training waits for a write; after 100 the watchdog would end the run
_MOST_OF_AN_ID = 200  # characters


class TolerantLogger(Logger):
    """A logger that skips a failed write with a warning, and builds the tracker again a minute later.

    A write that takes longer than 20 seconds is left to its thread, and others are skipped until it has ended.

    The name under which a tracker continues a run is kept in ``NAME-run.txt`` of the stage folder.

    Args:
        spec: The tracker.
        folder: Folder of the stage.
        name: Registered name of the tracker, for messages and the file.
        settings: Complete recipe of the run, which a new run of the tracker gets.
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

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: a new run of a tracker gets the complete recipe."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Sends numbers at a step.

        Raises:
            ValueError: if a value is not a number. This is a mistake of the caller, not of the tracker.
        """
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
            text = "%s: the logger %s failed: %s; training continues without it for %.0f s"
            log.warning(text, self.folder, self._name, printable(_describe(error), limit=300), _PAUSE)

    def _open(self) -> Logger:
        """Returns the tracker's logger; builds it at the first call and after a failure."""
        if self._inner is None:
            known = self._read_run_id()
            inner = self.spec.create(self.folder, run_id=known)
            if known is None:
                self.spec.log_settings(inner, self.settings)
                self._keep_run_id(self.spec.run_id(inner))
            self._inner = inner
        return self._inner

    @property
    def _file(self) -> Path:
        return self.folder / f"{self._name}-run.txt"

    def _read_run_id(self) -> str | None:
        if not self._file.is_file():
            return None
        return printable(self._file.read_text().strip()[:_MOST_OF_AN_ID]) or None

    def _keep_run_id(self, run_id: str | None) -> None:
        if run_id is not None:
            write_text(self._file, f"{run_id}\n")


def _describe(error: BaseException) -> str:
    """Returns the cause of an error, which Lightning wraps, in one line."""
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())

"""Progress of long work: bars on a terminal, log lines every 15 seconds elsewhere.

Used by every command that works for longer than a few seconds. Training runs use ``maskgit_pl.training.progress``. The
lines go to the log, not to the output of a command.
"""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bars", "named_bars", "no_bars", "progress_bars"]

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_UPDATES = 0.1  # an update of a bar costs more than a small image
_SHOWN_BARS = 10  # with more bars, finished ones are hidden


class Bars(Protocol):
    """The type of a function that makes a progress bar."""

    def __call__(self, title: str, total: int, *, done: int = 0, unit: str = "") -> Callable[[int], None]:
        """Makes the bar of a task.

        Args:
            title: Title of the bar.
            total: Amount of work.
            done: Amount done by an earlier run, which does not count for the speed.
            unit: Unit of the amounts, such as ``"images"``.

        Returns:
            A function to call with each finished amount.
        """
        ...


def no_bars(title: str, total: int, *, done: int = 0, unit: str = "") -> Callable[[int], None]:
    """Returns a function that shows nothing, with the signature of ``Bars``."""
    return lambda count: None


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Bars]:
    """Yields a function that makes bars. Bars and log lines show the speed and the time left.

    Args:
        shown: False on all ranks except one.
    """
    if not shown:
        yield no_bars
    # A bar in a log file would be thousands of lines.
    elif not sys.stdout.isatty():
        yield _Lines
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        speed = TextColumn("{task.fields[speed]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
        with Progress(*columns, transient=True, speed_estimate_period=300) as progress:
            yield lambda title, total, *, done=0, unit="": _Bar(progress, title, total, done=done, unit=unit)


@contextmanager
def named_bars(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``advance(title, count, total)``, which adds to the bar of a title and makes it at the first call.

    Args:
        unit: Unit of the amounts, such as ``"images"``.
    """
    with progress_bars() as bars:
        made: dict[str, Callable[[int], None]] = {}

        def advance(title: str, count: int, total: int) -> None:
            if title not in made:
                made[title] = bars(title, total, unit=unit)
            made[title](count)

        yield advance


class _Bar:
    """A rich progress bar that is updated at most ten times per second."""

    def __init__(self, progress: Progress, title: str, total: int, *, done: int, unit: str) -> None:
        self.progress, self.total, self.done, self.unit = progress, total, done, unit
        self.task = progress.add_task(title, total=total, completed=done, speed="")
        self.updated = 0.0

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.updated < _SECONDS_BETWEEN_UPDATES and self.done < self.total:
            return
        self.updated = now
        task = self.progress.tasks[self.task]
        self.progress.update(self.task, completed=self.done, speed=_speed(task.speed or 0.0, self.unit))
        # More than ten bars would scroll the terminal: finished ones are hidden then.
        self.progress.update(self.task, visible=not task.finished or len(self.progress.tasks) < _SHOWN_BARS)


class _Lines:
    """A log line every 15 seconds. Speed and time left are those since the line before."""

    def __init__(self, title: str, total: int, *, done: int = 0, unit: str = "") -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.told, self.done_before = time.monotonic(), done

    def __call__(self, count: int) -> None:
        self.done += count
        # Only the work since the last line counts, so that a slow start does not distort the time left.
        now, made = time.monotonic(), self.done - self.done_before
        if now - self.told < _SECONDS_BETWEEN_LINES or not made:
            return
        speed = made / max(now - self.told, 1e-9)
        left = datetime.timedelta(seconds=round((self.total - self.done) / speed))
        amount = f"{self.done} of {self.total} {self.unit}".rstrip()
        log.info("%s: %s, %s, %s left", self.title, amount, _speed(speed, self.unit), left)
        self.told, self.done_before = now, self.done


def _speed(speed: float, unit: str) -> str:
    """Returns a speed such as ``0.50 images/s`` or ``37 images/s``; without a unit ``37/s``."""
    return f"{speed:.{2 if speed < 10 else 0}f} {unit}".rstrip() + "/s"

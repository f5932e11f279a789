"""Signals that ask a run to stop: they set a flag, and nothing else happens in the handler.

A handler that saved or talked to other ranks would do so in the middle of whatever runs: ranks that are not in step
wait for each other for ever. ``training.guards.Guard`` asks for the flag after each step, of all ranks at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["SIGNALS", "is_requested", "listen"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _Flag:
    """Whether this process was asked; processes that it forks, such as those that load data, go on."""

    process = -1
    is_set = False


def listen() -> None:
    """From now on the signals set the flag; called before anything slow is imported, so that none kills the process."""
    _Flag.process, _Flag.is_set = os.getpid(), False
    for number in SIGNALS:
        signal.signal(number, _set_flag)


def is_requested() -> bool:
    """Whether this process was asked to stop since ``listen``."""
    return _Flag.is_set


def _set_flag(number: int, frame: FrameType | None) -> None:
    if os.getpid() == _Flag.process:
        _Flag.is_set = True

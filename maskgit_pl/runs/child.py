"""Runs a ``maskgit`` command in a process of its own, which saves its work at a stop signal. Used by ablations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import IO

from maskgit_pl import processes

__all__ = ["run_maskgit"]

_SECONDS_BETWEEN_POLLS = 0.2


def run_maskgit(words: Sequence[str], output: IO[bytes] | None = None) -> tuple[int, bool]:
    """Runs ``maskgit``. A stop signal to this process is passed on, so that a training saves and ends.

    Args:
        words: Arguments of ``maskgit``.
        output: File for standard output and errors; None leaves them to this process's own.

    Returns:
        The exit code, and True if this process received a stop signal.
    """
    errors = None if output is None else subprocess.STDOUT
    with processes.catch_stop_signals():
        process = subprocess.Popen([sys.executable, "-m", "maskgit_pl", *words], stdout=output, stderr=errors)
        is_told = False
        try:
            while True:
                try:
                    return process.wait(timeout=_SECONDS_BETWEEN_POLLS), processes.is_requested()
                except subprocess.TimeoutExpired:
                    if processes.is_requested() and not is_told:
                        process.terminate()
                        is_told = True
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise

"""Hides the launcher of this process. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_launcher"]

_LAUNCHERS = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_")


@contextmanager
def without_launcher() -> Iterator[None]:
    """Hides the variables of a launcher that may have started this process: Lightning would take it for a rank."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_LAUNCHERS)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)

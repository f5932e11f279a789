"""The progress of a measurement, as whoever asks for it wants to show it; the command line passes bars or lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["Bars", "no_bars"]

Bars: TypeAlias = Callable[[str, int], Callable[[int], Any]]  # (title, total) -> advance(count)


def no_bars(title: str, total: int) -> Callable[[int], Any]:
    """Shows nothing."""
    return lambda count: None

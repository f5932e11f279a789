"""Numbers with their units, as people read them."""

from __future__ import annotations

__all__ = ["count_text", "duration_text", "flops_text"]


def count_text(count: int, noun: str) -> str:
    """Returns a number with its noun, such as ``1 node`` or ``1,024 nodes``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """Returns a duration in three digits, such as ``41 ms``, ``3.2 h`` or ``12 days``."""
    for unit, factor in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= (2 if unit == "days" else 1) * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def flops_text(count: float) -> str:
    """Returns a number of floating-point operations in three digits, such as ``1.2 TFLOP``."""
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"

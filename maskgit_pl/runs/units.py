"""Formatting and parsing of numbers with units: counts, FLOPs, sizes."""

from __future__ import annotations

import math
import re

__all__ = ["count_text", "flops_text", "parse_size"]

_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def count_text(count: int, noun: str) -> str:
    """Formats a count with its noun, such as ``1 node``, ``1,024 nodes`` or ``2 classes``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def flops_text(count: float) -> str:
    """Formats a number of floating-point operations with three digits, such as ``1.2 TFLOP``."""
    for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def parse_size(text: str) -> float:
    """Parses a size such as ``80GB``, ``24GiB`` or ``4e10``.

    Raises:
        ValueError: if the text is not such a size, or not a finite number above 0.
    """
    found = re.fullmatch(r"([\d.]+(?:[eE][+-]?\d+)?)\s*([KMGTP]?)(i?)[bB]?", text)
    try:
        value = float(found.group(1)) if found else 0.0
    except ValueError:
        value = 0.0
    if not found or not 0 < value < math.inf:
        raise ValueError(f"must be a size such as 80GB, 24GiB or 4e10, got {text}")
    # An i after the prefix means powers of 1024: 1e9 has 10 digits, so G is 1024**3.
    factor = _FACTORS[found.group(2)]
    return value * (1024 ** round(len(str(int(factor))) // 3) if found.group(3) else factor)

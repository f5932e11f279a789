"""What every benchmark needs: the matrix-product peak, interleaved times, peak memory in a fresh process, a table."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["MatrixProduct", "Stopwatch", "in_fresh_process", "interleave", "markdown_table", "peak_memory", "processor"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass
class Stopwatch:
    """Seconds of each named part, in the order of the parts.

    ``mark(name)`` closes a part that began where the last one ended.
    """

    parts: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def mark(self, name: str) -> None:
        """Ends the part ``name`` now."""
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts.values())


def interleave(contenders: Mapping[str, Callable[[Stopwatch], object]], *, repeats: int) -> dict[str, list[Stopwatch]]:
    """Times contenders in turn, A B A B, so that a machine that slows down slows all of them.

    Args:
        contenders: Each is called with a fresh stopwatch, which it marks.
        repeats: Rounds.

    Returns:
        The stopwatches of each contender, round by round.
    """
    measured: dict[str, list[Stopwatch]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            watch = Stopwatch()
            run(watch)
            measured[name].append(watch)
    return measured


class MatrixProduct:
    """A square matrix product, whose best rate is what a program can reach on this machine.

    Args:
        dtype: Of the factors.
        size: Rows and columns.
    """

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.flops = 2 * size**3
        self.left, self.right = (torch.randn(size, size).to(dtype) for _ in range(2))

    def __call__(self, watch: Stopwatch) -> None:
        torch.mm(self.left, self.right)
        watch.mark("product")

    def rate(self, *, repeats: int) -> float:
        """FLOP/s, the best of ``repeats``."""
        watches = interleave({"product": self}, repeats=repeats)["product"]
        return self.flops / min(watch.total for watch in watches)


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that ``run`` adds to the resident memory of this process at its highest; None where there is no /proc.

    The high-water mark of /proc/self/status belongs to this program alone, while ``ru_maxrss`` begins from the process
    that started it. Good to some tens of MB: the system may take pages of libraries back in the meantime.
    """
    if not _STATUS.exists():
        return None
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads what the first matrix product loads
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_fresh_process(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """The function's result from a new interpreter, which has nothing of this one's memory."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def processor() -> str:
    """The processor's name."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as an aligned Markdown table."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])

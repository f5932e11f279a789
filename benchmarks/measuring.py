"""Helpers of all benchmarks: matrix-product peak, interleaved timing, peak memory of a process, Markdown tables."""

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "CLOCKS",
    "MatrixProduct",
    "OperationCounter",
    "Stopwatch",
    "format_table",
    "interleave",
    "measure_peak_memory",
    "read_cpu_name",
    "run_in_fresh_process",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""The clocks of ``--clock``: seconds, and CPU seconds of all threads, for a machine on which other programs run."""

_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "unique2", "_unique2"}
_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass
class Stopwatch:
    """A stopwatch that adds up the seconds of named parts.

    ``mark(name)`` ends a part; the next part starts at the same moment.

    Attributes:
        parts: Seconds by part, in the order of their first ``mark``.
        clock: ``time.perf_counter``, or ``time.process_time``: CPU seconds of all threads of this process.
        last: Time of the last ``mark``.
    """

    parts: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.clock()

    def mark(self, name: str) -> None:
        """Ends the part ``name`` now; a part may be marked repeatedly."""
        now = self.clock()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last
        self.last = now

    @property
    def total(self) -> float:
        """The seconds of all parts."""
        return sum(self.parts.values())


def interleave(
    contenders: Mapping[str, Callable[[Stopwatch], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Stopwatch]]:
    """Times contenders in turn (A B A B), so that changes in the machine's speed affect all of them.

    Args:
        contenders: Functions by name. Each gets a fresh stopwatch and marks it.
        repeats: Number of rounds.
        clock: Clock of the stopwatches; CPU time is the more reliable one if other programs run.

    Returns:
        The stopwatches of each contender, one per round.
    """
    measured: dict[str, list[Stopwatch]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            watch = Stopwatch(clock=clock)
            run(watch)
            measured[name].append(watch)
    return measured


class OperationCounter(TorchDispatchMode):
    """A dispatch mode that counts kernels (calls that are not views) and synchronizations of host and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.syncs = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.kernels += not func.is_view
        self.syncs += name in _WAITS or (name == "index" and _has_mask(args))
        return func(*args, **kwargs or {})


def _has_mask(args: Any) -> bool:
    """Returns True if an index is a mask: the host must wait for the number of True values."""
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


class MatrixProduct:
    """A square matrix product; its best rate is the practical peak of this machine.

    Args:
        dtype: Number format of the factors.
        size: Number of rows and of columns.
    """

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.flops = 2 * size**3  # a multiplication and an addition for each of size^3 terms
        self.left, self.right = (torch.randn(size, size).to(dtype) for _ in range(2))

    def __call__(self, watch: Stopwatch) -> None:
        torch.mm(self.left, self.right)
        watch.mark("product")

    def rate(self, *, repeats: int) -> float:
        """Returns the best rate of ``repeats`` runs in FLOP/s."""
        watches = interleave({"product": self}, repeats=repeats)["product"]
        return self.flops / min(watch.total for watch in watches)


def measure_peak_memory(run: Callable[[], object]) -> int | None:
    """Returns the peak of the resident memory that ``run`` adds to this process, in bytes; None without /proc.

    Call it in a fresh process. It reads VmHWM of /proc/self/status, because ``ru_maxrss`` starts from the value of the
    parent process. The result is accurate to some tens of MB: the system may reclaim pages of libraries meanwhile.
    """
    if not _STATUS.exists():
        return None
    # Libraries that are loaded on first use are not memory of ``run``.
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads the libraries of the first matrix product
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run_in_fresh_process(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Returns the result of a function that runs in a new interpreter, without the memory of this one."""
    # "spawn" starts a new interpreter; a forked one would keep this memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def read_cpu_name() -> str:
    """Returns the name of the CPU."""
    # On Linux, ``platform`` does not know the name of the model.
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns an aligned Markdown table of rows with the same keys."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])

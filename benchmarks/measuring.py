"""Parts of all benchmarks: timing in turn, counted work, peak memory of a process, command line, report and tables."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from maskgit_pl.distributed import describe_environment

__all__ = [
    "CLOCKS",
    "DTYPES",
    "Contender",
    "Measured",
    "Precision",
    "Work",
    "autocast",
    "build_parser",
    "count_work",
    "format_table",
    "interleave",
    "list_precisions",
    "measure",
    "measure_peak_memory",
    "read_cpu_name",
    "run_in_fresh_process",
    "start",
    "write_report",
]

Precision = Literal["fp32", "bf16"]
"""Lightning's ``32-true`` and ``bf16-mixed``."""

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""The clocks of ``--clock``: seconds, and CPU seconds of all threads, for a machine on which other programs run."""

_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "unique2", "_unique2"}
_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


# Work


@dataclass(frozen=True)
class Work:
    """The work of one run.

    Args:
        flops: FLOPs of matrix products and convolutions, including attention and the backward pass.
        kernels: Number of operations that are not views.
        syncs: Number of times that the host would wait for a GPU.
    """

    flops: int
    kernels: int
    syncs: int


def count_work(run: Callable[[], object]) -> Work:
    """Runs a function once and returns its work."""
    with _WorkCounter() as counter:
        run()
    return Work(counter.flops, counter.kernels, counter.syncs)


class _WorkCounter(TorchDispatchMode):
    """Counts operations by torch's formulas; torch's ``FlopCounterMode`` fails in ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.kernels, self.syncs = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        packet = func.overloadpacket
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs or {}, out_val=result))
        self.kernels += not func.is_view
        self.syncs += packet.__name__ in _WAITS or (packet.__name__ == "index" and _has_mask(args))
        return result


def _has_mask(args: Any) -> bool:
    """Returns True if an index is a mask: the host must wait for the number of True values."""
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


def _attention_backward_flops(_: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention_flops(*args, **kwargs)  # twice the forward pass, as for every matrix product


def _linear_flops(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * prod(out_val.shape) * x.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {  # operations of a CPU for which torch has no formula
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.onednn.qlinear_pointwise: _linear_flops,
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.mkl._mkl_linear: _linear_flops,
}


# Time


def interleave(
    runs: Mapping[Any, Callable[[], object]], *, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, list[float]]:
    """Times functions in turn (A B A B), so that changes in the machine's speed affect all of them.

    Returns:
        The seconds of each function in each round.
    """
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            begun = clock()
            run()
            seconds[key].append(clock() - begun)
    return seconds


class _MatrixProduct:
    """A square matrix product; its best rate is the practical peak of this machine."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        self.flops = 2 * size**3  # a multiplication and an addition for each of size^3 terms
        self.left, self.right = (torch.randn(size, size).to(dtype) for _ in range(2))

    def __call__(self) -> Tensor:
        return torch.mm(self.left, self.right)

    def rate(self, seconds: Sequence[float]) -> float:
        """Returns the best rate in FLOP/s."""
        return self.flops / min(seconds)


@dataclass(frozen=True)
class Contender:
    """A function that is timed.

    Args:
        group: The task, such as a precision; contenders of a group are compared with its ``"ours"``.
        name: Its name.
        run: The function.
        work: Its work.
        dtype: Number format of the matrix product that gives the machine's peak.
        memory: Peak memory in bytes; None if it is not measured.
    """

    group: str
    name: str
    run: Callable[[], object]
    work: Work
    dtype: torch.dtype = torch.float32
    memory: int | None = None


@dataclass(frozen=True)
class Measured:
    """The measurements of a contender.

    Args:
        group: See ``Contender``.
        name: See ``Contender``.
        work: See ``Contender``.
        memory: See ``Contender``.
        seconds: Seconds of each round.
        ours: Seconds of ``"ours"`` of the group in the same rounds.
        peak: Best rate of a matrix product in the same rounds, in FLOP/s.
    """

    group: str
    name: str
    work: Work
    memory: int | None
    seconds: list[float]
    ours: list[float]
    peak: float

    def row(self, *, images: int = 1) -> dict[str, str]:
        """Returns the row of the table; times and counts are divided by a number of images."""
        middle, best = median(self.seconds), min(self.seconds)
        shares = [f"{100 * self.work.flops / seconds / self.peak:.0f}" for seconds in (middle, best)]
        ratio = median(its / ours for its, ours in zip(self.seconds, self.ours, strict=True))
        memory = {} if self.memory is None else {"memory GB": f"{self.memory / 1e9:.2f}"}
        return {
            "": self.group,
            "name": self.name,
            "s median": f"{middle / images:.3g}",
            "s best": f"{best / images:.3g}",
            "time / ours": f"{ratio:.2f}",
            "GFLOP": f"{self.work.flops / images / 1e9:.3g}",
            "% of peak: median (best)": f"{shares[0]} ({shares[1]})",
            "kernels": f"{self.work.kernels / images:.0f}",
            "syncs": f"{self.work.syncs / images:.0f}",
            **memory,
        }


def measure(
    contenders: Sequence[Contender],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    product_size: int = 2048,
) -> list[Measured]:
    """Times contenders in turn, all of them in memory, and the machine's peaks in the same rounds."""
    products = {contender.dtype: _MatrixProduct(contender.dtype, product_size) for contender in contenders}
    runs: dict[Any, Callable[[], object]] = {**products, **{(c.group, c.name): c.run for c in contenders}}
    for run in runs.values():
        run()  # warm-up
    seconds = interleave(runs, repeats=repeats, clock=clock)
    return [
        Measured(
            c.group, c.name, c.work, c.memory, seconds[c.group, c.name], seconds[c.group, "ours"],
            products[c.dtype].rate(seconds[c.dtype]),
        )
        for c in contenders
    ]  # fmt: skip


def list_precisions() -> list[Precision]:
    """Returns the precisions of this CPU; a CPU without bfloat16 instructions multiplies it in software."""
    # 512 is large enough for the comparison, and quick enough even in software.
    products = {dtype: _MatrixProduct(dtype, 512) for dtype in (torch.bfloat16, torch.float32)}
    seconds = interleave(products, repeats=4)
    if min(seconds[torch.bfloat16]) <= min(seconds[torch.float32]):
        return ["fp32", "bf16"]
    print("bf16 is left out: this CPU has no bfloat16 instructions")
    return ["fp32"]


def autocast(precision: Precision, device: str = "cpu") -> torch.autocast:
    """Returns the autocast context of Lightning's precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


# Memory


def measure_peak_memory(run: Callable[[], object]) -> int | None:
    """Returns the peak of the resident memory that ``run`` adds to this process, in bytes; None without /proc.

    Call it in a fresh process. It reads VmHWM of /proc/self/status, because ``ru_maxrss`` starts from the value of the
    parent process. The result is accurate to some tens of MB: the system may reclaim pages of libraries meanwhile.
    """
    if not _STATUS.exists():
        return None
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads the libraries of the first matrix product
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run_in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the result of a function that runs in a new interpreter, without the memory of this one."""
    # "spawn" starts a new interpreter; a forked one would keep this memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# Command line and report


def build_parser(description: str | None, *, repeats: int = 5, **sizes: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags that the benchmarks share, and a flag for each size with its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {"threads": torch.get_num_threads(), **sizes, "repeats": repeats}
    for name, default in counts.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=_positive, default=default, help="(%(default)s)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: if other programs run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def start(arguments: argparse.Namespace) -> None:
    """Applies the shared flags and prints the machine, so that results can be compared."""
    torch.set_num_threads(arguments.threads)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    print(f"{read_cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, n = {arguments.repeats} rounds")


def write_report(arguments: argparse.Namespace, measured: Sequence[Measured], *, images: int = 1) -> None:
    """Prints the table, and writes all numbers to the file of ``--json``."""
    for dtype_peak in sorted({one.peak for one in measured}):
        print(f"matrix-product peak: {dtype_peak / 1e9:.1f} GFLOP/s")
    print("\n" + format_table([one.row(images=images) for one in measured]))
    if arguments.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        environment = {**describe_environment(), "cpu": read_cpu_name()}
        content = {"environment": environment, "settings": settings, "measured": [asdict(one) for one in measured]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


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

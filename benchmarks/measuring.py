"""The harness of all benchmarks: timing in turn, counted work, peak memory of a process, command line and tables."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from maskgit_pl.devices import cpu_name, describe_environment, has_bfloat16

Precision = Literal["fp32", "bf16"]
"""Lightning's ``32-true`` and ``bf16-mixed``."""

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "unique2", "_unique2"}
_TORCH = Path(torch.__file__).parent


# Work


@dataclass
class Work:
    """The work of one run.

    Args:
        flops: FLOPs of matrix products and convolutions, including attention and the backward pass.
        kernels: Number of operations that are not views.
        waits: Number of times that the host would wait for a GPU, by file and line.
    """

    flops: int = 0
    kernels: int = 0
    waits: Counter[str] = field(default_factory=Counter)


def count_work(run: Callable[[], object]) -> Work:
    """Runs a function once and returns its work."""
    with _WorkCounter() as counter:
        run()
    return counter.work


class _WorkCounter(TorchDispatchMode):
    """Counts operations by torch's formulas; torch's ``FlopCounterMode`` fails in ``autograd.grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        packet = func.overloadpacket
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.work.flops += int(formula(*args, **kwargs or {}, out_val=result))
        self.work.kernels += not func.is_view
        # The host must wait for the number of True values of a mask.
        has_mask = packet.__name__ == "index" and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        if (packet.__name__ in _WAITS or has_mask) and (place := _find_caller()):
            self.work.waits[place] += 1
        return result


def _find_caller() -> str | None:
    """Returns file and line outside torch; None in an optimizer, whose counters of steps are on the CPU anyway."""
    frame = sys._getframe(2)
    while (path := Path(frame.f_code.co_filename)).is_relative_to(_TORCH) and frame.f_back is not None:
        if path.parent.name == "optim":
            return None
        frame = frame.f_back
    return f"{path.parent.name}/{path.name}:{frame.f_lineno}"


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


def _attention_backward_flops(_: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention_flops(*args, **kwargs)  # twice the forward pass, as for every matrix product


def _multi_head_attention_flops(query: Tensor, key: Tensor, value: Tensor, dim: int, *_: Any, **__: Any) -> int:
    # Four projections of D x D; scores and sums of all heads.
    return 8 * query.numel() * dim + 4 * query.numel() * key.shape[1]


def _encoder_layer_flops(x: Tensor, dim: int, *args: Any, **_: Any) -> int:
    return _multi_head_attention_flops(x, x, x, dim) + 4 * x.numel() * len(args[12])  # args[12]: the MLP's first weight


def _linear_flops(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * prod(out_val.shape) * x.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {  # operations for which torch has no formula
    torch.ops.aten._native_multi_head_attention: _multi_head_attention_flops,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.mkldnn._linear_pointwise: _linear_flops,
    torch.ops.mkl._mkl_linear: _linear_flops,
}


# Time


@dataclass
class Contender:
    """A function that is timed, and its measurements.

    Args:
        group: The task, such as a precision; contenders of a group are compared with its first one.
        name: Its name.
        run: The function.
        items: Number of items that it processes, such as images.
        work: Its work; None if it is not counted.
        dtype: Number format of the matrix product that gives the machine's peak.
        memory: Peak memory in bytes; None if it is not measured.
        seconds: Seconds per item of each round.
    """

    group: str
    name: str
    run: Callable[[], object]
    items: int = 1
    work: Work | None = None
    dtype: torch.dtype = torch.float32
    memory: int | None = None
    seconds: list[float] = field(default_factory=list)

    def row(self, first: Contender, peaks: Mapping[torch.dtype, float]) -> dict[str, str]:
        """Returns the row of the table, compared with the first contender of the group."""
        seconds = median(self.seconds)
        ratio = median(its / reference for its, reference in zip(self.seconds, first.seconds, strict=True))
        row = {
            "": self.group,
            "name": self.name,
            "s": f"{seconds:.3g}",
            "per s": f"{1 / seconds:,.0f}" if seconds < 0.01 else f"{1 / seconds:.3g}",
            "ratio": f"{ratio:.2f}",
        }
        if self.work is not None:
            flops = self.work.flops / self.items
            row |= {
                "GFLOP": f"{flops / 1e9:.3g}",
                "% of peak": f"{100 * flops / seconds / peaks[self.dtype]:.0f}",
                "kernels": f"{self.work.kernels / self.items:.0f}",
                "syncs": f"{self.work.waits.total() / self.items:.0f}",
            }
        if self.memory is not None:
            row["memory GB"] = f"{self.memory / 1e9:.2f}"
        return row


def measure(
    contenders: Sequence[Contender], *, repeats: int, clock: Callable[[], float], product_size: int = 2048
) -> dict[torch.dtype, float]:
    """Times contenders in turn (A B A B), so that changes in the machine's speed affect all of them.

    Returns:
        The machine's peaks: the best rates of a square matrix product in the same rounds, in FLOP/s, by torch
        itself or by oneDNN.
    """
    products = []
    for dtype in {contender.dtype for contender in contenders if contender.work is not None}:
        left, right = (torch.randn(product_size, product_size).to(dtype) for _ in range(2))
        has_onednn = dtype != torch.bfloat16 or has_bfloat16("cpu")
        for multiply in (torch.mm, _multiply_by_onednn) if has_onednn else (torch.mm,):
            products.append(Contender("", "", partial(multiply, left, right), dtype=dtype))
    for number in range(repeats + 1):
        for contender in (*products, *contenders):
            begun = clock()
            contender.run()
            if number > 0:  # round 0 is the warm-up
                contender.seconds.append((clock() - begun) / contender.items)
    peaks: dict[torch.dtype, float] = {}
    for product in products:
        peaks[product.dtype] = max(2 * product_size**3 / min(product.seconds), peaks.get(product.dtype, 0.0))
    return peaks


def _multiply_by_onednn(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return product


def children_cpu_seconds() -> float:
    """Returns the CPU seconds of the processes that this one started and that have ended: a clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def list_precisions() -> list[Precision]:
    """Returns the precisions of this CPU; a CPU without bfloat16 instructions multiplies it in software."""
    if has_bfloat16("cpu"):
        return ["fp32", "bf16"]
    print("bf16 is left out: this CPU has no bfloat16 instructions")
    return ["fp32"]


def autocast(precision: Precision, device: str = "cpu") -> torch.autocast:
    """Returns the autocast context of Lightning's precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


# Memory


def measure_peak_memory(run: Callable[[], object]) -> int:
    """Returns the peak of the resident memory that ``run`` adds to a new interpreter, in bytes (Linux).

    It reads VmHWM of /proc/self/status, because ``ru_maxrss`` starts from the value of the parent process. The result
    is accurate to some tens of MB: the system may reclaim pages of libraries meanwhile.
    """
    # "spawn" starts a new interpreter; a forked one would keep this memory.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory_of, run, torch.get_num_threads()).result()


def _peak_memory_of(run: Callable[[], object], threads: int) -> int:
    torch.set_num_threads(threads)
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads the libraries of the first matrix product
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# Command line and report


def build_parser(description: str | None, *, repeats: int = 5, **sizes: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags that the benchmarks share, and a flag for each size with its default."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="benchmarks/README.md describes the contenders and the columns of the table.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in {"threads": 1, **sizes, "repeats": repeats}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=default, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def start(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags, applies the shared ones, and prints the machine, so that results can be compared."""
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{cpu_name()}, {arguments.threads} threads, torch {torch.__version__}"
    seconds = "CPU seconds" if arguments.threads == 1 else "seconds"
    print(f"{machine}, {seconds}, medians of {arguments.repeats} rounds")
    return arguments


def compare(
    arguments: argparse.Namespace, contenders: Sequence[Contender], *, clock: Callable[[], float] | None = None
) -> None:
    """Measures contenders, prints the table, and writes all numbers to the file of ``--json``."""
    # Other programs hardly affect CPU seconds, but with several threads these do not tell how long the work takes.
    clock = clock or (time.process_time if arguments.threads == 1 else time.perf_counter)
    peaks = measure(contenders, repeats=arguments.repeats, clock=clock)
    for dtype, peak in peaks.items():
        print(f"matrix-product peak, {dtype}: {peak / 1e9:.1f} GFLOP/s")
    first: dict[str, Contender] = {}
    rows = [contender.row(first.setdefault(contender.group, contender), peaks) for contender in contenders]
    print("\n" + format_table(rows))
    for contender in contenders:
        if contender.work is not None and contender.work.waits:
            waits = ", ".join(f"{count} x {place}" for place, count in contender.work.waits.most_common())
            print(f"waits of a run, {contender.group}, {contender.name}: {waits}")
    if arguments.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        measured = [
            {"group": contender.group, **row, "seconds": contender.seconds}
            for contender, row in zip(contenders, rows, strict=True)
        ]
        environment = {**describe_environment(), "cpu": cpu_name()}
        content = {"environment": environment, "settings": settings, "measured": measured}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns an aligned Markdown table of rows with the same keys."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])

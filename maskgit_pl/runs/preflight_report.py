"""The machines and the result of ``preflight``: its checks, the samples of each rank, and the costs of the run.

Also formats and parses numbers with units. Imports no torch, so that invalid numbers are rejected immediately.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.errors import is_user_error
from maskgit_pl.training.gpus import GPUS

if TYPE_CHECKING:
    from maskgit_pl.runs.memory import Memory

__all__ = [
    "Check",
    "CheckList",
    "Machines",
    "Preflight",
    "RunCosts",
    "Shares",
    "Verdict",
    "count_text",
    "flops_text",
    "parse_size",
]

Verdict = Literal["ok", "warning", "error"]

_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}  # of the prefixes of a size
_MAX_ROWS = 16  # of the table of shares: with more ranks, a row is a node instead of a rank


@dataclass(frozen=True)
class Machines:
    """The machines of a planned run, as far as they are known.

    Attributes:
        nodes: Number of nodes, >= 1; None means that of the recipe.
        devices: Number of devices per node, >= 1; None means that of the recipe.
        gpu: Name of a GPU with known memory, a key of ``training.gpus.GPUS``.
        memory: Memory per device in bytes; None means that of ``gpu``, or of this machine's GPU.
        port: Port of rank 0, in [1, 65535]; None means ``MASTER_PORT``, or Lightning's choice.

    Raises:
        ValueError: if a number is out of range, or the GPU is unknown.
    """

    nodes: int | None = None
    devices: int | None = None
    gpu: str | None = None
    memory: float | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        for name, interval in (("nodes", "[1, inf)"), ("devices", "[1, inf)"), ("port", "[1, 65535]")):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), interval)
        if self.memory is not None:
            check_number("memory", self.memory, "(0, inf)")
        if self.gpu is not None:
            check_choice("gpu", self.gpu, GPUS)


@dataclass(frozen=True)
class Preflight:
    """The result of a preflight.

    Attributes:
        checks: All checks in the order in which they were done.
        shares: Samples of each rank; None if the ranks cannot share the global batch evenly.
        costs: Memory, disk space and FLOPs of the run; None if the module could not be built.
    """

    checks: tuple[Check, ...]
    shares: Shares | None = None
    costs: RunCosts | None = None

    @property
    def ok(self) -> bool:
        """A bool: no check has an error."""
        return not self.errors

    @property
    def errors(self) -> tuple[Check, ...]:
        """The checks with an error."""
        return tuple(check for check in self.checks if check.verdict == "error")

    def __str__(self) -> str:
        lines = [f"{check.verdict:7}  {check.name:10}  {check.text}" for check in self.checks]
        if self.costs is not None:
            lines += [f"{name:15}  {text}" for name, text in self.costs.lines]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        if self.errors:
            return f"{len(self.errors)} of {len(self.checks)} checks fail."
        return f"All {len(self.checks)} checks pass. Memory is calculated, not measured."


@dataclass(frozen=True)
class Check:
    """One check of a run.

    Attributes:
        name: Subject of the check, such as ``batch``.
        verdict: ``error`` if the run would not start; ``warning`` if it might not, or if too little is known.
        text: Result; for an error also the rule and a hint.
    """

    name: str
    verdict: Verdict
    text: str


class CheckList:
    """A list of checks in the order in which they are done.

    Args:
        on_check: Called with each check as soon as it is done.
    """

    def __init__(self, on_check: Callable[[Check], object] | None = None) -> None:
        self.checks: list[Check] = []
        self._on_check = on_check

    def add(self, name: str, text: str, verdict: Verdict = "ok") -> None:
        """Adds a check. An error that is already in the list is not repeated."""
        if verdict == "error" and any(check.text == text for check in self.checks):
            return
        self.checks.append(Check(name, verdict, text))
        if self._on_check is not None:
            self._on_check(self.checks[-1])

    @contextmanager
    def catch_errors(self, name: str) -> Iterator[None]:
        """Adds a user error that is raised in the context to the list; other errors are raised."""
        try:
            yield
        except Exception as error:
            if not is_user_error(error):
                raise
            self.add(name, str(error), "error")

    def names_with_errors(self) -> set[str]:
        """Returns the names of the checks with an error."""
        return {check.name for check in self.checks if check.verdict == "error"}


@dataclass(frozen=True)
class Shares:
    """The samples of a step for each rank.

    Micro-batch a of rank r has the samples [(a W + r) b, (a W + r + 1) b) of the global batch, with W ranks and b
    samples per micro-batch.

    Attributes:
        nodes: Number of nodes.
        devices: Number of devices, and of ranks, per node.
        per_device: b, samples per micro-batch.
        micro_batches: Micro-batches per step on each rank.
    """

    nodes: int
    devices: int
    per_device: int
    micro_batches: int

    @property
    def ranks(self) -> int:
        """The number of ranks W."""
        return self.nodes * self.devices

    @property
    def global_batch(self) -> int:
        """The number of samples of a step."""
        return self.ranks * self.micro_batches * self.per_device

    def samples_of(self, rank: int, *, count: int = 1, micro_batch: int = 0) -> range:
        """Returns the positions in the global batch of a micro-batch of ``count`` consecutive ranks."""
        first = (micro_batch * self.ranks + rank) * self.per_device
        return range(first, first + count * self.per_device)

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yields node, local rank, global rank and samples of each rank, or of each node if there are many ranks."""
        width = 1 if self.ranks <= _MAX_ROWS else self.devices  # ranks per row
        for rank in range(0, self.ranks, width):  # one row each
            node, local_rank = divmod(rank, self.devices)
            # The first three micro-batches show the pattern.
            shown = range(min(3, self.micro_batches))
            samples = [_span(self.samples_of(rank, count=width, micro_batch=each)) for each in shown]
            more = ", ..." if self.micro_batches > len(shown) else ""
            ranks, local_ranks = range(rank, rank + width), range(local_rank, local_rank + width)
            yield str(node), _span(local_ranks), _span(ranks), ", ".join(samples) + more
            if rank // width == _MAX_ROWS - 1 and self.ranks // width > _MAX_ROWS:
                yield "...", "...", "...", f"up to rank {self.ranks - 1}"
                break


@dataclass(frozen=True)
class RunCosts:
    """The calculated costs of a run.

    Attributes:
        num_parameters: Number of trained parameters.
        memory: Peak memory of a rank in bytes.
        checkpoint_bytes: Size of a checkpoint in bytes.
        step_flops: FLOPs of a step of all ranks, without the recomputation of activation checkpointing.
        lines: Description of the costs as pairs of a name and a text.
    """

    num_parameters: int
    memory: Memory
    checkpoint_bytes: int
    step_flops: float
    lines: tuple[tuple[str, str], ...]


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


def _span(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"

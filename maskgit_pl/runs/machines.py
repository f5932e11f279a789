"""The machines of a planned run. Imports no torch, so that invalid numbers are rejected immediately."""

from __future__ import annotations

from dataclasses import dataclass

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.training.gpus import GPUS

__all__ = ["Machines"]


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

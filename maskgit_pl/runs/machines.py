"""The machines of a planned run. Imports no torch, so that invalid numbers are rejected immediately."""

from __future__ import annotations

from dataclasses import dataclass

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.estimates.gpus import GPUS

__all__ = ["Machines"]

_LINK_BANDWIDTH = 100e9  # bytes/s that a device sends within a node
_NETWORK_BANDWIDTH = 25e9  # bytes/s of a node with one network port of 200 Gbit/s


@dataclass(frozen=True)
class Machines:
    """The machines of a planned run, as far as they are known.

    Attributes:
        nodes: Number of nodes, >= 1; None means that of the recipe.
        devices: Number of devices per node, >= 1; None means that of the recipe.
        gpu: Name of a GPU with known memory and peak rates, a key of ``estimates.gpus.GPUS``.
        memory: Memory per device in bytes; None means that of ``gpu``, or of this machine's GPU.
        flops: Achieved FLOP/s per device; None means ``utilization`` times the peak of ``gpu``.
        utilization: Fraction of the peak that training achieves, in (0, 1].
        bandwidth: Bytes per second that a device sends within a node, or all network ports of a node between nodes;
            None means 100e9 within a node and 25e9 between nodes.
        port: Port of rank 0, in [1, 65535]; None means ``MASTER_PORT``, or Lightning's choice.

    Raises:
        ValueError: if a number is out of range, or the GPU is unknown.
    """

    nodes: int | None = None
    devices: int | None = None
    gpu: str | None = None
    memory: float | None = None
    flops: float | None = None
    utilization: float = 0.4
    bandwidth: float | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        for name, interval in (("nodes", "[1, inf)"), ("devices", "[1, inf)"), ("port", "[1, 65535]")):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), interval)
        for name in ("memory", "flops", "bandwidth"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "(0, inf)")
        check_number("utilization", self.utilization, "(0, 1]")
        if self.gpu is not None:
            check_choice("gpu", self.gpu, GPUS)

    def achieved_flops(self, precision: str, *, tensor_float32: bool) -> float | None:
        """Returns the FLOP/s that training achieves on a device, or None if it is unknown.

        Args:
            precision: Precision of the Trainer, such as ``bf16-mixed``.
            tensor_float32: True if float32 products use TF32.
        """
        if self.flops is not None:
            return self.flops
        if self.gpu is None:
            return None
        return self.utilization * GPUS[self.gpu].rate(precision, tensor_float32=tensor_float32)

    def bandwidth_over(self, nodes: int) -> float:
        """Returns the bandwidth of the slowest link between devices of ``nodes`` nodes, in bytes per second."""
        return self.bandwidth or (_LINK_BANDWIDTH if nodes == 1 else _NETWORK_BANDWIDTH)

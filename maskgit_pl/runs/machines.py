"""The machines that a run is planned for. Imports no torch, so that a wrong number is refused at once."""

from __future__ import annotations

from dataclasses import dataclass

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.estimates.gpus import GPUS

__all__ = ["Machines"]

_LINK_BANDWIDTH, _NETWORK_BANDWIDTH = 100e9, 25e9  # bytes/s of a device in a node; of a node's one port of 200 Gbit/s


@dataclass(frozen=True)
class Machines:
    """The machines that a run is planned for, as far as they are known.

    Attributes:
        nodes: Number of nodes, at least 1; None takes the recipe's.
        devices: Number of devices of each node, at least 1; None takes the recipe's.
        gpu: Name of a device whose memory and peak rates are known, a key of ``estimates.gpus.GPUS``.
        memory: Bytes of a device; None takes the card's, or that of this machine's GPU.
        flops: FLOP/s that training reaches on a device; None takes ``utilization`` of the card's peak.
        utilization: Share of the card's peak that training reaches, in (0, 1].
        bandwidth: Bytes per second that a device sends within a node, or that all network ports of a node send between
            nodes; None takes 100e9 within a node and 25e9 between nodes.
        port: Port of rank 0, in [1, 65535]; None takes ``MASTER_PORT``, or Lightning's choice.

    Raises:
        ValueError: if a number is out of range, or the card is unknown.
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
        """Returns the FLOP/s that training reaches on a device; None if nothing says it.

        Args:
            precision: Of the Trainer, such as ``bf16-mixed``.
            tensor_float32: Whether float32 products are rounded to TF32.
        """
        if self.flops is not None:
            return self.flops
        if self.gpu is None:
            return None
        return self.utilization * GPUS[self.gpu].rate(precision, tensor_float32=tensor_float32)

    def bandwidth_over(self, nodes: int) -> float:
        """Returns the bytes per second at the slowest place that traffic between devices of so many nodes crosses."""
        return self.bandwidth or (_LINK_BANDWIDTH if nodes == 1 else _NETWORK_BANDWIDTH)

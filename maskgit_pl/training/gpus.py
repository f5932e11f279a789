"""Common GPUs, and the machines of a planned run. Imports no torch, since command-line flags list the names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from maskgit_pl.checks import check_choice, check_integer
from maskgit_pl.files import parse_size

GPUName = Literal["a100-40", "a100-80", "h100", "h200", "l40s", "rtx4090"]


@dataclass(frozen=True)
class GPU:
    """The memory and the peak rates of a GPU, from its data sheet.

    Attributes:
        memory: Memory in bytes.
        float32: FLOP/s of float32 matrix products without tensor cores.
        tensor_float32: FLOP/s of float32 matrix products in TF32 on tensor cores (``matmul_precision: high``).
        bfloat16: FLOP/s of dense bfloat16 matrix products on tensor cores.
    """

    memory: float
    float32: float
    tensor_float32: float
    bfloat16: float

    def rate(self, precision: str, *, tensor_float32: bool = False) -> float:
        """Returns the peak FLOP/s of matrix products.

        Args:
            precision: Precision of the Trainer, such as ``bf16-mixed``.
            tensor_float32: True if float32 products use TF32.
        """
        if precision.startswith(("bf16", "16")):
            return self.bfloat16
        return self.tensor_float32 if tensor_float32 else self.float32


GPUS: dict[GPUName, GPU] = {
    "a100-40": GPU(40e9, 19.5e12, 156e12, 312e12),
    "a100-80": GPU(80e9, 19.5e12, 156e12, 312e12),
    "h100": GPU(80e9, 67e12, 495e12, 989e12),
    "h200": GPU(141e9, 67e12, 495e12, 989e12),
    "l40s": GPU(48e9, 91.6e12, 183e12, 362e12),
    "rtx4090": GPU(24e9, 82.6e12, 82.6e12, 165e12),
}
"""GPUs by name, with dense rates (without sparsity).

Source: NVIDIA's data sheets of the SXM modules and of the L40S, and its whitepaper on the Ada architecture.
"""


# End of the driver's name -> key of GPUS. Variants with more words (Laptop GPU, D, NVL, MIG) are slower.
_NAMES: dict[str, GPUName] = {
    "A100 80GB PCIe": "a100-80",
    "A100-SXM4-80GB": "a100-80",
    "A100-SXM4-40GB": "a100-40",
    " H200": "h200",
    "H100 80GB HBM3": "h100",
    "L40S": "l40s",
    "RTX 4090": "rtx4090",
}


def find_gpu(name: str) -> GPU | None:
    """Returns the GPU with a name of the driver, such as ``NVIDIA H100 80GB HBM3``, or None if it is not listed."""
    return next((GPUS[key] for end, key in _NAMES.items() if name.endswith(end)), None)


@dataclass(frozen=True)
class Machines:
    """The machines of a planned run, as far as they are known.

    Args:
        nodes: Number of nodes (default: the recipe's).
        devices: Devices of each node (default: the recipe's).
        device: GPU whose memory is known.
        device_memory: Memory of a device, such as 80GB or 24GiB.

    Raises:
        ValueError: if a number or the memory is out of range, or the GPU is unknown.
    """

    nodes: int | None = None
    devices: int | None = None
    device: GPUName | None = None
    device_memory: str | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "devices"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), "[1, inf)")
        if self.device is not None:
            check_choice("device", self.device, get_args(GPUName))
        if self.device_memory is not None:
            try:
                parse_size(self.device_memory)
            except ValueError as error:
                raise ValueError(f"device_memory {error}") from error

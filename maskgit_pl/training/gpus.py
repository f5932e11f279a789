"""Memory and peak rates of common GPUs. Imports no torch, since command-line flags list the names."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPU", "GPUS", "find_gpu"]


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


GPUS = {
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


_NAMES = {  # end of the driver's name -> key of GPUS; variants with more words (Laptop GPU, D, NVL, MIG) are slower
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

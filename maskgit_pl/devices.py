"""The devices that torch can use on this machine, and the check of a device name."""

from __future__ import annotations

import sys
from typing import Any

import torch

from maskgit_pl.checks import check_choice

__all__ = [
    "check_device",
    "default_device",
    "device_names",
    "find_device",
    "has_amx",
    "has_bfloat16",
    "parse_dtype",
    "peak_memory",
]


def device_names() -> list[str]:
    """Returns the device names of this machine: ``cpu``, and the accelerator and each of its devices if there is one.

    An accelerator is ``cuda``, ``mps``, ``xpu`` or another that torch was built for.
    """
    # torch 2.6 raises if it is asked for an accelerator that is not there.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    # For example cpu, cuda, cuda:0, cuda:1.
    kind = accelerator.type
    return ["cpu", kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]


def check_device(device: torch.device | str, *, name: str = "device") -> torch.device:
    """Checks that torch can use a device on this machine.

    Args:
        device: Name such as ``cpu``, ``cuda`` or ``cuda:1``.
        name: Name of the setting in the error, such as ``--device``.

    Returns:
        The device.

    Raises:
        ValueError: if there is no such device. The message lists the available devices.
    """
    known = device_names()
    try:
        return torch.device(check_choice(name, str(device), known))
    except ValueError as error:
        if known != ["cpu"]:
            raise
        raise ValueError(f"{error} (torch {torch.__version__} finds no GPU here)") from None


def default_device(*, local_rank: int | None = None) -> str:
    """Returns the accelerator that torch finds, such as ``cuda`` or ``mps``, else the CPU.

    Args:
        local_rank: Local rank of a process that shares the GPUs with others; the GPUs are assigned in turn.
    """
    names = device_names()
    if len(names) == 1:
        return "cpu"
    devices = names[2:]  # after cpu and, for example, cuda
    return names[1] if local_rank is None else devices[local_rank % len(devices)]


def find_device(device: str | None) -> str:
    """Returns the name of a device that torch can use on this machine; without a name, that of ``default_device``.

    Raises:
        ValueError: if there is no such device. The message lists the available devices.
    """
    return default_device() if device is None else str(check_device(device))


def has_bfloat16(device: torch.device | str) -> bool:
    """Returns True if a device multiplies bfloat16 with instructions of its own, so that it is faster than float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Bfloat16 without such instructions may be slower than float32.
    if kind != "cpu" or not (_has_instructions("avx512_bf16") or has_amx()):
        return False
    # oneDNN, which uses these instructions, may be missing, or limited to others by ONEDNN_MAX_CPU_ISA.
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch: untyped
    return bool(has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_amx() -> bool:
    """Returns True if the CPU has AMX instructions for bfloat16."""
    return _has_instructions("amx_bf16")


def _has_instructions(name: str) -> bool:
    """Returns True if the CPU has some instructions; False if torch, in an older version, does not tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(name))


def parse_dtype(name: str | None, device: torch.device | str) -> torch.dtype | None:
    """Returns the dtype of ``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a device that ``has_bfloat16``."""
    if name is None:
        return None
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def peak_memory(device: torch.device) -> int:
    """Returns the largest memory so far in bytes: of torch's tensors on an NVIDIA GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux

"""The devices that torch can use on this machine, and the check of a device name."""

from __future__ import annotations

import torch

from maskgit_pl.checks import check_choice

__all__ = ["check_device", "default_device", "device_names"]


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
    """Returns a GPU if there is one, else the CPU.

    Args:
        local_rank: Local rank of a process that shares the GPUs with others; the GPUs are assigned in turn.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if local_rank is None else f"cuda:{local_rank % torch.cuda.device_count()}"

"""The devices that torch can work on here, and the check of a device that somebody names."""

from __future__ import annotations

import torch

from maskgit_pl.checks import check_choice

__all__ = ["check_device", "default_device", "device_names"]


def device_names() -> list[str]:
    """Returns what can be named on this machine: ``cpu``, and the accelerator and each of its devices if there is one.

    An accelerator is ``cuda``, ``mps``, ``xpu`` or another that torch was built for.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return ["cpu"]
    kind = accelerator.type
    return ["cpu", kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]


def check_device(device: torch.device | str, *, name: str = "device") -> torch.device:
    """Checks that torch can work on a device here.

    Args:
        device: Such as ``cpu``, ``cuda`` or ``cuda:1``.
        name: What to call it in the error, such as ``--device``.

    Returns:
        The device.

    Raises:
        ValueError: if there is no such device. The message lists those that there are.
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
        local_rank: Rank on this machine of a process that shares the GPUs with others, each with one of its own.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if local_rank is None else f"cuda:{local_rank % torch.cuda.device_count()}"

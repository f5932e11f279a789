"""Where a run or a measurement took place, so that it can be told and repeated."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch

import maskgit_pl

__all__ = ["describe_environment"]


def describe_environment() -> dict[str, Any]:
    """Versions, commit, machine and devices, in plain values."""
    return {
        "maskgit_pl": maskgit_pl.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def _commit() -> str | None:
    """The commit of this code, where it lies in a git repository and git is there."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None

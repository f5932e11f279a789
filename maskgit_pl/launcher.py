"""Ranks of processes that ``torchrun`` or ``srun`` started, read from the environment, without torch.

Used by commands whose processes share work without a process group; see ``distributed`` for those that have one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["launched_rank", "local_rank"]

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))  # torchrun under srun sets both
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")


def launched_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns this process's rank and the number of processes; (0, 1) if nobody started several.

    Raises:
        ValueError: if a variable is not a whole number.
    """
    found = next((names for names in _RANKS if all(name in environment for name in names)), None)
    if found is None:
        return 0, 1
    rank, world_size = (_number(name, environment) for name in found)
    return rank, world_size


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank on its machine; 0 if nobody started several.

    Raises:
        ValueError: if the variable is not a whole number.
    """
    return next((_number(name, environment) for name in _LOCAL_RANKS if name in environment), 0)


def _number(name: str, environment: Mapping[str, str]) -> int:
    if not environment[name].isdecimal():
        raise ValueError(f"{name}: a whole number is needed, got {environment[name]!r}; name --rank and --world-size")
    return int(environment[name])

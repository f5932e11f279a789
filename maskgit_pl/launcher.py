"""Rank and world size that ``torchrun`` or ``srun`` gave this process in its environment. Imports no torch.

Used by commands whose processes share work without a process group (see ``distributed`` for those that have one), and
by commands that must not act as a rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["hide_launcher", "launcher_rank", "local_rank"]

# torchrun under srun sets both. A batch script has SLURM_PROCID and SLURM_NTASKS, too, but is a single process.
_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
_VARIABLES = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_")


def launcher_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns this process's rank and the number of processes; (0, 1) without a launcher.

    Raises:
        ValueError: if a variable is not a whole number.
    """
    found = next((names for names in _RANKS if all(name in environment for name in names)), None)
    if found is None:
        return 0, 1
    rank, world_size = (_number(name, environment) for name in found)
    return rank, world_size


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank on its machine; 0 without a launcher.

    Raises:
        ValueError: if the variable is not a whole number.
    """
    return next((_number(name, environment) for name in _LOCAL_RANKS if name in environment), 0)


@contextmanager
def hide_launcher() -> Iterator[None]:
    """Hides the variables of a launcher inside the context; Lightning would treat this process as a rank."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    # In place, since child processes and libraries read os.environ.
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _number(name: str, environment: Mapping[str, str]) -> int:
    if not environment[name].isdecimal():
        raise ValueError(f"{name} must be a whole number, got {environment[name]!r}; give --rank and --world-size")
    return int(environment[name])

"""Ends the processes of a run when a fit raises: each with its own exit code, none waiting for one that is gone.

1. What all ranks have agreed on (a signal, losses that are not finite) is raised on rank 0; the others exit silently
   with its exit code.
2. An error of one rank leaves the others in a collective, and this one perhaps in the library's attempt to end it: the
   process prints the error and exits at once. The watchdog of the others hears of it and ends them.
3. Processes that Lightning's launcher has started exit before the first one: the launcher kills the first process
   within 5 s of the end of another.

A run of one process raises, and does nothing else: a notebook keeps its kernel.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from maskgit_pl.errors import PeerError, RunError, describe_error, exit_code_of

__all__ = ["exit_on_error"]


@contextmanager
def exit_on_error(trainer: Trainer) -> Iterator[None]:
    """Has each of several processes exit with its own exit code when the fit inside raises an error.

    Args:
        trainer: Says which process this is, and who started it.

    Raises:
        BaseException: the error itself, in a run of one process, and on rank 0 where all ranks agree on it.
    """
    try:
        yield
    except BaseException as error:
        agreed = error.on_all_ranks if isinstance(error, RunError) else not isinstance(error, Exception)
        is_alone = trainer.world_size > 1 and not agreed  # the other ranks know nothing of it
        if is_alone:
            _print_error(error, trainer)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            _wait_for_end_of(os.getppid())  # 3.
        if is_alone:  # 2.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(exit_code_of(error))
        if isinstance(error, RunError) and not trainer.is_global_zero:  # 1.
            sys.exit(error.exit_code)
        raise


def _print_error(error: BaseException, trainer: Trainer) -> None:
    """Prints an error as the command does; what another rank has told is printed once, by rank 0."""
    if isinstance(error, PeerError):
        if trainer.is_global_zero:
            sys.stderr.write(f"all ranks end, since one has: {error}\n")
    else:
        sys.stderr.write(describe_error(error, "maskgit train"))


def _wait_for_end_of(parent: int, *, seconds: float = 30.0) -> None:
    begun = time.monotonic()
    while os.getppid() == parent and time.monotonic() - begun < seconds:
        time.sleep(0.05)

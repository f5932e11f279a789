"""Exit of the processes of a run when ``fit`` raises: each with its exit code, without waiting for ended ranks.

1. An error on which all ranks agree (a signal, non-finite losses) is raised on rank 0. The other ranks exit silently
   with the same exit code.
2. An error of one rank leaves the other ranks in a collective, and this rank perhaps in the library's cleanup. The
   process prints the error and exits immediately. The watchdogs of the other ranks then end them.
3. Processes that were started by Lightning's launcher wait until the first process has ended, since the launcher kills
   the first process within 5 s after another one ends.

With a single process, the error is only raised, so that a notebook keeps its kernel.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from maskgit_pl.errors import PeerError, RunError, describe_error, exit_code_of

__all__ = ["exit_on_error"]


@contextmanager
def exit_on_error(trainer: Trainer) -> Iterator[None]:
    """Exits each process with its own exit code if the fit in the context raises an error.

    Args:
        trainer: Trainer of the fit; it knows the rank of this process and its launcher.

    Raises:
        BaseException: the error itself, with a single process, and on rank 0 if all ranks agree on it.
    """
    try:
        yield
    except BaseException as error:
        agreed = error.on_all_ranks if isinstance(error, RunError) else not isinstance(error, Exception)
        is_only_here = trainer.world_size > 1 and not agreed  # the other ranks do not raise it
        if is_only_here:
            with suppress(OSError):  # a full disk must not keep the process alive
                _print_error(error, trainer)
        # Only the processes that Lightning's own launcher has started.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            # 3. Wait for the first process.
            _wait_for_end_of(os.getppid())
        # 2. Exit without cleanup, which would wait for the other ranks.
        if is_only_here:
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(exit_code_of(error))
        # 1. Rank 0 raises for all.
        if isinstance(error, RunError) and not trainer.is_global_zero:
            sys.exit(error.exit_code)
        raise


def _print_error(error: BaseException, trainer: Trainer) -> None:
    """Prints an error as the command does. Only rank 0 prints an error that another rank has announced."""
    if isinstance(error, PeerError):
        if trainer.is_global_zero:
            sys.stderr.write(f"all ranks exit: {error}\n")
    else:
        sys.stderr.write(describe_error(error, "maskgit train"))


def _wait_for_end_of(parent: int, *, seconds: float = 30.0) -> None:
    begun = time.monotonic()
    while os.getppid() == parent and time.monotonic() - begun < seconds:
        time.sleep(0.05)

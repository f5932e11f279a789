"""How the processes of a run end: each with its own exit code, and none waiting for another that is gone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from maskgit_pl.errors import PeerError, RunError, describe_error, exit_code_of

__all__ = ["leaving_together"]


@contextmanager
def leaving_together(trainer: Trainer) -> Iterator[None]:
    """Where a fit ends with an error, has each process leave with its own exit code, and soon.

    Lightning's launcher kills the first process within 5 s of the end of another: the others let it go before them. An
    error of one rank leaves the others in a collective, and this one perhaps in the library's attempt to end it: the
    process ends at once. What all have agreed on, and what another rank has said, the first one says for all.
    """
    try:
        yield
    except BaseException as error:
        agreed = error.on_all_ranks if isinstance(error, RunError) else not isinstance(error, Exception)
        alone = trainer.world_size > 1 and not agreed
        if alone:
            _say(error, trainer)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            _wait_for_the_end_of(os.getppid())
        if alone:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(exit_code_of(error))
        if isinstance(error, RunError) and not trainer.is_global_zero:
            sys.exit(error.exit_code)
        raise


def _say(error: BaseException, trainer: Trainer) -> None:
    """As the command does where a process ends by itself."""
    if isinstance(error, PeerError):
        if trainer.is_global_zero:
            sys.stderr.write(f"all ranks end, since one has: {error}\n")
    else:
        sys.stderr.write(describe_error(error, "maskgit train"))


def _wait_for_the_end_of(parent: int, seconds: float = 30.0) -> None:
    begun = time.monotonic()
    while os.getppid() == parent and time.monotonic() - begun < seconds:
        time.sleep(0.05)

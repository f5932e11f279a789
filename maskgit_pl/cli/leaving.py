"""How the processes of a run end: each with its own exit code, and none waiting for another that is gone."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from maskgit_pl.errors import USER_ERRORS, RunError, exit_code_of

__all__ = ["leaving_together"]


@contextmanager
def leaving_together(trainer: Trainer) -> Iterator[None]:
    """Where a fit ends with an error, has each process leave with its own exit code, and soon.

    Lightning's launcher kills the first process within 5 s of the end of another: the others let it go before them. An
    error of one rank leaves the others in a collective, whose library may not come to an end: what is neither of the
    user nor agreed on by all (a ``RunError``) ends the process at once. What all have agreed on, the first one says.
    """
    try:
        yield
    except BaseException as error:
        expected = isinstance(error, (*USER_ERRORS, RunError, KeyboardInterrupt))
        if trainer.world_size > 1 and not expected:
            traceback.print_exc()
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            _wait_for_the_end_of(os.getppid())
        if trainer.world_size > 1 and not expected:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code_of(error))
        if isinstance(error, RunError) and error.on_all_ranks and not trainer.is_global_zero:
            sys.exit(error.exit_code)
        raise


def _wait_for_the_end_of(parent: int, seconds: float = 30.0) -> None:
    begun = time.monotonic()
    while os.getppid() == parent and time.monotonic() - begun < seconds:
        time.sleep(0.05)

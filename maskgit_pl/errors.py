"""Errors that end a command with an exit code of their own.

0 done, 2 bad input, 70 internal error or hang, 74 cannot write, 75 preempted, 76 data budget exceeded or
data changed while a run reads it, 77 not finite.
"""

from __future__ import annotations

import errno
from typing import ClassVar

__all__ = [
    "BAD_INPUT",
    "INTERNAL_ERROR",
    "USER_ERRORS",
    "CannotWriteError",
    "DataBudgetError",
    "DataChangedError",
    "DataWorkerError",
    "NonFiniteError",
    "PeerError",
    "PreemptedError",
    "RunError",
    "exit_code_of",
]

BAD_INPUT = 2
INTERNAL_ERROR = 70
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
"""What a wrong value or file is answered with; their text is for the user, and the exit code is BAD_INPUT."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class RunError(RuntimeError):
    """Ends a command with ``exit_code`` and its text, without a traceback.

    Attributes:
        exit_code: Of the process.
        on_all_ranks: Whether all ranks of a run end with it together, so that one of them says it for all.
    """

    exit_code: int
    on_all_ranks: ClassVar[bool] = True


class CannotWriteError(RunError):
    """Checkpoints cannot be written, several times in a row."""

    exit_code = 74


class PreemptedError(RunError):
    """A signal asked the run to stop: it is saved, and the same command goes on."""

    exit_code = 75


class DataBudgetError(RunError):
    """More images cannot be read than the budget allows."""

    exit_code = 76
    on_all_ranks = False


class DataChangedError(RunError):
    """A shard, an index or a token store that a run reads was cut, replaced or removed meanwhile."""

    exit_code = 76
    on_all_ranks = False


class DataWorkerError(RunError):
    """A process that loads data was killed."""

    exit_code = INTERNAL_ERROR
    on_all_ranks = False


class NonFiniteError(RunError):
    """Losses or gradients are not finite, several steps in a row."""

    exit_code = 77


class PeerError(RunError):
    """Another rank ends the run.

    Args:
        exit_code: With which it ends.
        text: Why.
    """

    on_all_ranks = False

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that ends with an error."""
    if isinstance(error, RunError):
        return error.exit_code
    if isinstance(error, USER_ERRORS):
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return CannotWriteError.exit_code
    return INTERNAL_ERROR

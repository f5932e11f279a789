"""Errors that end a command, their exit codes, and what is printed of them.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | bad input: one line that says what is wrong and the way out |
| 70 | a fault of ours, of a library or of a plug-in (with a traceback), a hang, or a data worker that was killed |
| 74 | cannot write: checkpoints, or what a command prints as its result (stdout on a full disk) |
| 75 | stopped by a signal or one Ctrl-C, and saved: the same command resumes the run |
| 76 | data budget exceeded, or data changed while a run reads it |
| 77 | losses or gradients are not finite |
| 130 | ended at once by Ctrl-C: the second one in training, the first one in every other command |

Bad input is told from a fault of ours by where an error was raised. A ``ValueError`` is bad input if a ``raise``
statement of this package raised it: its text was written for the user. One that comes out of a library or of an
expression is a fault, as is every ``TypeError``, ``KeyError``, ``IndexError`` and ``AttributeError``. So where a user's
input can make a library raise a ``ValueError``, the caller of the library catches it and raises one of ours. A file
that is not there, is there already, is a folder, or may not be read or written is bad input wherever it is opened.
"""

from __future__ import annotations

import dis
import errno
import traceback
from types import TracebackType
from typing import ClassVar

from maskgit_pl.text import printable

__all__ = [
    "BAD_INPUT",
    "INTERNAL_ERROR",
    "INTERRUPTED",
    "CannotWriteError",
    "DataBudgetError",
    "DataChangedError",
    "DataWorkerError",
    "NonFiniteError",
    "PeerError",
    "PreemptedError",
    "RunError",
    "describe_error",
    "error_of_exit",
    "exit_code_of",
    "is_user_error",
]

BAD_INPUT = 2
INTERNAL_ERROR = 70
INTERRUPTED = 130

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
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


def is_user_error(error: BaseException) -> bool:
    """Returns whether an error that was caught is bad input, with a text for the user; see the module's docstring."""
    if isinstance(error, ValueError):
        return _is_raised_by_us(error)
    return isinstance(error, _FILE_ERRORS) or (isinstance(error, OSError) and error.errno in _BAD_NAMES)


def exit_code_of(error: BaseException) -> int:
    """Returns the exit code of a command that ends with an error that was caught."""
    if isinstance(error, RunError):
        return error.exit_code
    if is_user_error(error):
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return CannotWriteError.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else INTERNAL_ERROR


def describe_error(error: BaseException, command: str, *, with_traceback: bool = False) -> str:
    """Returns what a command prints on stderr when it ends with an error.

    Args:
        error: The error that was caught.
        command: The command's words up to its name, such as ``"maskgit train"``.
        with_traceback: True prints the traceback of every error. That of an internal error is always printed.

    Returns:
        Lines that end with a newline: the last one is for the user.
    """
    stack = "".join(traceback.format_exception(error))
    if exit_code_of(error) == INTERNAL_ERROR and not isinstance(error, RunError):
        kind = type(error).__name__
        return (
            f"{stack}{command}: {kind}: this is a fault of maskgit_pl or of a library, not of your input; please "
            "report it with the traceback above and the output of `maskgit --version`\n"
        )
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    lines = "\n".join(printable(line, limit=None) for line in text.split("\n"))  # names of strangers may be in it
    return f"{stack if with_traceback else ''}{command}: {lines}\n"


def error_of_exit(stop: SystemExit) -> BaseException | None:
    """Returns the error that ``sys.exit`` in a command stands for; None if this package called it, or argparse for it.

    A library or a plug-in may not end a command: it would look as if all was done. Lightning exits after Ctrl-C.
    """
    culprit = _who_exits(stop.__traceback__)
    if culprit == __package__:
        return None
    if isinstance(stop.__context__, KeyboardInterrupt):  # what Lightning makes of it
        return stop.__context__
    error = RuntimeError(f"sys.exit({stop.code!r}) was called by {culprit}, which may not end a command")
    error.__cause__ = stop
    return error


def _who_exits(place: TracebackType | None) -> str:
    """Returns the package whose code called ``sys.exit``, or had argparse call it."""
    packages = [str(__package__)]
    while place is not None:
        packages.append(str(place.tb_frame.f_globals.get("__name__")).partition(".")[0])
        place = place.tb_next
    return next(package for package in reversed(packages) if package != "argparse")


def _is_raised_by_us(error: BaseException) -> bool:
    """Returns whether a ``raise`` statement of this package raised an error."""
    place = error.__traceback__
    if place is None:
        return False
    while place.tb_next is not None:
        place = place.tb_next
    package = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return package == __package__ and place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]

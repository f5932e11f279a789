"""Errors that end a command, and their exit codes.

| exit code | meaning |
|---|---|
| 0 | success |
| 2 | bad input: one line names the fault and what to do |
| 70 | internal error of this package, a library or a plug-in (with a traceback), a hang, a killed worker or rank |
| 74 | cannot write a checkpoint or an output: a full, failing or busy disk, or a lost network disk |
| 75 | stopped by a signal or one Ctrl-C after saving; the same command resumes the run |
| 76 | too many unreadable images, or the data changed during the run |
| 77 | non-finite losses or gradients |
| 130 | stopped immediately by Ctrl-C: the second one in training, the first one in all other commands |
| 141 | the reader of the output has ended, such as ``head`` |

The place where an error was raised separates bad input from internal errors. A ``ValueError`` is bad input if a
``raise`` statement of this package raised it, because its text was written for the user. A ``ValueError`` from a
library or from an expression is an internal error, and so is every ``TypeError``, ``KeyError``, ``IndexError`` and
``AttributeError``. If user input can make a library raise a ``ValueError``, the caller catches it and raises one of its
own. A file that does not exist, exists already, is a folder, or has the wrong permissions is bad input anywhere.
"""

from __future__ import annotations

import dis
import errno
import os
import traceback
from contextlib import suppress
from itertools import islice
from typing import ClassVar

from maskgit_pl.text import did_you_mean, printable

BAD_INPUT = 2
INTERNAL_ERROR = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

_FILE_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
_BAD_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO)  # ENXIO: a socket, or a terminal that is not there
# Full disks and quotas, failing disks, file systems that are lost, busy, read-only or on the other side of a mount.
_BAD_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EBUSY, errno.EXDEV, errno.EROFS,
}  # fmt: skip

_MAX_COMPARED = 1000  # names of a folder


class RunError(RuntimeError):
    """An error that ends a command with ``exit_code`` and its text, without a traceback.

    Attributes:
        exit_code: Exit code of the process.
        on_all_ranks: True if all ranks of a run raise it together, so that one of them prints it for all.
    """

    exit_code: int
    on_all_ranks: ClassVar[bool] = True


class CannotWriteError(RunError):
    """An error after several failed attempts in a row to write a checkpoint, or one to write a study."""

    exit_code = 74


class PreemptedError(RunError):
    """A stop by a signal. The run is saved, and the same command resumes it."""

    exit_code = 75


class DataBudgetError(RunError):
    """An error for more unreadable images than the budget allows."""

    exit_code = 76
    on_all_ranks = False


class DataChangedError(RunError):
    """An error for a shard, an index or a token store that was cut, replaced or removed while a run reads it."""

    exit_code = 76
    on_all_ranks = False


class DataWorkerError(RunError):
    """An error for a killed data worker."""

    exit_code = INTERNAL_ERROR
    on_all_ranks = False


class NonFiniteError(RunError):
    """An error for non-finite losses or gradients in several steps in a row."""

    exit_code = 77


_OURS = (__package__, "__main__", "paper")  # the tests import the scripts of paper/


def is_user_error(error: BaseException) -> bool:
    """Returns True if a caught error is bad input, whose text is for the user. The module docstring has the rule."""
    if isinstance(error, ValueError):
        return _is_raised_by_us(error)
    return isinstance(error, _FILE_ERRORS) or (isinstance(error, OSError) and error.errno in _BAD_PATHS)


def exit_code_of(error: BaseException) -> int:
    """Returns the exit code of a command that a caught error ends."""
    if isinstance(error, RunError):
        return error.exit_code
    if is_user_error(error):
        return BAD_INPUT
    # A full or failing disk is no bad input: the same command works later or elsewhere.
    if isinstance(error, OSError) and error.errno in _BAD_DISK:
        return CannotWriteError.exit_code
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else INTERNAL_ERROR


def describe_error(error: BaseException, command: str, *, with_traceback: bool = False) -> str:
    """Returns the text that a command prints on stderr when an error ends it.

    Args:
        error: Caught error.
        command: Name of the command, such as ``"maskgit train"``.
        with_traceback: True adds the traceback. Internal errors always have it.

    Returns:
        Lines that end with a newline. The last line is for the user.
    """
    stack = "".join(traceback.format_exception(error))
    if exit_code_of(error) == INTERNAL_ERROR and not isinstance(error, RunError):
        return (
            f"{stack}{command}: {type(error).__name__}: internal error of maskgit_pl or of a library; please report it "
            "with the traceback above and the output of `maskgit --version`\n"
        )
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else error_text(error)
    # The text may contain names from untrusted files.
    lines = "\n".join(printable(line, limit=None) for line in text.split("\n"))
    return f"{stack if with_traceback else ''}{command}: {lines}\n"


def error_text(error: BaseException) -> str:
    """Returns the text of an error; for a file that cannot be used, its path, the reason and the way out."""
    if isinstance(error, OSError) and error.filename is not None and is_user_error(error):
        return f"{printable(error.filename, limit=None)}: {error.strerror}; {_nearest_file(error) or 'check the path'}"
    return str(error)


def _nearest_file(error: OSError) -> str:
    """Returns a question with the name closest to that of a missing file, of 1,000 in its folder; else nothing."""
    if isinstance(error, FileNotFoundError):
        folder, name = os.path.split(str(error.filename))
        with suppress(OSError), os.scandir(folder or ".") as entries:
            # A link to nothing has the name itself.
            return did_you_mean(name, [entry.name for entry in islice(entries, _MAX_COMPARED) if entry.name != name])
    return ""


def _is_raised_by_us(error: BaseException) -> bool:
    """Returns True if a ``raise`` statement of this package, or of the script that runs, raised the error."""
    frame = error.__traceback__
    if frame is None:
        return False
    # The innermost frame is the one that raised.
    while frame.tb_next is not None:
        frame = frame.tb_next
    # The last instruction tells a raise statement from an expression such as int("x") in the same frame.
    package = str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return package in _OURS and frame.tb_frame.f_code.co_code[frame.tb_lasti] == dis.opmap["RAISE_VARARGS"]

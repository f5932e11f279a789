"""Standard streams that end no command, wherever they lead.

| stdout or stderr | what happens |
|---|---|
| closed: ``>&-`` | what would be printed is dropped; the command does its work and ends with its own exit code |
| read no more: ``head``, a terminal that was closed | the same |
| on a full disk | the same; stderr says so once, and exit code 0 becomes 74 if results were lost, not only log lines |

A training must survive its terminal, and a command that lists something is done before anyone could stop it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

from typing_extensions import Buffer

__all__ = ["Terminal"]


class Terminal:
    """The standard streams of this process, replaced once by such that end no command.

    Streams that somebody else has put in place (a test, a notebook) are left alone.

    Attributes:
        log: For lines of a log; in order with what is printed on ``sys.stdout``.
    """

    def __init__(self) -> None:
        _open_closed_files()
        self._stderr = _Sink(2)
        if sys.stderr in (None, sys.__stderr__):
            sys.stderr = _text(self._stderr, sys.__stderr__)
        self._stdout, log = _Sink(1), _Sink(1)
        self.log: TextIO = sys.stdout
        if sys.stdout in (None, sys.__stdout__):
            sys.stdout = _text(self._stdout, sys.__stdout__)
            self.log = _text(log, sys.__stdout__)

    def has_lost_results(self) -> bool:
        """Returns whether something printed on stdout could not be written, though somebody would read it."""
        sys.stdout.flush()
        return self._stdout.has_lost


class _Sink(io.FileIO):
    """A standard stream to which writing never fails; what cannot be written is dropped.

    Args:
        number: 1 or 2.
    """

    _said = False  # of all: once a process

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.has_lost = False
        self._gone = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)  # what a closed terminal answers

    def write(self, data: Buffer, /) -> int:
        """Writes what can be written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._gone:
                self.has_lost = True
                self._say(error)
            return memoryview(data).nbytes

    def _say(self, error: OSError) -> None:
        if not _Sink._said and self.fileno() == 1:
            _Sink._said = True
            sys.stderr.write(f"maskgit: stdout cannot be written ({error}); the command runs on, output is lost\n")


def _text(sink: _Sink, before: TextIO | None) -> io.TextIOWrapper:
    """Returns a text stream with the encoding of the one before; characters that it lacks are escaped."""
    errors = "backslashreplace" if before is None or before.errors == "strict" else before.errors
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(sink), encoding=encoding, errors=errors, line_buffering=True)


def _open_closed_files() -> None:
    """Opens ``/dev/null`` in place of closed standard streams; the next file would take their number and text."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            os.set_inheritable(null, True)  # noqa: FBT003  # it takes no keywords

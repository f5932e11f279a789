"""Standard streams on which writing never fails, so that a lost terminal or a full disk ends no command.

| stdout or stderr | effect |
|---|---|
| closed with ``>&-`` | output is dropped; the command finishes with its own exit code |
| no reader any more (``head``, a closed terminal) | the same |
| on a full disk | the same, with one line on stderr; exit code 0 becomes 74 if results were lost, not only log lines |

Used by ``cli.main``: a training must survive the end of its terminal.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import TextIO

from typing_extensions import Buffer

__all__ = ["Terminal"]


class Terminal:
    """Replaces the standard streams of this process by streams on which writing never fails.

    Streams that a test or a notebook has replaced already are kept.

    Attributes:
        log: Stream for log lines, in order with the output on ``sys.stdout``.
    """

    def __init__(self) -> None:
        # Without this, a library that opens a file would get number 1 and the output of the command.
        _open_closed_files()
        self._stderr = _Sink(2)
        if sys.stderr in (None, sys.__stderr__):
            sys.stderr = _text(self._stderr, sys.__stderr__)
        # Two sinks on the same descriptor: lost log lines do not count as lost results.
        self._stdout, log = _Sink(1), _Sink(1)
        self.log: TextIO = sys.stdout
        if sys.stdout in (None, sys.__stdout__):
            sys.stdout = _text(self._stdout, sys.__stdout__)
            self.log = _text(log, sys.__stdout__)

    def has_lost_results(self) -> bool:
        """Returns True if output on stdout could not be written although it has a reader, such as on a full disk."""
        sys.stdout.flush()
        return self._stdout.has_lost


class _Sink(io.FileIO):
    """A raw standard stream on which writing never fails. Bytes that cannot be written are dropped.

    Args:
        number: File descriptor, 1 for stdout or 2 for stderr.
    """

    _said = False  # shared by all streams: one line per process

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.has_lost = False
        self._gone = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)  # a closed terminal gives EIO

    def write(self, data: Buffer, /) -> int:
        """Writes the data, or drops it after an error, and returns its length."""
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
            sys.stderr.write(f"maskgit: cannot write to stdout ({error}); the command continues, its output is lost\n")


def _text(sink: _Sink, before: TextIO | None) -> io.TextIOWrapper:
    """Returns a text stream with the encoding of the replaced one. Characters outside the encoding are escaped."""
    errors = "backslashreplace" if before is None or before.errors == "strict" else before.errors
    if errors == "surrogateescape":  # of the locale C: writes the bytes of file names, but refuses all other characters
        codecs.register_error(errors := "surrogateescape_or_backslashreplace", _escape)
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(sink), encoding=encoding, errors=errors, line_buffering=True)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Writes the bytes of a file name as they are, and escapes other characters; a handler of errors for ``codecs``."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def _open_closed_files() -> None:
    """Opens ``/dev/null`` for closed standard streams, or the next opened file would get their number and output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(null, True)  # noqa: FBT003  # the function takes no keywords

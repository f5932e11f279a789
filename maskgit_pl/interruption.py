"""Signals that ask a run to stop: they set a flag, and nothing else happens in the handler.

A handler that saved or talked to other ranks would do so in the middle of other work, and ranks that are not at the
same place wait for each other forever. ``training.stop_and_nonfinite.StepCheck`` reads the flag after each step, on all
ranks together.

A second Ctrl-C ends a command at once, with exit code 130, from a thread of its own: a handler would wait for a main
thread that waits for other ranks. In a notebook it raises KeyboardInterrupt. The disk is then as after a kill: what is
on it is whole.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Literal

from maskgit_pl.errors import INTERRUPTED

__all__ = ["SIGNALS", "catch_stop_signals", "ignore_job_signals", "is_requested"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_CTRL_C_ONCE = b"\nstopping after this step, and saving; Ctrl-C again stops at once\n"
_CTRL_C = b"\nstopping after this step, and saving; Ctrl-C again stops at once, with exit code 130\n"
_CTRL_C_AGAIN = b"\nstopped at once; the same command resumes from the last checkpoint\n"


class _Flag:
    """Whether this process was asked to stop; processes that it forks, such as those that load data, go on."""

    process = -1  # the one that listens
    is_set = False
    presses = 0  # of Ctrl-C
    may_raise = False


@contextmanager
def catch_stop_signals(*, until: Literal["return", "exit"] = "return") -> Iterator[None]:
    """Has the signals set the flag meanwhile. Entered before anything slow is imported, so that none kills the process.

    Inside another ``catch_stop_signals``, and in a thread other than the main one, it changes nothing.

    Args:
        until: What comes afterwards. ``"return"``: the caller goes on, such as a notebook. A second Ctrl-C raises
            KeyboardInterrupt, and the handlers are restored. ``"exit"``: the process ends. A second Ctrl-C ends it at
            once, and when a signal has come, further ones are ignored.
    """
    if _Flag.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Flag.process, _Flag.is_set, _Flag.presses, _Flag.may_raise = os.getpid(), False, 0, until == "return"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = {number: signal.signal(number, _set_flag) for number in SIGNALS}
    try:
        with _exit_at_second_ctrl_c() if until == "exit" else nullcontext():
            # A job's script may start its tasks with signals blocked: one that came too early comes now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield
    finally:
        # A signal that arrives when all is done must not change the exit code: as the interpreter ends, it gives a
        # signal with a Python handler its default action back, which kills. An ignored signal stays ignored.
        for number, handler in before.items():
            is_ignored = until == "exit" and (_Flag.is_set or number in blocked)
            signal.signal(number, signal.SIG_IGN if is_ignored else handler)
        if until == "return":
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _Flag.process, _Flag.is_set = -1, False


@contextmanager
def _exit_at_second_ctrl_c() -> Iterator[None]:
    """Has a thread count Ctrl-C: a handler would wait for a main thread that waits for other ranks."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    told_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_count_ctrl_c, args=(reader,), name="Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(told_before)
        os.close(writer)  # ends the thread


def is_requested() -> bool:
    """Whether this process was asked to stop."""
    return _Flag.is_set


def ignore_job_signals(worker: int) -> None:
    """Has a process that loads data go on when the whole job is asked to stop: the last step still needs it.

    SIGTERM from the parent ends it, as torch has it; the other signals do nothing in it already.

    Args:
        worker: Its number, which ``DataLoader`` tells a ``worker_init_fn``.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in all threads, so that one alone gets it

    def wait() -> None:
        parent = os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name=f"signals of worker {worker}", daemon=True).start()


def _set_flag(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Flag.process:
        return
    _Flag.is_set = True
    if number == signal.SIGINT and _Flag.may_raise:
        _Flag.presses += 1
        if _Flag.presses > 1:
            raise KeyboardInterrupt
        with suppress(OSError):  # stderr may be closed
            os.write(2, _CTRL_C_ONCE)


def _count_ctrl_c(reader: int) -> None:
    """Says what a Ctrl-C does, and ends the process at the second; signals are written to a pipe when they come."""
    presses = 0
    while numbers := os.read(reader, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            presses += 1
            with suppress(OSError):  # stderr may be full, or lead to a process that is gone
                os.write(2, _CTRL_C if presses == 1 else _CTRL_C_AGAIN)
            if presses > 1:
                os._exit(INTERRUPTED)
    os.close(reader)


_fork = threading.local()  # the signal mask from before a fork, in the thread that forks


def _hold_signals() -> None:
    """Holds signals back over a fork: until it is set up, the new process would write its own to this one's pipe."""
    is_listening = _Flag.process == os.getpid()
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if is_listening else None


def _release_signals() -> None:
    if _fork.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _leave_signals_to_parent() -> None:
    """Has a forked process not write its signals to the parent's pipe."""
    if _fork.mask is not None:
        signal.set_wakeup_fd(-1)
    _release_signals()


os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_leave_signals_to_parent)

"""Stop signals (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C): their handler sets a flag and does nothing else.

A handler that saved or talked to other ranks would do so in the middle of other work, and ranks that are not at the
same place wait for each other forever. ``training.stop_and_nonfinite.StepCheck`` reads the flag after each step, on all
ranks together.

A second Ctrl-C ends a command immediately, with exit code 130. A separate thread does this, because a Python handler
runs only when the main thread does, and that may be waiting for other ranks. In a notebook, the second Ctrl-C raises
KeyboardInterrupt. The files on disk are complete in either case, as after a kill.
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

__all__ = ["SIGNALS", "catch_stop_signals", "hold_ctrl_c", "ignore_job_signals", "is_requested"]

_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if hasattr(signal, name))  # Windows lacks some
_CTRL_C_ONCE = b"\nfinishing this step and saving; press Ctrl-C again to quit immediately\n"
_CTRL_C = b"\nfinishing this step and saving; press Ctrl-C again to quit immediately (exit code 130)\n"
_CTRL_C_AGAIN = b"\nquit immediately; repeat the command to resume from the last checkpoint\n"


class _Flag:
    """The stop request of this process. Forked processes, such as data workers, ignore the signals."""

    process = -1  # ID of the process that catches the signals
    is_set = False
    presses = 0  # number of Ctrl-C presses
    may_raise = False


@contextmanager
def catch_stop_signals(*, until: Literal["return", "exit"] = "return") -> Iterator[None]:
    """Lets the stop signals set the flag inside the context.

    Enter it before slow imports, since a signal that arrives earlier kills the process. A nested context, and one in a
    thread other than the main thread, changes nothing.

    Args:
        until: End of the context. ``"return"``: the caller continues, as in a notebook; a second Ctrl-C raises
            KeyboardInterrupt, and the handlers are restored. ``"exit"``: the process exits; a second Ctrl-C ends it
            immediately, and after a first signal all further ones are ignored.
    """
    if _Flag.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Flag.process, _Flag.is_set, _Flag.presses, _Flag.may_raise = os.getpid(), False, 0, until == "return"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = {number: signal.signal(number, _set_flag) for number in SIGNALS}
    try:
        with _exit_at_second_ctrl_c() if until == "exit" else nullcontext():
            # A job script may start its tasks with these signals blocked; a pending one is delivered now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield
    finally:
        # A signal that arrives after the work is done must not change the exit code. At exit, the interpreter restores
        # the default action (kill) of signals with a Python handler; an ignored signal stays ignored.
        for number, handler in before.items():
            is_ignored = until == "exit" and (_Flag.is_set or number in blocked)
            signal.signal(number, signal.SIG_IGN if is_ignored else handler)
        if until == "return":
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _Flag.process, _Flag.is_set = -1, False


@contextmanager
def _exit_at_second_ctrl_c() -> Iterator[None]:
    """Starts a thread that counts Ctrl-C; a handler would wait for a main thread that waits for other ranks."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # The interpreter writes the number of each signal to this pipe as soon as it arrives.
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_count_ctrl_c, args=(reader,), name="Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread


@contextmanager
def hold_ctrl_c() -> Iterator[None]:
    """Delays Ctrl-C to the end of the context. Processes that start inside ignore it.

    A process that is interrupted while it starts another one leaves it without its first message.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by new processes
    # Another thread that does not block the signal may receive it; the handler then still runs in the main thread.
    handler = signal.getsignal(signal.SIGINT)
    is_held = threading.current_thread() is threading.main_thread() and handler is not None
    received: list[int] = []
    if is_held:
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if is_held:
            signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            # Not raised again: ``_count_ctrl_c`` has counted it when it arrived.
            handler(signal.SIGINT, None)
        elif received and handler == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)


def is_requested() -> bool:
    """Returns True if this process has received a stop signal."""
    return _Flag.is_set


def ignore_job_signals(worker: int) -> None:
    """Keeps a data worker alive when the whole job receives SIGTERM, since the last step still needs its data.

    SIGTERM from the parent process ends the worker, as in torch. The other stop signals have no effect in workers.

    Args:
        worker: Index of the worker, which ``DataLoader`` passes to a ``worker_init_fn``.
    """
    if not hasattr(signal, "sigwaitinfo"):  # only Linux tells a thread who sent a signal
        return
    # Blocked in all threads, so that only the thread below receives it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        parent = os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name=f"signals of worker {worker}", daemon=True).start()


def _set_flag(number: int, frame: FrameType | None) -> None:
    # A forked process inherits this handler.
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
    """Prints the effect of each Ctrl-C and ends the process at the second; ``reader`` is a pipe of signal numbers."""
    presses = 0
    while numbers := os.read(reader, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            presses += 1
            with suppress(OSError):  # stderr may be full or closed
                os.write(2, _CTRL_C if presses == 1 else _CTRL_C_AGAIN)
            if presses > 1:
                os._exit(INTERRUPTED)
    os.close(reader)


_fork = threading.local()  # signal mask before a fork, per forking thread


def _hold_signals() -> None:
    """Blocks signals during a fork: the new process would write its own signals to the pipe of its parent."""
    is_catching = _Flag.process == os.getpid()
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if is_catching else None


def _release_signals() -> None:
    if _fork.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _leave_signals_to_parent() -> None:
    """Disconnects a forked process from the pipe of its parent."""
    if _fork.mask is not None:
        signal.set_wakeup_fd(-1)
    _release_signals()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_leave_signals_to_parent)

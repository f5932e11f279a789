"""Calls of the operating system that Windows or macOS lack, and what replaces them there.

On Linux every function is the call that it names. On other systems, sampling, editing and training on one device work;
jobs of several processes, and locks between nodes, are for Linux.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = [
    "READ_FLAGS",
    "block_signals",
    "on_fork",
    "peak_memory",
    "pread",
    "raise_file_limit",
    "set_signal_mask",
    "signals_named",
    "sync",
    "tells_sender_of_signal",
    "unblock_signals",
]

READ_FLAGS: int = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags of ``os.open`` for a file that is only read, and that a new process does not inherit."""

_seeking = threading.Lock()


def pread(descriptor: int, size: int, offset: int) -> bytes:
    """Reads at most ``size`` bytes at an offset, and leaves the position of the descriptor as it is."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _seeking:  # of this process; other processes open the file themselves
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)


def signals_named(*names: str) -> tuple[signal.Signals, ...]:
    """Returns the signals of these names that the system has, such as ``SIGUSR1``."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


def block_signals(numbers: Iterable[int]) -> set[int]:
    """Blocks signals in this thread, and returns those that were blocked before. Windows blocks none."""
    if not hasattr(signal, "pthread_sigmask"):
        return set()
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, set(numbers)))


def unblock_signals(numbers: Iterable[int]) -> None:
    """Unblocks signals in this thread."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(numbers))


def set_signal_mask(numbers: Iterable[int]) -> None:
    """Blocks exactly these signals in this thread."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, set(numbers))


def tells_sender_of_signal() -> bool:
    """Returns True if the system tells a thread which process sent a signal: Linux only."""
    return hasattr(signal, "sigwaitinfo")


def on_fork(
    *,
    before: Callable[[], object] | None = None,
    after_in_parent: Callable[[], object] | None = None,
    after_in_child: Callable[[], object] | None = None,
) -> None:
    """Registers functions that run around each fork. Windows has no fork."""
    if hasattr(os, "register_at_fork"):
        found = {"before": before, "after_in_parent": after_in_parent, "after_in_child": after_in_child}
        os.register_at_fork(**{name: each for name, each in found.items() if each is not None})


def peak_memory() -> int:
    """Returns the peak resident memory of this process in bytes; 0 if the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def raise_file_limit(wanted: int) -> None:
    """Raises the limit of open files of this process to ``wanted``, or as far as the system allows."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < reachable:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    is_windows = os.name == "nt"
    if is_windows and path.is_dir():
        return  # Windows cannot open folders, and does this itself
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

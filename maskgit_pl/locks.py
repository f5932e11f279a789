"""Locks of files and folders against other processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["hold_lock"]

log = logging.getLogger(__name__)

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_locks: set[int] = set()  # descriptors of the locks that this process holds


@contextmanager
def hold_lock(target: Path, *, hint: str, rank: int | None = None) -> Iterator[None]:
    """Holds a file or folder against other processes while it is written.

    The lock is ``flock`` on the file ``.NAME.lock`` beside the target, which is removed at the end. The kernel releases
    it when the process ends, however it ends, so that a lock of a killed job never blocks its restart. It holds between
    the nodes of a cluster on NFS, on GPFS, and on Lustre mounted with ``flock``. On a file system without locks a
    warning is logged. Where no lock file can be made, nothing is locked: the target cannot be replaced there either.
    What the lock file says (process, host, time) is only for the message.

    Args:
        target: The file or folder; it need not exist.
        hint: What the user can do besides waiting, for the message.
        rank: Of processes that share the work on the target; each has a lock of its own. None if it is not shared.

    Raises:
        ValueError: if another process holds it.
    """
    name = target.name if rank is None else f"{target.name}.rank{rank}"
    path = target.absolute().with_name(f".{name}.lock")
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, target, hint)
    if descriptor is not None:
        _locks.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _locks:  # False in a process that was forked meanwhile
            with suppress(OSError):
                path.unlink()  # before it is released: nobody else can hold it then
            _locks.remove(descriptor)
            os.close(descriptor)
            for folder in new_folders:
                with suppress(OSError):  # something was written to it
                    folder.rmdir()


def _take(path: Path, target: Path, hint: str) -> int | None:
    """Opens a lock file and locks it; None where there can be none."""
    while (descriptor := _open_lock(path)) is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            holder = "".join(letter for letter in said if letter.isprintable()) or "another process"
            raise ValueError(f"{target} is in use by {holder}; wait until it ends, or {hint}") from error
        except OSError:
            log.warning("%s: this file system has no locks; see to it that only one process writes to it", target)
            return descriptor
        if _is_at(path, descriptor):
            with suppress(OSError):  # a full disk, or the file of another user
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _own_name().encode())
            return descriptor
        os.close(descriptor)  # who held it has removed it meanwhile
    return None


def _open_lock(path: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # read only: it is another user's
        try:
            return os.open(path, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
    return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns whether an open lock file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own_name() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _leave_locks_to_parent() -> None:
    """Closes the locks in a forked process: data workers that outlive a killed run for a moment must not hold them."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks_to_parent)

"""Locks of files and folders, so that only one process at a time writes to them."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskgit_pl.portable import lock_exclusively, on_fork

__all__ = ["hold_lock"]

log = logging.getLogger(__name__)

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT)
_locks: set[int] = set()  # file descriptors of the locks that this process holds


@contextmanager
def hold_lock(target: Path, *, hint: str, rank: int | None = None) -> Iterator[None]:
    """Locks a file or folder against other processes while it is written.

    The lock is ``flock`` on the file ``.NAME.lock`` beside the target, or beside what a link leads to, which is removed
    at the end. The kernel releases it at every end of the process, so that a killed job never blocks its restart. The
    lock holds between the nodes of a cluster on NFS, on GPFS, and on Lustre mounted with ``flock``. A file system
    without locks gives a warning. If no lock file can be made, nothing is locked, because the target cannot be written
    there either. The content of the lock file (process, host, time) is used in the message only.

    Args:
        target: File or folder to lock, which need not exist.
        hint: Advice for the message besides waiting, such as ``"give another --out"``.
        rank: Rank of a process that shares the work on the target with others, each with its own lock; None for
            exclusive work.

    Raises:
        ValueError: if another process holds the lock.
    """
    real = Path(os.path.realpath(target))  # one lock for all links to the target
    # Ranks that share the work have a lock each, which stops only a second process of the same rank.
    name = real.name if rank is None else f"{real.name}.rank{rank}"
    path = real.parent / f".{name}.lock"
    # Folders that are made for the lock file are removed at the end if they are empty.
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, target, hint)
    if descriptor is not None:
        _locks.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _locks:  # False in a process that was forked inside the with block
            with suppress(OSError):
                path.unlink()  # before the release, while no other process can hold it
            _locks.remove(descriptor)
            os.close(descriptor)
            for folder in new_folders:
                with suppress(OSError):  # not empty
                    folder.rmdir()


def _take(path: Path, target: Path, hint: str) -> int | None:
    """Opens a lock file and locks it; returns its descriptor, or None if it cannot be made.

    A lock file can be removed by its holder between the open and the lock. The lock is then on a file without a name,
    and the next round opens the new file.
    """
    while (descriptor := _open_lock(path)) is not None:
        try:
            lock_exclusively(descriptor, wait=False)
        except BlockingIOError as error:
            # The holder has written its PID, host and start. They are untrusted text in a shared folder.
            said = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            holder = "".join(letter for letter in said if letter.isprintable()) or "another process"
            raise ValueError(f"{target} is in use by {holder}; wait until it ends, or {hint}") from error
        except OSError:
            log.warning("%s: this file system has no locks; make sure that only one process writes to it", target)
            return descriptor
        if _is_at(path, descriptor):
            with suppress(OSError):  # a full disk, or a file of another user
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _own_name().encode())
            return descriptor
        os.close(descriptor)  # its holder has removed the file
    return None


def _open_lock(path: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):  # read only if the file belongs to another user
        try:
            return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
    return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Returns True if an open lock file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own_name() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


def _leave_locks_to_parent() -> None:
    """Closes the locks in a forked process, because a data worker can outlive a killed run for a moment."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


on_fork(after_in_child=_leave_locks_to_parent)

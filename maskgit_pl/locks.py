"""Locks of files and folders, so that only one process at a time writes to them."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["hold_lock"]

log = logging.getLogger(__name__)


@contextmanager
def hold_lock(target: Path, *, hint: str, rank: int | None = None) -> Iterator[None]:
    """Locks a file or folder against other processes while it is written.

    The lock is on the file ``.NAME.lock`` beside the target, or beside what a link leads to, which is removed at the
    end. The kernel releases it at every end of the process, so that a killed job never blocks its restart, and forked
    data workers do not keep it. The lock holds between the nodes of a cluster on NFS, on GPFS, and on Lustre mounted
    with ``flock``. Where nothing can be locked, a warning is logged.

    Args:
        target: File or folder to lock, which need not exist.
        hint: Advice for the message besides waiting, such as ``"give another --out"``.
        rank: Rank of a process that shares the work on the target with others, each with its own lock; None for
            exclusive work.

    Raises:
        ValueError: if another process holds the lock, or its file belongs to another user and cannot be opened.
    """
    real = Path(os.path.realpath(target))  # one lock for all links to the target
    path = real.parent / (f".{real.name}.lock" if rank is None else f".{real.name}.rank{rank}.lock")
    # Folders that are made for the lock file are removed at the end if they are empty.
    new_folders = [folder for folder in path.parents if not folder.exists()]
    # Without flock, filelock would otherwise use a marker file, which outlives a killed process. All users may write
    # the lock file, or one that another user left would block a shared folder.
    lock = FileLock(path, mode=0o666, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire(timeout=0.2)  # a holder that ends removes the file: then another one is made
    except Timeout as error:
        raise ValueError(f"{target} is in use by {_read_holder(path)}; wait until it ends, or {hint}") from error
    except OSError as error:
        if isinstance(error, PermissionError) and path.exists():
            raise ValueError(
                f"{path} belongs to another user; remove it if no run of theirs uses it, or {hint}"
            ) from error
        log.warning("%s cannot be locked (%s); make sure that only one process writes to it", target, error.strerror)
    try:
        yield
    finally:
        if lock.is_locked:  # False in a process that was forked inside the with block
            with suppress(OSError):
                path.unlink()  # before the release, while no other process can hold it
        lock.release()
        for folder in new_folders:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _write_holder(descriptor: int) -> None:
    with suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())


def _read_holder(path: Path) -> str:
    """Returns what the holder has written, which is untrusted text in a shared folder."""
    with suppress(OSError), path.open("rb") as file:
        said = file.read(1000).decode(errors="replace")
        return "".join(letter for letter in said if letter.isprintable()) or "another process"
    return "another process"

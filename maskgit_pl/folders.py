"""Atomic replacement of whole folders, with checks that nothing else is lost, and locks against other writers.

Used by exports, importers, checkpoints and data folders: a folder has its name only when all of it is on
disk, and only one process at a time writes it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from maskgit_pl.files import check_writable, follow_links, sync
from maskgit_pl.text import printable

log = logging.getLogger(__name__)


@contextmanager
def write_folder(
    folder: Path, *, name: str = "output", check: Callable[[Path], object] = lambda folder: None
) -> Iterator[Path]:
    """Makes an empty folder to write to, which replaces ``folder`` when all of it is on disk.

    1. Follow links, and check that the folder can be replaced.
    2. Lock it, so that of two processes only one writes it.
    3. Put back an older folder that a kill has left under its other name (``replace_folder``), remove the new ones
       that killed processes have left, and check the content of the folder.
    4. After the work, write all of the new folder to the disk, and give it the name.

    After an error, the new folder is removed and an older one at ``folder`` is unchanged.

    Args:
        folder: Folder to write; an existing one is replaced. Folders above it are made. A link stays, and its
            target is written.
        name: Name of the setting for errors, such as ``--out``.
        check: Raises an error if the content of the existing folder must stay.

    Yields:
        The new folder, beside ``folder``.
    """
    folder = resolve_folder(name, folder)  # 1.
    with hold_lock(folder, hint="give another path"):  # 2.
        _clean_up(folder)  # 3.
        check(folder)
        fresh = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex}")
        fresh.mkdir()
        try:
            yield fresh
            # 4. A rename may reach the disk before the content of the files, so the content is synced first.
            for path in fresh.rglob("*"):
                sync(path)
            replace_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Replaces a folder by another one, so that after a kill one of the two is complete.

    1. Renames the old folder, if there is one, to ``.NAME.old-PID``.
    2. Renames the new one. A kill between the two leaves no folder at ``folder``; both exist under their other names,
       and the next ``write_folder`` puts the old one back.
    3. Removes the old folder.

    Args:
        fresh: New folder, whose files are on disk.
        folder: Path to replace, on the same file system. A link stays, and its target is replaced.
    """
    folder = follow_links(folder, is_folder=True)
    sync(fresh)
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():  # 1.
        folder.rename(old)
    try:
        fresh.rename(folder)  # 2.
    except OSError:
        with suppress(FileNotFoundError):
            old.rename(folder)
        raise
    sync(folder.parent)  # the names are on disk
    shutil.rmtree(old, ignore_errors=True)  # 3.


def resolve_folder(name: str, folder: Path) -> Path:
    """Returns the folder of a path that a new one can replace: links are followed, so that a link stays one.

    Args:
        name: Name of the setting for the error, such as ``--out``.
        folder: Folder to replace later. Neither it nor the folders above it need to exist.
    """
    check_writable(name, folder, is_folder=True)
    real, current = follow_links(folder, name, is_folder=True), Path.cwd()
    if os.path.ismount(real) or real in (current, *current.parents):
        raise ValueError(
            f"{name} must be a folder that a new one can replace, got {real}, a mount point, the current folder or one "
            "above it; name a folder in it"
        )
    return real


def has_content(folder: Path) -> bool:
    """Returns True if a folder exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def check_new_folder(folder: Path, *, replace: bool, description: str, known: Collection[str]) -> None:
    """Checks that a folder is new or empty, or holds an earlier export that is to be replaced, and nothing else.

    Args:
        folder: Folder to write later.
        replace: True if an earlier one may be replaced.
        description: File by which an earlier one is known.
        known: Its other files, relative to it.
    """
    if not has_content(folder):
        return
    if not replace:
        raise FileExistsError(f"{folder} has files; replace an earlier export with --replace, or name a new folder")
    if not (folder / description).is_file():
        raise FileExistsError(
            f"--replace replaces only the folder of an earlier export, and {folder} has no {description} of one; name "
            "a new folder"
        )
    check_only_known(folder, {description, *known})


def check_only_known(folder: Path, expected_files: Collection[str]) -> None:
    """Checks that a folder holds no other files than those that are replaced, because others would be lost."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    unknown = sorted({path.relative_to(folder).as_posix() for path in files} - {*expected_files})
    if unknown:
        raise FileExistsError(
            f"{folder} is replaced as a whole and must hold only files of an earlier export, got also "
            f"{', '.join(unknown[:3])}; move them, or name a new folder"
        )


@contextmanager
def hold_lock(target: Path, *, hint: str, rank: int | None = None) -> Iterator[None]:
    """Locks a file or folder against other processes while it is written.

    The lock is on the file ``.NAME.lock`` beside the target, or beside what a link leads to, which is removed
    at the end. The kernel releases it at every end of the process, so that a killed job never blocks its
    restart, and forked data workers do not keep it. The lock holds between the nodes of a cluster on NFS, on
    GPFS, and on Lustre mounted with ``flock``. Where nothing can be locked, a warning is logged.

    Args:
        target: File or folder to lock, which need not exist.
        hint: Advice for the message besides waiting, such as ``"give another --out"``.
        rank: Rank of a process that shares the work on the target with others, each with its own lock; None
            for exclusive work.
    """
    real = Path(os.path.realpath(target))  # one lock for all links to the target
    path = real.parent / (f".{real.name}.lock" if rank is None else f".{real.name}.rank{rank}.lock")
    # Folders that are made for the lock file are removed at the end if they are empty.
    new_folders = [folder for folder in path.parents if not folder.exists()]
    # Without flock, filelock would otherwise use a marker file, which outlives a killed process. All users
    # may write the lock file, or one that another user left would block a shared folder.
    lock = FileLock(path, mode=0o666, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        lock.acquire(timeout=0.2)  # a holder that ends removes the file: then another one is made
    except Timeout as error:
        raise ValueError(f"{target} is in use by {_read_holder(path)}; wait until it ends, or {hint}") from error
    except OSError as error:
        if isinstance(error, PermissionError) and path.exists():  # of another user
            raise
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


def _clean_up(folder: Path) -> None:
    """Removes what kills have left beside a folder; an old one, ``.NAME.old-PID``, gets the name if nothing has it."""
    for path in list(folder.parent.iterdir()):
        left = re.fullmatch(rf"\.{re.escape(folder.name)}\.(old-\d+|partial-\w+)", path.name)
        if left and left[1].startswith("old") and not folder.exists():
            path.rename(folder)
        elif left:
            shutil.rmtree(path, ignore_errors=True)


def _write_holder(descriptor: int) -> None:
    with suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())


def _read_holder(path: Path) -> str:
    """Returns what the holder has written, which is untrusted text in a shared folder."""
    with suppress(OSError), path.open("rb") as file:
        return printable(file.read(1000).decode(errors="replace")) or "another process"
    return "another process"

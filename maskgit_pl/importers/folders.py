"""The folder that an import writes: whole or not at all, and never in place of what is not its like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_out", "whole_folder"]

_PARTS = ("tokenizer", "transformer")


def check_out(folder: Path) -> None:
    """Refuses to write where something else stands; an older pretrained folder may be replaced.

    Raises:
        FileExistsError: It is there, and neither empty nor a pretrained folder.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else None
    if names is None or any(name not in _PARTS or not (folder / name / "config.json").is_file() for name in names):
        found = "a file or link" if names is None else ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise FileExistsError(
            f"import {folder}: a new folder, or a pretrained folder to replace, is needed, got one with {found}; "
            "name another with --out"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which takes the place of ``folder`` at the end; after an error nothing has changed.

    Args:
        folder: Checked by ``check_out``.

    Yields:
        An empty folder beside it.
    """
    fresh, old = (folder.with_name(f".{folder.name}.{state}-{os.getpid()}") for state in ("partial", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # the swap failed halfway
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

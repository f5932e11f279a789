"""The folder that an import writes: whole or not at all, and never in place of what is not its like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_out", "whole_folder"]


def check_out(folder: Path, parts: Sequence[str]) -> None:
    """Refuses to write where something else stands; an older pretrained folder of the same parts may be replaced.

    Args:
        folder: What is to be written.
        parts: Its folders: ``tokenizer``, and ``transformer`` where one is imported.

    Raises:
        FileExistsError: It is there, and something else would be lost.
        NotADirectoryError: It would lie in a file.
    """
    if not folder.exists() and not folder.is_symlink():
        above = next(path for path in folder.absolute().parents if path.exists())
        if not above.is_dir():
            raise NotADirectoryError(f"import {folder}: a folder is needed above it, got the file {above}")
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else None
    if names is None or any(name not in parts or not (folder / name / "config.json").is_file() for name in names):
        found = "a file or link" if names is None else f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} in it"
        raise FileExistsError(
            f"import {folder}: a new folder, or one with nothing but a pretrained {' and '.join(parts)}, is needed, "
            f"got {found}; name another with --out"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which takes the place of ``folder`` at the end; after an error nothing has changed.

    Args:
        folder: Checked by ``check_out``.

    Yields:
        An empty folder beside it.
    """
    folder = folder.resolve()
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

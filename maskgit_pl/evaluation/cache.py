"""Digests, which identify models and settings, and a cache of arrays that are computed once, such as references."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.files import write_atomically

__all__ = ["Arrays", "cached", "digest_of", "shorten_digest"]

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
_DIGITS = 16
_log = logging.getLogger(__name__)


def digest_of(values: Any) -> str:
    """Returns the SHA-256 in hex of plain values; the order of mapping keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def shorten_digest(digest: str) -> str:
    """Returns the first 16 hex digits (64 bits), which file names and ledger rows hold."""
    return digest[:_DIGITS]


def cached(
    folder: Path | None,
    keys: Mapping[str, Mapping[str, Any]],
    make: Callable[[Sequence[str]], dict[str, Arrays]],
    *,
    required: Collection[str] = (),
) -> dict[str, Arrays]:
    """Returns arrays that are read from files if possible, else made and written.

    1. Each rank reads the files. A damaged file counts as missing.
    2. All ranks together make what any rank could not read, because making it is collective.
    3. The first rank writes what was made.

    Args:
        folder: Folder of the files, which several caches may share; None for no files.
        keys: Plain values that determine the arrays, by name. Name and digest of the values make the file name.
        make: Makes the arrays of some of the names.
        required: Names of arrays that every file must hold.

    Returns:
        Arrays by name, the same on every rank.
    """
    files = {
        name: folder / f"{re.sub('[^A-Za-z0-9_.]+', '-', name)}-{shorten_digest(digest_of(key))}.npz"
        for name, key in keys.items()
        if folder is not None
    }
    # 1.
    found = {name: arrays for name, file in files.items() if (arrays := _read(file, required)) is not None}
    readable = on_all_ranks(lambda: list(found))
    # 2.
    missing = [name for name in keys if not all(name in names for names in readable)]
    made = make(missing) if missing else {}

    # 3.
    def write() -> None:
        if rank_and_world()[0] == 0:
            for name, file in files.items():
                if name in made:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with write_atomically(file) as stream:
                        np.savez(stream, **cast("dict[str, Any]", made[name]))

    on_all_ranks(write)
    return {name: made[name] if name in made else found[name] for name in keys}


def _read(file: Path, required: Collection[str]) -> Arrays | None:
    """Returns the arrays of a file, or None with a warning if it is damaged or lacks a required one."""
    if not file.exists():
        return None
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if not set(required) <= set(arrays.files):
                raise ValueError(f"it must hold {', '.join(required)}, got {', '.join(arrays.files)}")
            return dict(arrays)
    except (OSError, ValueError, EOFError, RuntimeError, BadZipFile) as error:  # RuntimeError: flags of zip members
        _log.warning("%s is damaged (%s); it will be computed again", file, error)
        return None

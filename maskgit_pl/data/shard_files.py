"""The tars of a data folder: finds them by folder, glob or braces, and divides them between train and val.

Used by ``maskgit data index`` for existing shards, and by ``writer``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from maskgit_pl.checks import check_number
from maskgit_pl.data.braces import expand_braces
from maskgit_pl.data.manifest import Split

__all__ = ["find_shards", "glob_files", "locate_shards", "split_shards"]

_VAL, _TEST, _TRAIN = r"val|valid|validation", r"test", r"train|training"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def locate_shards(place: str) -> tuple[Path, list[Path]]:
    """Returns the data folder and all its shards.

    Args:
        place: A folder with tars in it or in its sub-folders; or a glob or brace expression of tars, such as
            ``data/{train,val}-{00000..00012}.tar``. The folder is then the part before the first wildcard.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if the place is a URL or a command, or contains no tars.
    """
    folder = Path(place)
    if not os.path.isdir(place):  # Path.is_dir() raises an error for long names
        if _URL.match(place):
            kind = place.partition(":")[0]
            raise ValueError(f"shards {place!r} must be local files, got {kind}:; download the shards first")
        # The folder ends at the first component with a wildcard.
        parts = folder.parts
        magic = next((n for n, part in enumerate(parts) if re.search(r"[*?\[{]", part)), len(parts) - 1)
        folder, pattern = Path(*parts[:magic]), "/".join(parts[magic:])
        if not folder.is_dir():
            raise FileNotFoundError(f"data folder {folder} does not exist")
        return folder, find_shards(folder, pattern)
    shards = glob_files(folder, "*.tar") or glob_files(folder, "*/*.tar")
    if not shards:
        raise ValueError(
            f"data folder {folder} must contain *.tar files, got none; name the tars with a pattern, or convert images "
            f"with `maskgit data make {folder} --out DIR`"
        )
    return folder, shards


def find_shards(folder: str | Path, pattern: str) -> list[Path]:
    """Returns the tars in a folder that match a pattern, sorted.

    Args:
        folder: The data folder.
        pattern: A glob with or without braces: ``train-*.tar``, ``{00000..00012}.tar``, ``{a,b}/*.tar``.

    Raises:
        ValueError: if the pattern names paths outside the folder, or an expansion of its braces matches no file.
    """
    folder = Path(folder)
    found: set[Path] = set()
    for one in _expand(pattern):
        if _URL.match(one) or "::" in one:
            raise ValueError(f"shard pattern {pattern!r} must name local files, got {one!r}; download the shards first")
        if one.startswith(("/", "~")) or ".." in one.split("/"):
            raise ValueError(f"shard pattern {pattern!r} must name files inside {folder}, got a path outside")
        matches = glob_files(folder, one)
        if not matches:
            raise ValueError(f"shard pattern {pattern!r}: no file in {folder} matches {one!r}")
        found.update(matches)
    return sorted(found)


def split_shards(
    folder: Path,
    shards: Sequence[Path],
    *,
    train: str | None = None,
    val: str | None = None,
    val_fraction: float | None = None,
) -> tuple[dict[Split, list[Path]], str]:
    """Divides the shards between train and val.

    1. val: the shards of the pattern ``val``; else the last ``val_fraction``, if given; else the shards whose path
       contains val, valid or validation; else test; else the last tenth.
    2. train: the shards of the pattern ``train``; else the shards whose path contains train; else all that are not val.

    Args:
        folder: The data folder.
        shards: All shards, sorted.
        train: Pattern of the train shards, or None.
        val: Pattern of the val shards, or None.
        val_fraction: Fraction of the shards that become val, in (0, 1), or None.

    Returns:
        The shards of each split, and a phrase that tells how the splits were chosen.

    Raises:
        ValueError: if a shard would be in both splits, or a split would be empty.
    """
    fraction = 0.1 if val_fraction is None else val_fraction
    check_number("val_fraction", fraction, "(0, 1)")
    train_shards = None if train is None else find_shards(folder, train)
    val_shards, how = (None, "") if val is None else (find_shards(folder, val), f"val is {val}")
    pool = shards if train_shards is None else train_shards
    # 1. val
    if val_shards is None and val_fraction is None:
        val_shards, how = _find_val_by_name(folder, shards if train_shards is None else set(shards) - set(train_shards))
    if val_shards is None:
        val_shards, how = _take_last(pool, fraction, folder)
    # 2. train
    if train_shards is None:
        rest = [shard for shard in pool if shard not in set(val_shards)]
        # If some shards are named train, other shards (such as test, beside val) belong to no split.
        train_shards = [shard for shard in rest if _has_word(folder, shard, _TRAIN)] or rest
    elif how.startswith("the last"):
        train_shards = [shard for shard in train_shards if shard not in set(val_shards)]
    _check_splits(folder, train_shards, val_shards)
    return {"train": train_shards, "val": val_shards}, how


def glob_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files in a folder that match a glob, sorted, without hidden files.

    Raises:
        ValueError: if the pattern is no glob.
    """
    try:
        found = list(folder.glob(pattern))
    except ValueError as error:
        raise ValueError(f"shard pattern {pattern!r} must be a glob: {error}") from error
    return sorted(path for path in found if not path.name.startswith(".") and not path.is_dir())


def _expand(pattern: str) -> list[str]:
    try:
        return expand_braces(pattern)
    except ValueError as error:
        raise ValueError(f"shard pattern: {error}") from error


def _has_word(folder: Path, shard: Path, words: str) -> bool:
    """Returns whether a shard's path inside the folder contains one of the words, not as a part of another word."""
    return bool(re.search(rf"(?<![a-z])({words})(?![a-z])", shard.relative_to(folder).as_posix().lower()))


def _find_val_by_name(folder: Path, shards: Iterable[Path]) -> tuple[list[Path] | None, str]:
    for words in (_VAL, _TEST):
        found = sorted(shard for shard in shards if _has_word(folder, shard, words))
        if found:
            return found, "val shards were found by their names"
    return None, ""


def _take_last(shards: Sequence[Path], fraction: float, folder: Path) -> tuple[list[Path], str]:
    if len(shards) < 2:
        raise ValueError(
            f"data folder {folder} must have at least 2 shards, since whole shards become val, got {len(shards)}; give "
            "others with --val, or make smaller shards"
        )
    # At least one shard for each split.
    count = min(max(1, round(fraction * len(shards))), len(shards) - 1)
    return list(shards[-count:]), f"the last {count} of {len(shards)} shards are val (--val-fraction {fraction:g})"


def _check_splits(folder: Path, train: Sequence[Path], val: Sequence[Path]) -> None:
    both = sorted(set(train) & set(val))
    if both:
        raise ValueError(f"data folder {folder}: {both[0].name} must not be both train and val; give --train and --val")
    if not train:
        raise ValueError(f"data folder {folder}: train must have at least 1 shard, got none; give --train and --val")

"""The tars of a data folder: finding them, dividing them between train and val, and random access to their samples.

* Shards are named by a folder, a glob or braces such as ``train-{00000..01023}.tar``. A few characters can stand for
  any number of names and ``braceexpand`` keeps each range in memory, so the number is bounded before the expansion.
* ``ShardReader`` needs one ``pread`` per image, without walking a tar. It may be forked or pickled into workers: it
  shares no file position, and each process opens its own files.

Used by ``maskgit data index``, the data modules, ``tokenize``, ``stats`` and the configuration of streams.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from braceexpand import braceexpand

from maskgit_pl.checks import check_number, shorten
from maskgit_pl.data.manifest import Manifest, Split
from maskgit_pl.data.tar import BLOCK, member_label
from maskgit_pl.data.vectors import has_all_bytes
from maskgit_pl.errors import DataChangedError
from maskgit_pl.files import open_regular

__all__ = [
    "MAX_NAMES",
    "ShardReader",
    "expand_braces",
    "find_shards",
    "locate_shards",
    "most_names",
    "split_shards",
]

MAX_NAMES = 1_000_000
_MAX_PATTERN = 4096  # characters
_MAX_CHARACTERS = 2**28  # of all names together; no name is longer than its pattern
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?\d+)?")

_VAL, _TEST, _TRAIN = r"val|valid|validation", r"test", r"train|training"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

_MAX_OPEN = 64  # shards open at a time, far below the usual limit of 1,024 files per process


def locate_shards(place: str) -> tuple[Path, list[Path]]:
    """Returns the data folder and all its shards.

    Args:
        place: A folder with tars in it or in its sub-folders; or a glob or brace expression of tars, such as
            ``data/{train,val}-{00000..00012}.tar``. The folder is then the part before the first wildcard.

    Raises:
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
        return folder, find_shards(folder, pattern)
    shards = _glob_files(folder, "*.tar") or _glob_files(folder, "*/*.tar")
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
    try:
        names = expand_braces(pattern)
    except ValueError as error:
        raise ValueError(f"shard pattern: {error}") from error
    found: set[Path] = set()
    for one in names:
        if one.startswith("/") or ".." in one.split("/"):
            raise ValueError(f"shard pattern {pattern!r} must name files inside {folder}, got a path outside")
        matches = _glob_files(folder, one)
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
    pool = list(shards) if train is None else find_shards(folder, train)
    others = shards if train is None else sorted(set(shards) - set(pool))
    named = _find_named(folder, others, _VAL) or _find_named(folder, others, _TEST)
    # 1. val
    if val is not None:
        val_shards, how = find_shards(folder, val), f"val is {val}"
    elif named and val_fraction is None:
        val_shards, how = named, "val shards were found by their names"
    elif len(pool) < 2:
        raise ValueError(
            f"data folder {folder} must have at least 2 shards, since whole shards become val, got {len(pool)}; give "
            "others with --val, or make smaller shards"
        )
    else:
        count = min(max(1, round(fraction * len(pool))), len(pool) - 1)  # at least one shard for each split
        val_shards = pool[-count:]
        how = f"the last {count} of {len(pool)} shards are val (--val-fraction {fraction:g})"
    # 2. train
    train_shards = pool if train is not None and val is not None else sorted(set(pool) - set(val_shards))
    if train is None:
        # If some shards are named train, other shards (such as test, beside val) belong to no split.
        train_shards = _find_named(folder, train_shards, _TRAIN) or train_shards
    if both := sorted(set(train_shards) & set(val_shards)):
        raise ValueError(f"data folder {folder}: {both[0].name} must not be both train and val; give --train and --val")
    if not train_shards:
        raise ValueError(f"data folder {folder}: train must have at least 1 shard, got none; give --train and --val")
    return {"train": train_shards, "val": val_shards}, how


def _glob_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files in a folder that match a glob, sorted, without hidden files.

    Raises:
        ValueError: if the pattern is no glob.
    """
    try:
        found = list(folder.glob(pattern))
    except ValueError as error:
        raise ValueError(f"shard pattern {pattern!r} must be a glob: {error}") from error
    return sorted(path for path in found if not path.name.startswith(".") and not path.is_dir())


def expand_braces(pattern: str) -> list[str]:
    """Expands the braces of a pattern.

    Args:
        pattern: Braces of a shell: ``{000..012}``, ``{0..10..2}``, ``{a..c}``, ``{train,val}``; they may be nested.

    Returns:
        The names, in the order of a shell; the pattern itself if it has no braces.

    Raises:
        ValueError: if the braces do not close, the pattern is too long, or it has more than 1,000,000 names.
    """
    if len(pattern) > _MAX_PATTERN:
        raise ValueError(f"a pattern must have at most {_MAX_PATTERN} characters, got {len(pattern)}")
    if (most := most_names(pattern)) > min(MAX_NAMES, _MAX_CHARACTERS // max(1, len(pattern))):
        raise ValueError(f"a pattern must name at most {MAX_NAMES} shards, got {shorten(most)} in {shorten(pattern)}")
    try:
        return list(braceexpand(pattern))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"braces must close, and not be nested deeply, got {shorten(pattern)}") from error


def most_names(pattern: str) -> int:
    """Returns an upper bound of the names of a pattern: the product of the choices of all braces, nested ones too.

    The step of a range is not counted; braces without a range or a comma have one choice, themselves.
    """
    most, rest = 1, re.sub(r"\\.", "", pattern)
    while choices := re.findall(r"\{([^{}]*)\}", rest):
        for choice in choices:
            ends = _RANGE.fullmatch(choice)
            first, last = map(_order_of, ends.groups()) if ends else (0, choice.count(","))
            most *= abs(last - first) + 1
        rest = re.sub(r"\{[^{}]*\}", "_", rest)
    return most


def _order_of(end: str) -> int:
    return ord(end) if end.isalpha() else int(end)


class ShardReader:
    """A reader with random access to the samples of a split.

    Args:
        manifest: The split.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._index: npt.NDArray[np.void] | None = None
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, most recently used last

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def index(self) -> npt.NDArray[np.void]:
        """The rows of the index, (n,) INDEX_DTYPE, mapped into memory at first use in each process.

        Raises:
            ValueError: if a label is not in [0, num_classes). The message names the first sample.
            DataChangedError: if the file was truncated after it was mapped.
        """
        if self._index is None:
            rows = self.manifest.index()
            # Checked here: on a GPU, a wrong label would be an index error without a name.
            self._check_labels(rows)
            self._index = rows
        if not has_all_bytes(self._index):
            raise self._data_changed_error(f"{self.manifest.split}.npy", "the file was truncated")
        return self._index

    def labels(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the labels, (B,) int64 in [0, num_classes), of samples, (B,) int64 in [0, len(self))."""
        labels: npt.NDArray[np.int64] = self.index["label"][indices].astype(np.int64)
        return labels

    def read(self, index: int) -> bytes:
        """Reads the bytes of a sample's image file.

        Args:
            index: Number of the sample in its split, in [0, len(self)).

        Raises:
            DataChangedError: if the shard cannot be read, or has changed since its manifest was made.
        """
        shard, offset, size, _ = self.index[index].item()
        data = self._pread(shard, size, offset)
        if len(data) != size:
            fault = f"{size} bytes expected at byte {offset}, got {len(data)}"
            raise self._data_changed_error(self.manifest.shards[shard].name, fault)
        return data

    def shard(self, index: int) -> str:
        """Returns the file name of the tar that contains a sample."""
        return self.manifest.shards[int(self.index["shard"][index])].name

    def name(self, index: int) -> str:
        """Returns the name of a sample for error messages: ``SHARD:MEMBER``, with the member's name from the tar."""
        return self._name(*self.index[index].item()[:2])

    def _name(self, shard: int, offset: int) -> str:
        header = self._pread(shard, BLOCK, offset - BLOCK) if offset >= BLOCK else b""
        return member_label(self.manifest.shards[shard].name, header, offset)

    def _data_changed_error(self, name: str, fault: str) -> DataChangedError:
        folder = self.manifest.folder
        return DataChangedError(
            f"data {folder}: {name} changed while it was in use: {fault}; restore it, or regenerate the manifest "
            f"with `maskgit data index {folder}`; `maskgit data verify {folder}` lists all changed files"
        )

    def _check_labels(self, rows: npt.NDArray[np.void]) -> None:
        labels, classes = rows["label"], len(self.manifest.classes)
        if not len(labels) or 0 <= labels.min() <= labels.max() < classes:
            return
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        first = rows[wrong[0]]
        raise ValueError(
            f"data {self.manifest.folder}, split {self.manifest.split}: labels must be in [0, {classes}), got "
            f"{first['label']} in {self._name(*first.item()[:2])}, the first of {len(wrong)}; correct them and "
            f"regenerate the index with `maskgit data index {self.manifest.folder}`"
        )

    def _pread(self, number: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(number), size, offset)
        except (OSError, OverflowError) as error:
            raise self._data_changed_error(self.manifest.shards[number].name, str(error)) from error

    def _file(self, number: int) -> int:
        if number not in self._files:
            shard = self.manifest.shards[number]
            descriptor = open_regular(self.manifest.folder / shard.name)
            if (length := os.fstat(descriptor).st_size) != shard.bytes:
                os.close(descriptor)
                raise self._data_changed_error(shard.name, f"{shard.bytes} bytes expected, got {length}")
            self._files[number] = descriptor
            if len(self._files) > _MAX_OPEN:
                # The first is the least recently used.
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors and maps are not valid in another process.
        return {**self.__dict__, "_index": None, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def _find_named(folder: Path, shards: Iterable[Path], words: str) -> list[Path]:
    """Returns the shards whose path inside the folder contains one of the words, not as a part of another word."""
    pattern = re.compile(rf"(?<![a-z])({words})(?![a-z])")
    return [shard for shard in shards if pattern.search(shard.relative_to(folder).as_posix().lower())]

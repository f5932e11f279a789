"""Indexing: finds ordinary WebDataset tars and writes manifests beside them; the tars stay unchanged.

Used by ``maskgit data index`` for existing shards (such as those of open_clip and img2dataset) and by
``writer``. Faults that would silently lose samples are rejected in one list, with the ways out, or left out
and counted with ``lenient``.

Shards are named by a folder, a glob or braces such as ``train-{00000..01023}.tar``, which webdataset expands.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskgit_pl.data.manifest import Manifest, Shard, Split, index_sha256, save_manifest, union
from maskgit_pl.data.samples import Labels, split_of
from maskgit_pl.data.scan import ShardScan, scan_shard
from maskgit_pl.files import remove_partials
from maskgit_pl.folders import hold_lock
from maskgit_pl.processes import choose_workers, run_jobs
from maskgit_pl.text import shorten

_MAX_CHARACTERS = 2**26  # of all names of a pattern, such as a million of 67; no name is longer than its pattern
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?\d+)?")
_UNLABELLED = "image"  # name of the only class of data without labels
_SCANNED_BYTES = 2**28  # one process reads this much in about 10 seconds


def locate_shards(location: str) -> tuple[Path, list[Path]]:
    """Returns the data folder and all its shards.

    Args:
        location: A folder with tars in it or in its sub-folders; or a glob or brace expression of tars, such as
            ``data/{train,val}-{00000..00012}.tar``. The folder is then the part before the first wildcard.
    """
    folder = Path(location)
    if not os.path.isdir(location):  # Path.is_dir() raises an error for long names
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
    """
    folder, paths = Path(folder), set[Path]()
    for name in expand_braces(pattern, name="shard pattern"):
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"shard pattern {pattern!r} must name files inside {folder}, got another path")
        matches = _glob_files(folder, name)
        if not matches:
            raise ValueError(f"shard pattern {pattern!r}: no file in {folder} matches {name!r}")
        paths.update(matches)
    return sorted(paths)


def _glob_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the files in a folder that match a glob, sorted, without hidden files."""
    paths = (folder / name for name in glob(pattern, root_dir=folder))
    return sorted(path for path in paths if not path.is_dir())


def split_shards(
    folder: Path, shards: Sequence[Path], *, val: str | None = None
) -> tuple[dict[Split, list[Path]], str]:
    """Divides the shards between train and val.

    1. val: the shards of the pattern ``val``, if given; else the shards whose path contains val, valid or
       validation; else test; else the last tenth, at least one.
    2. train: the others; only those whose path contains train, if there are any.

    Args:
        folder: The data folder.
        shards: All shards, sorted.
        val: Pattern of the val shards, or None.

    Returns:
        The shards of each split, and a phrase that tells how the splits were chosen.
    """
    # 1. val
    if val is not None:
        val_shards, how = find_shards(folder, val), f"val is {val}"
    elif named := _find_named(folder, shards, "val") or _find_named(folder, shards, "test"):
        val_shards, how = named, "val shards were found by their names"
    else:
        count = max(1, round(len(shards) / 10))
        val_shards, how = list(shards[-count:]), f"the last {count} of {len(shards)} shards are val"
    # 2. train; other shards, such as test beside val, belong to no split
    others = sorted(set(shards) - set(val_shards))
    train_shards = _find_named(folder, others, "train") or others
    if not train_shards:
        raise ValueError(
            f"data folder {folder} must have a shard for train beside those of val, got none; name the shards of val "
            "with --val, or make smaller shards"
        )
    return {"train": train_shards, "val": val_shards}, how


def _find_named(folder: Path, shards: Sequence[Path], split: str) -> list[Path]:
    """Returns the shards whose path inside the folder has the word for a split; see ``split_of``."""
    return [shard for shard in shards if split_of(shard.relative_to(folder).as_posix()) == split]


def expand_braces(pattern: str, *, name: str) -> list[str]:
    """Expands the braces of a pattern as webdataset does, in the order of a shell; ``name`` is for error messages.

    A pattern may be a stranger's, so the names are counted first: ``{0..999999999}`` would fill the memory.
    """
    if re.search(r"[{}]", _BRACES.sub("", pattern)):
        raise ValueError(f"{name} must have braces that close and are not nested, got {shorten(pattern)}")
    most, count = _MAX_CHARACTERS // max(1, len(pattern)), math.prod(map(_count_choices, _BRACES.findall(pattern)))
    if count > most:
        raise ValueError(f"{name} must name at most {most:,} shards, got {shorten(count)} in {shorten(pattern)}")
    from webdataset.shardlists import expand_urls  # imports torch

    names: list[str] = expand_urls(pattern)
    return names


def _count_choices(braces: str) -> int:
    """Returns the number of names of the content of braces at most: the step of a range is not counted."""
    if (ends := _RANGE.fullmatch(braces)) is None:
        return 1 + braces.count(",")
    first, last = (ord(end) if end.isalpha() else int(end) for end in ends.groups())
    return abs(last - first) + 1


def index_shards(
    folder: str | Path,
    shards: Mapping[Split, Sequence[Path]],
    *,
    classes: Sequence[str] | None = None,
    labels: str = "cls",
    lenient: bool = False,
    workers: int | None = 1,
    on_shard: Callable[[Split, int], object] = lambda split, total: None,
) -> dict[Split, Manifest]:
    """Scans the shards of every split, writes their manifests and returns them.

    1. Scan each shard, in parallel.
    2. Reject all faults in one error, unless ``lenient``.
    3. Write the manifests.

    The folder is locked. Half-written files of a killed run are removed first.

    Args:
        folder: The data folder: parent of the shards; the manifests are written to it.
        shards: The tars of each split, in the order in which samples are numbered.
        classes: Class names; None names the classes by their numbers, up to the largest label.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``; see ``samples.Labels``.
        lenient: True leaves out samples with a fault; False rejects them.
        workers: Number of processes; the result does not depend on it. None: one per core, fewer for little data.
        on_shard: Called with the split of each finished shard and the split's number of shards (for a progress bar).
    """
    folder = Path(folder)
    if labels == "none":
        classes = classes or (_UNLABELLED,)
    task = _ScanTask(folder, Labels(labels, None if classes is None else tuple(classes)), lenient)
    names = {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in shards.items()}
    with hold_lock(folder, hint="index another folder"):
        remove_partials(folder)
        scans = _scan_all(task, names, workers=workers, on_shard=on_shard)  # 1.
        _raise_faults(task, scans)  # 2.
        if classes is None:
            largest = max((int(scan.rows["label"].max()) for scan in scans.values() if len(scan.rows)), default=0)
            classes = [str(label) for label in range(largest + 1)]
        of_splits = {split: {name: scans[name] for name in of_split} for split, of_split in names.items()}
        for split, of_split in of_splits.items():
            if not any(len(scan.rows) for scan in of_split.values()):
                raise ValueError(
                    f"data {folder}, split {split}: {len(of_split)} shards must hold at least 1 complete sample, got 0"
                )
        return {  # 3.
            split: _save_split(task, split, of_split, classes=tuple(classes)) for split, of_split in of_splits.items()
        }


class _ScanTask(NamedTuple):
    """The argument that all workers share."""

    folder: Path
    labels: Labels
    lenient: bool


def _scan_all(
    task: _ScanTask,
    names: Mapping[Split, Sequence[str]],
    *,
    workers: int | None,
    on_shard: Callable[[Split, int], object],
) -> dict[str, ShardScan]:
    """Returns the scan of each shard by its name, in the order of the splits; jobs end in any order."""
    splits = {name: split for split, of_split in names.items() for name in of_split}
    size = sum((task.folder / name).stat().st_size for name in splits)
    scans = {}
    for name, scan in run_jobs(_scan, task, list(splits), workers=choose_workers(workers, work=size / _SCANNED_BYTES)):
        scans[name] = scan
        on_shard(splits[name], len(names[splits[name]]))
    return {name: scans[name] for name in splits}


def _scan(task: _ScanTask, name: str) -> ShardScan:
    return scan_shard(task.folder / name, task.labels)


def _raise_faults(task: _ScanTask, scans: Mapping[str, ShardScan]) -> None:
    """Raises one error that lists all faults of all shards, if there are any.

    If ``lenient``, samples with a fault are left out, so that only damaged shards are faults.
    """
    of_shards = {name: "; ".join(_faults_of(scan, lenient=task.lenient)) for name, scan in scans.items()}
    listed = [f"{name}: {faults}" for name, faults in of_shards.items() if faults]
    if not listed:
        return
    lines = "\n  ".join(listed)
    raise ValueError(
        f"data {task.folder}: {len(listed)} of {len(scans)} shards are rejected:\n  {lines}\n"
        "restore damaged tars; --lenient leaves out samples with a fault and counts them; --label-field NAME reads "
        "labels from .json, --no-labels trains without labels"
    )


def _faults_of(scan: ShardScan, *, lenient: bool) -> Iterator[str]:
    if scan.damage:
        yield scan.damage
    elif not lenient:
        yield from (f"{entry.samples} {fault} (first {entry.first})" for fault, entry in scan.faults.items())
    if not (scan.damage or len(scan.rows) or scan.faults):
        yield "no image samples"


def _save_split(task: _ScanTask, split: Split, scans: Mapping[str, ShardScan], *, classes: tuple[str, ...]) -> Manifest:
    """Writes the index of a split and its manifest, which is returned."""
    rows = np.concatenate([scan.rows for scan in scans.values()])
    # A scan of one tar has shard number 0 in every row.
    rows["shard"] = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans.values()])
    left_out: Counter[str] = Counter()
    for scan in scans.values():
        left_out.update({fault: entry.samples for fault, entry in scan.faults.items()})
    manifest = Manifest(
        task.folder,
        split,
        shards=tuple(Shard(name, scan.bytes, len(scan.rows), scan.sha256) for name, scan in scans.items()),
        classes=classes,
        images=union([scan.images for scan in scans.values() if scan.images is not None]),
        index_sha256=index_sha256(rows),
        left_out=dict(sorted(left_out.items())),
    )
    save_manifest(manifest, rows)
    return manifest

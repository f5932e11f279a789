"""Indexing: writes manifests beside ordinary WebDataset tars, which stay unchanged.

Used by ``maskgit data index`` for existing shards (such as those of open_clip and img2dataset) and by ``writer``.
Faults that would silently lose samples are rejected in one list, or left out and counted with ``lenient``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.files import parse_any_json, write_atomically
from maskgit_pl.shards.braces import expand_braces
from maskgit_pl.shards.index_faults import raise_faults
from maskgit_pl.shards.labels import Labels
from maskgit_pl.shards.manifest import (
    INDEX_DTYPE,
    Manifest,
    Shard,
    Split,
    VectorArray,
    index_sha256,
    save_manifest,
    union,
)
from maskgit_pl.shards.parallel import choose_workers, run_jobs
from maskgit_pl.shards.scan import ShardScan, require_vectors, scan_shard
from maskgit_pl.shards.scan_progress import PROGRESS, read_progress, start_progress, write_scan
from maskgit_pl.shards.vectors import VectorKind, load_vectors, vectors_path, write_vectors

__all__ = ["IndexResult", "find_shards", "index_shards", "locate_shards", "split_shards"]

UNLABELLED = "image"  # name of the only class of data without labels
_MAX_COUNTS_BYTES = 64 * 2**20  # of sizes.json and *_stats.json
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
    shards = _glob(folder, "*.tar") or _glob(folder, "*/*.tar")
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
        matches = _glob(folder, one)
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


@dataclass(frozen=True)
class IndexResult:
    """The result of indexing a data folder.

    Args:
        manifests: Manifest of each split.
        ignored: Number of members of each split that were not read, by extension.
        notes: Counts beside the tars that disagree with them.
    """

    manifests: dict[Split, Manifest]
    ignored: dict[Split, dict[str, int]]
    notes: tuple[str, ...] = ()


def index_shards(
    folder: str | Path,
    shards: Mapping[Split, Sequence[Path]],
    *,
    classes: Sequence[str] | None = None,
    labels: str = "cls",
    vectors: bool = True,
    lenient: bool = False,
    workers: int | None = 1,
    on_shard: Callable[[Split, int], object] = lambda split, total: None,
) -> IndexResult:
    """Scans the shards of every split and writes their manifests.

    1. Scan each shard, in parallel. Each finished scan is appended to ``.index.partial``, so that an interrupted run
       resumes with the shards that are left; a shard is scanned again if its length or modification time differs.
    2. Compare the counts with files beside the tars.
    3. Reject all faults in one error, unless ``lenient``.
    4. Copy the vectors of each split into one array, if the samples have vectors.
    5. Write the manifests and remove ``.index.partial``.

    Args:
        folder: The data folder: parent of the shards; the manifests are written to it.
        shards: The tars of each split, in the order in which samples are numbered.
        classes: Class names; None names the classes by their numbers, up to the largest label.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``; see ``labels.Labels``.
        vectors: True to read ``.npy`` members as vectors, which either all samples or none must have; False ignores
            them.
        lenient: True leaves out samples with a fault; False rejects them.
        workers: Number of processes; the result does not depend on it. None: one per core, fewer for little data.
        on_shard: Called with the split of each finished shard and the split's number of shards (for a progress bar).

    Raises:
        ValueError: if shards are damaged or, unless lenient, have samples with a fault. The message lists all of them.
    """
    folder = Path(folder)
    if labels == "none":
        classes = _only_class(classes)
    options = Labels(labels, None if classes is None else tuple(classes))
    # One process reads 256 MiB in about 10 seconds.
    workers = choose_workers(workers, work=sum(path.stat().st_size for of in shards.values() for path in of) / 2**28)
    names = {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in shards.items()}
    # 1. Scan.
    task = _ScanTask(folder, options, lenient, vectors)
    scans, progress = _scan_all(task, names, workers=workers, on_shard=on_shard)
    kind = _find_kind(scans)
    if kind is not None:
        scans = {name: require_vectors(scan) for name, scan in scans.items()}
    # 2. and 3. Compare counts, and reject faults.
    miscounts = _find_miscounts(folder, names, scans)
    raise_faults(folder, scans, [] if lenient else miscounts, lenient=lenient, labels=labels, kind=kind)
    # 4. and 5. Copy the vectors and write the manifests.
    manifests = _save_all(folder, names, scans, labels=labels, classes=classes or _number_classes(scans), kind=kind)
    progress.unlink(missing_ok=True)
    ignored = {split: _sum_counts(scans[name].ignored for name in of_split) for split, of_split in names.items()}
    return IndexResult(manifests, ignored, tuple(f"{name}: {fault}" for name, fault in miscounts))


def _only_class(classes: Sequence[str] | None) -> Sequence[str]:
    if classes is not None and len(classes) != 1:
        raise ValueError(f"class names: data without labels must have 1 name, got {len(classes)}")
    return classes or (UNLABELLED,)


def _number_classes(scans: Mapping[str, ShardScan]) -> list[str]:
    """Returns numbers as class names, up to the largest label."""
    largest = max((int(scan.rows["label"].max()) for scan in scans.values() if len(scan.rows)), default=0)
    return [str(label) for label in range(largest + 1)]


def _save_all(
    folder: Path,
    names: Mapping[Split, Sequence[str]],
    scans: Mapping[str, ShardScan],
    *,
    labels: str,
    classes: Sequence[str],
    kind: VectorKind | None,
) -> dict[Split, Manifest]:
    """Writes index, vectors and manifest of each split."""
    by_split = {split: {name: scans[name] for name in of_split} for split, of_split in names.items()}
    # All manifests are made before the first is written: an error leaves none.
    made = {split: _make_manifest(folder, split, of_split, classes, labels) for split, of_split in by_split.items()}
    manifests = {}
    for split, (manifest, rows) in made.items():
        vectors = None if kind is None else _save_vectors(folder, split, by_split[split], kind)
        manifests[split] = replace(manifest, vectors=vectors)
        save_manifest(manifests[split], rows)
    return manifests


def _make_manifest(
    folder: Path, split: Split, scans: Mapping[str, ShardScan], classes: Sequence[str], labels: str
) -> tuple[Manifest, npt.NDArray[np.void]]:
    rows = np.concatenate([scan.rows for scan in scans.values()])
    if not len(rows):
        raise ValueError(
            f"data {folder}, split {split}: {len(scans)} shards must hold at least 1 complete sample, got 0"
        )
    # A scan of one tar has shard number 0 in every row.
    rows["shard"] = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans.values()])
    shards = tuple(Shard(name, scan.bytes, len(scan.rows), scan.sha256) for name, scan in scans.items())
    images = union([scan.images for scan in scans.values() if scan.images is not None])
    left_out = _sum_counts({fault: found.count for fault, found in scan.faults.items()} for scan in scans.values())
    digest = index_sha256(rows)
    return Manifest(folder, split, shards, tuple(classes), images, digest, labels, left_out), rows


def _find_kind(scans: Mapping[str, ShardScan]) -> VectorKind | None:
    """Returns the kind of the vectors of the first shard that has some; None if there are no vectors."""
    return next((scan.vector_kind for scan in scans.values() if scan.vector_kind is not None), None)


def _save_vectors(folder: Path, split: Split, scans: Mapping[str, ShardScan], kind: VectorKind) -> VectorArray:
    """Copies the vectors of all shards of a split into one array, in the order of the samples."""
    blocks = (block for name, scan in scans.items() for block in load_vectors(folder / name, scan.vectors, kind))
    with write_atomically(vectors_path(folder, split)) as file:
        return VectorArray(kind, write_vectors(file, kind, sum(len(scan.vectors) for scan in scans.values()), blocks))


class _ScanTask(NamedTuple):
    """The argument that all workers share."""

    folder: Path
    labels: Labels
    lenient: bool
    vectors: bool


def _scan_all(
    task: _ScanTask,
    names: Mapping[Split, Sequence[str]],
    *,
    workers: int,
    on_shard: Callable[[Split, int], object],
) -> tuple[dict[str, ShardScan], Path]:
    path = task.folder / PROGRESS
    known = read_progress(path, task.folder, task.labels, vectors=task.vectors)
    split_of = {name: split for split, of_split in names.items() for name in of_split}
    scans = {name: known[name] for name in split_of if name in known}
    for name in scans:
        on_shard(split_of[name], len(names[split_of[name]]))
    jobs = [name for name in split_of if name not in scans]
    with open(path, "ab" if known else "wb") as file:
        if known:
            file.write(b"\n")  # a killed run may have left half a line
        else:
            start_progress(file, task.labels, vectors=task.vectors)
        for name, scan in run_jobs(_scan_by_name, task, jobs, workers=workers):
            scans[name] = scan
            if scan.sha256:
                write_scan(file, name, scan)
            on_shard(split_of[name], len(names[split_of[name]]))
    return {name: scans[name] for name in split_of}, path


def _scan_by_name(task: _ScanTask, name: str) -> ShardScan:
    try:
        return scan_shard(task.folder / name, task.labels, lenient=task.lenient, vectors=task.vectors)
    except OSError as error:
        none = np.zeros(0, INDEX_DTYPE), np.zeros(0, np.int64)
        return ShardScan(0, 0, "", none[0], None, 0, {}, {}, none[1], damage=str(error.strerror))


def _find_miscounts(
    folder: Path, names: Mapping[Split, Sequence[str]], scans: Mapping[str, ShardScan]
) -> list[tuple[str, str]]:
    """Compares the number of samples of each shard with the counts in files beside it.

    open_clip reads ``sizes.json``; img2dataset writes ``NNNNN_stats.json``.

    Returns:
        (shard, difference) of each count that disagrees.
    """
    found = []
    for parent in sorted({(folder / name).parent for name in scans}):
        sizes = _read_json(parent / "sizes.json")
        for name, scan in scans.items():
            path = folder / name
            if path.parent != parent or scan.damage:
                continue
            stats = _read_json(parent / f"{path.stem}_stats.json")
            stated = {
                "sizes.json": sizes.get(path.name),
                f"{path.stem}_stats.json": stats.get("successes"),
            }
            found += [
                (name, f"{scan.num_keys} samples, {file} states {count!r:.20}")
                for file, count in stated.items()
                if count is not None and count != scan.num_keys
            ]
    return found + _check_total(folder, scans)


def _check_total(folder: Path, scans: Mapping[str, ShardScan]) -> list[tuple[str, str]]:
    """Compares the total with the file ``__len__``, which counts all shards of a folder: it is ignored for a part."""
    path = folder / "__len__"
    if not path.is_file() or {folder / name for name in scans} != set(_glob(folder, "*.tar")):
        return []
    with open(path, "rb") as file:
        stated = file.read(32).strip()
    total = sum(scan.num_keys for scan in scans.values())
    return [] if stated == str(total).encode() else [("__len__", f"states {stated!r} samples, the shards have {total}")]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            content = parse_any_json(file.read(_MAX_COUNTS_BYTES), f"file {path}")
    except ValueError as error:
        raise ValueError(f"{error}; correct it or remove it") from error
    return content if isinstance(content, dict) else {}


def _glob(folder: Path, pattern: str) -> list[Path]:
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


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for of_shard in counts:
        total.update(of_shard)
    return dict(sorted(total.items()))

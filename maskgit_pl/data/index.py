"""Indexing: writes manifests beside ordinary WebDataset tars, which stay unchanged.

Used by ``maskgit data index`` for existing shards (such as those of open_clip and img2dataset) and by ``writer``.
Faults that would silently lose samples are rejected in one list, with the ways out, or left out and counted with
``lenient``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.folders import hold_lock
from maskgit_pl.data.manifest import (
    INDEX_DTYPE,
    Manifest,
    Shard,
    Split,
    VectorArray,
    index_sha256,
    save_manifest,
    union,
)
from maskgit_pl.data.reader import glob_files
from maskgit_pl.data.samples import Labels
from maskgit_pl.data.scan import (
    BAD_VECTOR,
    NO_LABEL,
    NO_VECTOR,
    ShardScan,
    format_counts,
    require_vectors,
    scan_shard,
)
from maskgit_pl.data.vectors import VectorKind, load_vectors, vectors_path, write_vectors
from maskgit_pl.files import parse_any_json, remove_partials, write_atomically
from maskgit_pl.processes import choose_workers, run_jobs

__all__ = ["IndexResult", "index_shards"]

_UNLABELLED = "image"  # name of the only class of data without labels
_MAX_COUNTS_BYTES = 64 * 2**20  # of sizes.json and *_stats.json


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

    1. Scan each shard, in parallel.
    2. Compare the counts with files beside the tars.
    3. Reject all faults in one error, unless ``lenient``.
    4. Copy the vectors of each split into one array, if the samples have vectors.
    5. Write the manifests.

    The folder is locked. Half-written files of a killed run are removed first.

    Args:
        folder: The data folder: parent of the shards; the manifests are written to it.
        shards: The tars of each split, in the order in which samples are numbered.
        classes: Class names; None names the classes by their numbers, up to the largest label.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``; see ``samples.Labels``.
        vectors: True to read ``.npy`` members as vectors, which either all samples or none must have; False ignores
            them.
        lenient: True leaves out samples with a fault; False rejects them.
        workers: Number of processes; the result does not depend on it. None: one per core, fewer for little data.
        on_shard: Called with the split of each finished shard and the split's number of shards (for a progress bar).

    Raises:
        ValueError: if another process indexes the folder, or shards are damaged or, unless lenient, have samples with a
            fault. The message lists all of them.
    """
    folder = Path(folder)
    with hold_lock(folder, hint="index another folder"):
        remove_partials(folder)
        if labels == "none":
            classes = _only_class(classes)
        options = Labels(labels, None if classes is None else tuple(classes))
        # One process reads 256 MiB in about 10 seconds.
        workers = choose_workers(
            workers, work=sum(path.stat().st_size for of in shards.values() for path in of) / 2**28
        )
        names = {split: [path.relative_to(folder).as_posix() for path in paths] for split, paths in shards.items()}
        # 1. Scan.
        task = _ScanTask(folder, options, lenient, vectors)
        scans = _scan_all(task, names, workers=workers, on_shard=on_shard)
        # The first shard with vectors decides their kind.
        kind = next((scan.vector_kind for scan in scans.values() if scan.vector_kind is not None), None)
        if kind is not None:
            scans = {name: require_vectors(scan) for name, scan in scans.items()}
        # 2. and 3. Compare counts, and reject faults.
        miscounts = _find_miscounts(folder, scans)
        _raise_faults(folder, scans, [] if lenient else miscounts, lenient=lenient, labels=labels, kind=kind)
        # 4. and 5. Copy the vectors and write the manifests.
        manifests = _save_all(folder, names, scans, labels=labels, classes=classes or _number_classes(scans), kind=kind)
        ignored = {split: _sum_counts(scans[name].ignored for name in of_split) for split, of_split in names.items()}
        return IndexResult(manifests, ignored, tuple(f"{name}: {fault}" for name, fault in miscounts))


def _only_class(classes: Sequence[str] | None) -> Sequence[str]:
    if classes is not None and len(classes) != 1:
        raise ValueError(f"class names: data without labels must have 1 name, got {len(classes)}")
    return classes or (_UNLABELLED,)


def _number_classes(scans: Mapping[str, ShardScan]) -> list[str]:
    """Returns numbers as class names, up to the largest label."""
    largest = max((int(scan.rows["label"].max()) for scan in scans.values() if len(scan.rows)), default=0)
    return [str(label) for label in range(largest + 1)]


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
) -> dict[str, ShardScan]:
    split_of = {name: split for split, of_split in names.items() for name in of_split}
    scans = {}
    for name, scan in run_jobs(_scan_by_name, task, list(split_of), workers=workers):
        scans[name] = scan
        on_shard(split_of[name], len(names[split_of[name]]))
    return {name: scans[name] for name in split_of}  # jobs end in any order


def _scan_by_name(task: _ScanTask, name: str) -> ShardScan:
    try:
        return scan_shard(task.folder / name, task.labels, lenient=task.lenient, vectors=task.vectors)
    except OSError as error:
        none = np.zeros(0, INDEX_DTYPE), np.zeros(0, np.int64)
        return ShardScan(0, "", none[0], None, 0, {}, {}, none[1], damage=str(error.strerror))


def _find_miscounts(folder: Path, scans: Mapping[str, ShardScan]) -> list[tuple[str, str]]:
    """Compares the numbers of samples with the counts in files beside the shards.

    open_clip reads ``sizes.json``; img2dataset writes ``NNNNN_stats.json``; ``__len__`` counts all shards of a folder.

    Returns:
        (shard, difference) of each count that disagrees.
    """
    found = []
    sizes = {parent: _read_json(parent / "sizes.json") for parent in {(folder / name).parent for name in scans}}
    for name, scan in scans.items():
        path = folder / name
        stats = path.with_name(f"{path.stem}_stats.json")
        stated = {"sizes.json": sizes[path.parent].get(path.name), stats.name: _read_json(stats).get("successes")}
        found += [
            (name, f"{scan.num_keys} samples, {file} states {count!r:.20}")
            for file, count in stated.items()
            if count not in (None, scan.num_keys) and not scan.damage
        ]
    length, total = folder / "__len__", sum(scan.num_keys for scan in scans.values())
    # It says nothing about a part of the shards.
    if length.is_file() and {folder / name for name in scans} == set(glob_files(folder, "*.tar")):
        with open(length, "rb") as file:
            stated_total = file.read(32).strip()
        if stated_total != str(total).encode():
            found.append(("__len__", f"states {stated_total!r} samples, the shards have {total}"))
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            content = parse_any_json(file.read(_MAX_COUNTS_BYTES), f"file {path}")
    except ValueError as error:
        raise ValueError(f"{error}; correct it or remove it") from error
    return content if isinstance(content, dict) else {}


def _raise_faults(
    folder: Path,
    scans: Mapping[str, ShardScan],
    miscounts: Iterable[tuple[str, str]],
    *,
    lenient: bool,
    labels: str,
    kind: VectorKind | None,
) -> None:
    """Raises one error that lists all faults of all shards, if there are any.

    If ``lenient``, samples with a fault are left out, so that only damaged shards are faults.
    """
    faults = {name: list(_faults_of(scan, lenient=lenient, kind=kind)) for name, scan in scans.items()}
    for name, fault in miscounts:
        faults.setdefault(name, []).append(fault)
    listed = [f"{name}: {'; '.join(of_shard)}" for name, of_shard in faults.items() if of_shard]
    if listed:
        found = {fault for scan in scans.values() for fault in scan.faults}
        lines, hints = "\n  ".join(listed), "; ".join(_hints(found, lenient=lenient, labels=labels))
        raise ValueError(f"data {folder}: {len(listed)} of {len(scans)} shards are rejected:\n  {lines}\n{hints}")


def _faults_of(scan: ShardScan, *, lenient: bool, kind: VectorKind | None) -> Iterator[str]:
    if scan.damage:
        yield scan.damage
    elif not lenient:
        yield from (f"{found.count} {fault} (first {found.first})" for fault, found in scan.faults.items())
    if not (scan.damage or scan.num_keys or scan.faults):
        found_members = f"only {format_counts(scan.ignored)}" if scan.ignored else "no members"
        yield f"no image samples, {found_members}"
    if scan.vector_kind not in (None, kind):
        yield f"vectors must have {kind}, as those of the first shard, got {scan.vector_kind}"


def _hints(found: set[str], *, lenient: bool, labels: str) -> Iterator[str]:
    yield "restore damaged tars"
    if not lenient and found:
        yield "--lenient leaves out samples with a fault and counts them"
    if labels == "cls" and NO_LABEL in found:
        yield "--label-field NAME reads labels from .json, --no-labels trains without labels"
    if found & {NO_VECTOR, BAD_VECTOR}:
        yield "--no-vectors ignores .npy members"


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


def _save_vectors(folder: Path, split: Split, scans: Mapping[str, ShardScan], kind: VectorKind) -> VectorArray:
    """Copies the vectors of all shards of a split into one array, in the order of the samples."""
    blocks = (block for name, scan in scans.items() for block in load_vectors(folder / name, scan.vectors, kind))
    with write_atomically(vectors_path(folder, split)) as file:
        return VectorArray(kind, write_vectors(file, kind, sum(len(scan.vectors) for scan in scans.values()), blocks))


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for of_shard in counts:
        total.update(of_shard)
    return dict(sorted(total.items()))

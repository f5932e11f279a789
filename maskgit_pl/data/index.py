"""Indexing: writes manifests beside ordinary WebDataset tars, which stay unchanged.

Used by ``maskgit data index`` for existing shards (such as those of open_clip and img2dataset) and by ``writer``.
Faults that would silently lose samples are rejected in one list, with the ways out, or left out and counted with
``lenient``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
from maskgit_pl.data.vectors import VectorKind, copy_vectors, vectors_path
from maskgit_pl.files import remove_partials, write_atomically
from maskgit_pl.processes import choose_workers, run_jobs

__all__ = ["IndexResult", "index_shards"]

_UNLABELLED = "image"  # name of the only class of data without labels
_SCANNED_BYTES = 2**28  # one process reads this much in about 10 seconds

_Scans = Mapping[str, ShardScan]  # by the name of the shard


class IndexResult(NamedTuple):
    """The manifest of each split, and the number of its members that were not read, by extension."""

    manifests: dict[Split, Manifest]
    ignored: dict[Split, dict[str, int]]


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
    2. Reject all faults in one error, unless ``lenient``.
    3. Copy the vectors of each split into one array, if the samples have vectors.
    4. Write the manifests.

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
    if labels == "none":
        if classes is not None and len(classes) != 1:
            raise ValueError(f"class names: data without labels must have 1 name, got {len(classes)}")
        classes = classes or (_UNLABELLED,)
    task = _ScanTask(folder, Labels(labels, None if classes is None else tuple(classes)), lenient, vectors)
    with hold_lock(folder, hint="index another folder"):
        remove_partials(folder)
        scans = _scan_all(task, shards, workers=workers, on_shard=on_shard)  # 1.
        # The first shard with vectors decides their kind.
        of_all = {name: scan for of_split in scans.values() for name, scan in of_split.items()}
        kind = next((scan.vector_kind for scan in of_all.values() if scan.vector_kind is not None), None)
        if kind is not None:
            of_all = {name: require_vectors(scan) for name, scan in of_all.items()}
            scans = {split: {name: of_all[name] for name in of_split} for split, of_split in scans.items()}
        _raise_faults(task, of_all, kind)  # 2.
        if classes is None:
            largest = max((int(scan.rows["label"].max()) for scan in of_all.values() if len(scan.rows)), default=0)
            classes = [str(label) for label in range(largest + 1)]
        # All indexes are made before the first is written: an error leaves none.
        indexes = {split: _make_index(folder, split, of_split) for split, of_split in scans.items()}
        manifests = {}
        for split, rows in indexes.items():
            manifests[split] = _make_manifest(  # 3.
                task, split, scans[split], rows, classes=tuple(classes), kind=kind
            )
            save_manifest(manifests[split], rows)  # 4.
    ignored = {split: _sum_counts(scan.ignored for scan in of_split.values()) for split, of_split in scans.items()}
    return IndexResult(manifests, ignored)


class _ScanTask(NamedTuple):
    """The argument that all workers share."""

    folder: Path
    labels: Labels
    lenient: bool
    vectors: bool


def _scan_all(
    task: _ScanTask,
    shards: Mapping[Split, Sequence[Path]],
    *,
    workers: int | None,
    on_shard: Callable[[Split, int], object],
) -> dict[Split, dict[str, ShardScan]]:
    workers = choose_workers(
        workers, work=sum(path.stat().st_size for paths in shards.values() for path in paths) / _SCANNED_BYTES
    )
    split_of = {path.relative_to(task.folder).as_posix(): split for split, paths in shards.items() for path in paths}
    scans = {}
    for name, scan in run_jobs(_scan, task, list(split_of), workers=workers):
        scans[name] = scan
        on_shard(split_of[name], len(shards[split_of[name]]))
    # Jobs end in any order.
    return {split: {name: scans[name] for name in split_of if split_of[name] == split} for split in shards}


def _scan(task: _ScanTask, name: str) -> ShardScan:
    try:
        return scan_shard(task.folder / name, task.labels, lenient=task.lenient, vectors=task.vectors)
    except OSError as error:
        rows, vectors = np.zeros(0, INDEX_DTYPE), np.zeros(0, np.int64)
        return ShardScan(0, "", rows, None, {}, {}, vectors, damage=str(error.strerror))


def _raise_faults(task: _ScanTask, scans: _Scans, kind: VectorKind | None) -> None:
    """Raises one error that lists all faults of all shards, if there are any.

    If ``lenient``, samples with a fault are left out, so that only damaged shards are faults.
    """
    of_shards = {name: "; ".join(_faults_of(scan, lenient=task.lenient, kind=kind)) for name, scan in scans.items()}
    listed = [f"{name}: {faults}" for name, faults in of_shards.items() if faults]
    if not listed:
        return
    found = {fault for scan in scans.values() for fault in scan.faults}
    hints = ["restore damaged tars"]
    if not task.lenient and found:
        hints.append("--lenient leaves out samples with a fault and counts them")
    if task.labels.source == "cls" and NO_LABEL in found:
        hints.append("--label-field NAME reads labels from .json, --no-labels trains without labels")
    if found & {NO_VECTOR, BAD_VECTOR}:
        hints.append("--no-vectors ignores .npy members")
    lines = "\n  ".join(listed)
    raise ValueError(
        f"data {task.folder}: {len(listed)} of {len(scans)} shards are rejected:\n  {lines}\n{'; '.join(hints)}"
    )


def _faults_of(scan: ShardScan, *, lenient: bool, kind: VectorKind | None) -> Iterator[str]:
    if scan.damage:
        yield scan.damage
    elif not lenient:
        yield from (f"{found.samples} {fault} (first {found.first})" for fault, found in scan.faults.items())
    if not (scan.damage or len(scan.rows) or scan.faults):
        yield f"no image samples, {f'only {format_counts(scan.ignored)}' if scan.ignored else 'no members'}"
    if scan.vector_kind not in (None, kind):
        yield f"vectors must have {kind}, as those of the first shard, got {scan.vector_kind}"


def _make_index(folder: Path, split: Split, scans: _Scans) -> npt.NDArray[np.void]:
    rows = np.concatenate([scan.rows for scan in scans.values()])
    if not len(rows):
        raise ValueError(
            f"data {folder}, split {split}: {len(scans)} shards must hold at least 1 complete sample, got 0"
        )
    # A scan of one tar has shard number 0 in every row.
    rows["shard"] = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans.values()])
    return rows


def _make_manifest(
    task: _ScanTask,
    split: Split,
    scans: _Scans,
    rows: npt.NDArray[np.void],
    *,
    classes: tuple[str, ...],
    kind: VectorKind | None,
) -> Manifest:
    """Returns the manifest of a split, after its vectors are copied into one array in the order of the samples."""
    vectors = None
    if kind is not None:
        offsets = {task.folder / name: scan.vectors for name, scan in scans.items()}
        with write_atomically(vectors_path(task.folder, split)) as file:
            vectors = VectorArray(kind, copy_vectors(file, offsets, kind))
    return Manifest(
        task.folder,
        split,
        shards=tuple(Shard(name, scan.bytes, len(scan.rows), scan.sha256) for name, scan in scans.items()),
        classes=classes,
        images=union([scan.images for scan in scans.values() if scan.images is not None]),
        index_sha256=index_sha256(rows),
        labels=task.labels.source,
        left_out=_sum_counts({fault: found.samples for fault, found in scan.faults.items()} for scan in scans.values()),
        vectors=vectors,
    )


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for of_shard in counts:
        total.update(of_shard)
    return dict(sorted(total.items()))

"""The error of an index run: all faults of all shards in one list, with the ways out. Used by ``index``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from maskgit_pl.data.scan import BAD_VECTOR, NO_LABEL, NO_VECTOR, ShardScan, format_counts
from maskgit_pl.data.vectors import VectorKind

__all__ = ["raise_faults"]


def raise_faults(
    folder: Path,
    scans: Mapping[str, ShardScan],
    miscounts: Iterable[tuple[str, str]],
    *,
    lenient: bool,
    labels: str,
    kind: VectorKind | None,
) -> None:
    """Raises one error that lists all faults of all shards, if there are any.

    Args:
        folder: The data folder.
        scans: Scan of each shard by its name.
        miscounts: (shard, difference) of each count beside the tars that disagrees.
        lenient: True if samples with a fault are left out, so that only damaged shards are faults.
        labels: Source of the labels; see ``labels.Labels``.
        kind: Kind that all vectors must have; None without vectors.

    Raises:
        ValueError: if there is a fault.
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

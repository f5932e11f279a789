"""Checks that a data folder or a token store still is what its description says: all bytes are read again.

Used by ``maskgit data verify``. The check before each run reads lengths and two headers a shard; this reads all bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.files import open_regular
from maskgit_pl.shards.image_bytes import UnreadableImageError, check_whole
from maskgit_pl.shards.images import decode_image
from maskgit_pl.shards.manifest import Manifest, Shard, Split, index_sha256, load_manifest, splits_of, union
from maskgit_pl.shards.parallel import choose_workers, run_jobs
from maskgit_pl.shards.scan import Labels, ShardScan, scan_shard
from maskgit_pl.shards.tar import BLOCK
from maskgit_pl.shards.tokens import TokenReader, read_description
from maskgit_pl.text import printable

__all__ = ["BadFile", "StoreVerification", "Verification", "verify_shards", "verify_store"]

_READ_BYTES, _DECODED_BYTES = 2**28, 2**25  # that one process reads, and decodes, in some 10 seconds


class BadFile(NamedTuple):
    """A file of a data folder or of a token store that is not what its description says."""

    name: str
    expected: str
    actual: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """The result of reading shards: how much there is, and what of it is bad."""

    shards: int
    samples: int
    bytes: int
    bad: tuple[BadFile, ...]


@dataclass(frozen=True)
class StoreVerification:
    """The result of reading a token store: its files, whether it has hashes, and what is bad."""

    rows: int
    bytes: int
    has_hashes: bool
    bad: tuple[BadFile, ...]


def verify_store(folder: str | Path) -> StoreVerification:
    """Compares shapes, ranges and hashes of all arrays of a token store with its ``store.json``.

    Raises:
        FileNotFoundError: if there is no finished store.
        ValueError: if ``store.json`` cannot be read.
    """
    description = read_description(folder)
    rows, size, bad = 0, 0, list[BadFile]()
    for split in description.samples:
        reader = TokenReader(Path(folder), split, description)
        try:
            tokens, labels = reader.arrays()
            bad += [BadFile(*array) for array in reader.bad_arrays()]
        except (FileNotFoundError, ValueError) as error:
            bad.append(BadFile(f"{split}-*.npy", "two arrays as described", "none that can be used", str(error)))
            continue
        rows, size = rows + len(tokens), size + tokens.nbytes + labels.nbytes
    return StoreVerification(rows, size, bool(description.sha256), tuple(bad))


@dataclass(frozen=True)
class _Task:
    manifests: dict[Split, Manifest]
    decode: bool


def verify_shards(
    folder: str | Path,
    *,
    decode: bool = False,
    workers: int | None = 1,
    on_shard: Callable[[Split, int], object] = lambda split, total: None,
) -> Verification:
    """Compares lengths, hashes, headers, places and labels of all shards with the manifests.

    Args:
        folder: The data folder.
        decode: Decode every image too.
        workers: Processes, a shard each at a time; None: one a core, fewer for little data.
        on_shard: Told the split of each shard that is done, and how many shards the split has (for a progress bar).

    Raises:
        FileNotFoundError: No such folder or manifest.
        ValueError: A manifest cannot be read.
    """
    folder = Path(folder)
    manifests = {split: load_manifest(folder, split, check=False) for split in splits_of(folder) or ("train",)}
    bad = {split: list(_find_bad_index(manifest)) for split, manifest in manifests.items()}
    jobs = [(split, number) for split, manifest in manifests.items() for number in range(len(manifest.shards))]
    found: dict[tuple[Split, int], tuple[BadFile | None, ShardScan | None]] = {}
    size = sum(shard.bytes for manifest in manifests.values() for shard in manifest.shards)
    workers = choose_workers(workers, work=size / (_DECODED_BYTES if decode else _READ_BYTES))
    for job, result in run_jobs(_verify_shard, _Task(manifests, decode), jobs, workers=workers):
        found[job] = result
        on_shard(job[0], len(manifests[job[0]].shards))
    files = [bad_file for split in manifests for bad_file in bad[split]]
    files += [bad_file for job in jobs if (bad_file := found[job][0]) is not None]
    if not files:
        files += list(_find_bad_summary(manifests, [found[job][1] for job in jobs], jobs))
    shards = [shard for manifest in manifests.values() for shard in manifest.shards]
    samples = sum(shard.samples for shard in shards)
    return Verification(len(shards), samples, size, tuple(files))


def _find_bad_index(manifest: Manifest) -> Iterator[BadFile]:
    name = f"{manifest.split}.npy"
    try:
        actual = index_sha256(manifest.index())
    except ValueError as error:
        yield BadFile(name, f"{manifest.samples} rows", "unreadable", str(error))
        return
    if actual != manifest.index_sha256:
        yield BadFile(name, _short(manifest.index_sha256), _short(actual), "index changed since it was made")


def _find_bad_summary(
    manifests: dict[Split, Manifest], scans: Sequence[ShardScan | None], jobs: Sequence[tuple[Split, int]]
) -> Iterator[BadFile]:
    """Compares image sizes with the manifest's range of them."""
    for split, manifest in manifests.items():
        ranges = [
            scan.images
            for (of_split, _), scan in zip(jobs, scans, strict=True)
            if of_split == split and scan is not None and scan.images is not None
        ]
        actual = union(ranges)
        if actual != manifest.images:
            yield BadFile(f"{split}.json", str(manifest.images), str(actual), "image sizes are not those of the shards")


def _verify_shard(task: _Task, job: tuple[Split, int]) -> tuple[BadFile | None, ShardScan | None]:
    split, number = job
    manifest = task.manifests[split]
    shard, path = manifest.shards[number], manifest.folder / manifest.shards[number].name
    try:
        scan = scan_shard(path, Labels(manifest.labels, manifest.classes))
    except OSError as error:
        return BadFile(shard.name, f"{shard.bytes} bytes", "none", str(error.strerror)), None
    fault = _find_difference(manifest, shard, number, scan)
    if fault is None:
        fault = _find_bad_images(path, shard, scan.rows, decode=task.decode)
    return fault, scan


def _find_difference(manifest: Manifest, shard: Shard, number: int, scan: ShardScan) -> BadFile | None:
    if scan.bytes != shard.bytes:
        reason = scan.damage or ("shorter" if scan.bytes < shard.bytes else "longer") + " than when it was indexed"
        return BadFile(shard.name, f"{shard.bytes} bytes", f"{scan.bytes} bytes", reason)
    if scan.damage:
        return BadFile(shard.name, "a whole tar", "damaged", scan.damage)
    if scan.sha256 != shard.sha256:
        what = "its samples too" if len(scan.rows) != shard.samples else "of the same length"
        return BadFile(shard.name, _short(shard.sha256), _short(scan.sha256), f"changed after indexing, {what}")
    if len(scan.rows) != shard.samples:
        return BadFile(shard.name, f"{shard.samples} samples", f"{len(scan.rows)} samples", "the manifest is wrong")
    return _find_wrong_row(manifest, shard, number, scan.rows)


def _find_wrong_row(manifest: Manifest, shard: Shard, number: int, rows: npt.NDArray[np.void]) -> BadFile | None:
    start = sum(earlier.samples for earlier in manifest.shards[:number])
    try:
        stated = manifest.index()[start : start + shard.samples]
    except ValueError:
        return None  # said of the index file itself
    actual = rows.copy()
    actual["shard"] = number
    wrong = np.flatnonzero(np.asarray(stated) != actual)
    if not len(wrong):
        return None
    row = int(wrong[0])
    where = f"{len(wrong)} rows of {manifest.split}.npy are wrong, the first is {start + row}"
    return BadFile(shard.name, str(stated[row]), str(actual[row]), where)


def _find_bad_images(path: Path, shard: Shard, rows: npt.NDArray[np.void], *, decode: bool) -> BadFile | None:
    """Images that are cut off or, if they are decoded, damaged in any way that can be found."""
    faults = []
    descriptor = open_regular(path)
    try:
        for _, offset, size, _ in rows.tolist():
            data = os.pread(descriptor, size, offset)
            member = os.pread(descriptor, 100, offset - BLOCK).rstrip(b"\0").decode("utf-8", "surrogateescape")
            name = f"{shard.name}:{printable(member)}"
            try:
                check_whole(data, name=name)
                if decode:
                    decode_image(data, channels=3, name=name)
            except UnreadableImageError as error:
                faults.append(str(error))
    finally:
        os.close(descriptor)
    if not faults:
        return None
    whole = shard.samples - len(faults)
    return BadFile(shard.name, f"{shard.samples} images", f"{whole} images", f"unreadable; {faults[0]}")


def _short(digest: str) -> str:
    return f"sha256 {digest[:12]}"

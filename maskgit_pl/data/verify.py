"""Verification of a data folder or a token store against its description, by reading all bytes.

Used by ``maskgit data verify``. The check before each run, ``manifest.check_shards``, reads only a few headers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.image_bytes import UnreadableImageError, check_complete
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.labels import Labels
from maskgit_pl.data.manifest import Manifest, Shard, Split, index_sha256, load_manifest, splits_of, union
from maskgit_pl.data.scan import ShardScan, require_vectors, scan_shard
from maskgit_pl.data.store_description import read_description
from maskgit_pl.data.tar import BLOCK
from maskgit_pl.data.token_store import BadFile, TokenReader
from maskgit_pl.data.vectors import load_vectors, vectors_path
from maskgit_pl.files import open_regular, sha256_of
from maskgit_pl.parallel import choose_workers, run_jobs
from maskgit_pl.text import printable

__all__ = ["BadFile", "StoreVerification", "Verification", "verify_shards", "verify_store"]

_READ_BYTES, _DECODED_BYTES = 2**28, 2**25  # one process reads, and decodes, this much in about 10 seconds


@dataclass(frozen=True)
class Verification:
    """The result of ``verify_shards``: number of shards, samples and bytes, and the bad files."""

    shards: int
    samples: int
    bytes: int
    bad: tuple[BadFile, ...]


@dataclass(frozen=True)
class StoreVerification:
    """The result of ``verify_store``: number of rows and bytes, and the bad files."""

    rows: int
    bytes: int
    bad: tuple[BadFile, ...]


def verify_store(folder: str | Path) -> StoreVerification:
    """Compares shapes, ranges and hashes of all arrays of a token store with its ``store.json``.

    Args:
        folder: The store.

    Raises:
        FileNotFoundError: if there is no finished store.
        ValueError: if ``store.json`` is invalid.
    """
    description = read_description(folder)
    rows, size, bad = 0, 0, list[BadFile]()
    for split in description.samples:
        reader = TokenReader(Path(folder), split, description)
        try:
            tokens, labels = reader.arrays()
            vectors = 0 if reader.vector_reader is None else reader.vector_reader.array().nbytes
            bad += reader.bad_arrays()
        except (FileNotFoundError, ValueError) as error:
            bad.append(BadFile(f"{split}-*.npy", "valid arrays", "an invalid array", str(error)))
            continue
        rows, size = rows + len(tokens), size + tokens.nbytes + labels.nbytes + vectors
    return StoreVerification(rows, size, tuple(bad))


@dataclass(frozen=True)
class _Task:
    """The argument that all workers share."""

    manifests: dict[Split, Manifest]
    decode: bool


def verify_shards(
    folder: str | Path,
    *,
    decode: bool = False,
    workers: int | None = 1,
    on_shard: Callable[[Split, int], object] = lambda split, total: None,
) -> Verification:
    """Compares lengths, hashes, headers, offsets and labels of all shards with the manifests.

    1. Compare each index file and each array of vectors with its manifest.
    2. Scan every shard in parallel, as ``index`` does, and compare the result with the manifest.
    3. If nothing differs, compare the range of image sizes, which depends on all shards.

    Args:
        folder: The data folder.
        decode: True also decodes every image.
        workers: Number of processes; each verifies one shard at a time. None: one per core, fewer for little data.
        on_shard: Called with the split of each finished shard and the split's number of shards (for a progress bar).

    Raises:
        FileNotFoundError: if the folder or the manifest is missing.
        ValueError: if a manifest is invalid.
    """
    folder = Path(folder)
    manifests = {split: load_manifest(folder, split, check=False) for split in splits_of(folder) or ("train",)}
    # 1.
    bad = {split: [*_find_bad_index(manifest), *_find_bad_vectors(manifest)] for split, manifest in manifests.items()}
    jobs = [(split, number) for split, manifest in manifests.items() for number in range(len(manifest.shards))]
    # 2. Jobs finish in any order; the report has the order of the manifests.
    found: dict[tuple[Split, int], tuple[BadFile | None, ShardScan | None]] = {}
    size = sum(shard.bytes for manifest in manifests.values() for shard in manifest.shards)
    workers = choose_workers(workers, work=size / (_DECODED_BYTES if decode else _READ_BYTES))
    for job, result in run_jobs(_verify_shard, _Task(manifests, decode), jobs, workers=workers):
        found[job] = result
        on_shard(job[0], len(manifests[job[0]].shards))
    files = [bad_file for split in manifests for bad_file in bad[split]]
    files += [bad_file for job in jobs if (bad_file := found[job][0]) is not None]
    # 3.
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


def _find_bad_vectors(manifest: Manifest) -> Iterator[BadFile]:
    if manifest.vectors is None:
        return
    path, expected = vectors_path(manifest.folder, manifest.split), manifest.vectors
    try:
        manifest.vector_reader().array()
        actual = sha256_of(path)
    except (OSError, ValueError) as error:
        yield BadFile(path.name, f"{manifest.samples} vectors of {expected.kind}", "unreadable", str(error))
        return
    if actual != expected.sha256:
        yield BadFile(path.name, _short(expected.sha256), _short(actual), "vectors changed since they were indexed")


def _find_bad_summary(
    manifests: dict[Split, Manifest], scans: Sequence[ShardScan | None], jobs: Sequence[tuple[Split, int]]
) -> Iterator[BadFile]:
    """Yields each manifest whose range of image sizes is not that of its shards."""
    for split, manifest in manifests.items():
        ranges = [
            scan.images
            for (of_split, _), scan in zip(jobs, scans, strict=True)
            if of_split == split and scan is not None and scan.images is not None
        ]
        actual = union(ranges)
        if actual != manifest.images:
            yield BadFile(
                f"{split}.json", str(manifest.images), str(actual), "differs from the image sizes of the shards"
            )


def _verify_shard(task: _Task, job: tuple[Split, int]) -> tuple[BadFile | None, ShardScan | None]:
    split, number = job
    manifest = task.manifests[split]
    shard, path = manifest.shards[number], manifest.folder / manifest.shards[number].name
    try:
        scan = _scan_as_indexed(manifest, shard, path)
    except OSError as error:
        return BadFile(shard.name, f"{shard.bytes} bytes", "none", str(error.strerror)), None
    fault = _find_difference(manifest, shard, number, scan)
    if fault is None:
        fault = _find_bad_images(path, shard, scan.rows, decode=task.decode)
    return fault, scan


def _scan_as_indexed(manifest: Manifest, shard: Shard, path: Path) -> ShardScan:
    """Scans a shard, with the labels and vectors that ``index`` took."""

    def scan(classes: tuple[str, ...] | None) -> ShardScan:
        found = scan_shard(path, Labels(manifest.labels, classes), vectors=manifest.vectors is not None)
        return found if manifest.vectors is None else require_vectors(found)

    found = scan(manifest.classes)
    # Names that are numbers were given, or made after the scan; then the text "1" was no label.
    made = manifest.classes == tuple(map(str, range(len(manifest.classes))))
    if made and len(found.rows) > shard.samples and found.sha256 == shard.sha256:
        found = scan(None)
    return found


def _find_difference(manifest: Manifest, shard: Shard, number: int, scan: ShardScan) -> BadFile | None:
    if scan.bytes != shard.bytes:
        reason = scan.damage or ("shorter" if scan.bytes < shard.bytes else "longer") + " than when it was indexed"
        return BadFile(shard.name, f"{shard.bytes} bytes", f"{scan.bytes} bytes", reason)
    if scan.damage:
        return BadFile(shard.name, "a complete tar", "damaged", scan.damage)
    if scan.sha256 != shard.sha256:
        what = "with another number of samples" if len(scan.rows) != shard.samples else "same length"
        return BadFile(shard.name, _short(shard.sha256), _short(scan.sha256), f"changed after indexing, {what}")
    if len(scan.rows) != shard.samples:
        return BadFile(shard.name, f"{shard.samples} samples", f"{len(scan.rows)} samples", "the manifest is wrong")
    return _find_wrong_row(manifest, shard, number, scan.rows) or _find_wrong_vector(manifest, shard, number, scan)


def _find_wrong_row(manifest: Manifest, shard: Shard, number: int, rows: npt.NDArray[np.void]) -> BadFile | None:
    start = sum(earlier.samples for earlier in manifest.shards[:number])
    try:
        stated = manifest.index()[start : start + shard.samples]
    except ValueError:
        return None  # _find_bad_index reports it
    # A scan of one tar has shard number 0 in every row.
    actual = rows.copy()
    actual["shard"] = number
    wrong = np.flatnonzero(np.asarray(stated) != actual)
    if not len(wrong):
        return None
    row = int(wrong[0])
    where = f"{len(wrong)} rows of {manifest.split}.npy are wrong, the first is {start + row}"
    return BadFile(shard.name, str(stated[row]), str(actual[row]), where)


def _find_wrong_vector(manifest: Manifest, shard: Shard, number: int, scan: ShardScan) -> BadFile | None:
    """Compares the vectors of a shard with their rows of the array of the split."""
    if manifest.vectors is None or not len(scan.rows):
        return None
    kind = manifest.vectors.kind
    if scan.vector_kind != kind:
        return BadFile(shard.name, str(kind), str(scan.vector_kind), "vectors of another size or type")
    try:
        array = manifest.vector_reader().array()
    except (FileNotFoundError, ValueError):
        return None  # _find_bad_vectors reports it
    row = sum(earlier.samples for earlier in manifest.shards[:number])
    for block in load_vectors(manifest.folder / shard.name, scan.vectors, kind):
        wrong = (array[row : row + len(block)] != block).any(axis=1)
        if wrong.any():
            place = f"row {row + int(wrong.argmax())} of {vectors_path(Path(), manifest.split)}"
            return BadFile(shard.name, f"the vector in {place}", "another vector", "the array is wrong")
        row += len(block)
    return None


def _find_bad_images(path: Path, shard: Shard, rows: npt.NDArray[np.void], *, decode: bool) -> BadFile | None:
    """Finds images that are truncated or, with ``decode``, that cannot be decoded."""
    faults = []
    descriptor = open_regular(path)
    try:
        for _, offset, size, _ in rows.tolist():
            data = os.pread(descriptor, size, offset)
            member = os.pread(descriptor, 100, offset - BLOCK).rstrip(b"\0").decode("utf-8", "surrogateescape")
            name = f"{shard.name}:{printable(member)}"
            try:
                check_complete(data, name=name)
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

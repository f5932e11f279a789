"""Verification of a data folder against its manifests, and the text output of ``maskgit data``.

``maskgit data verify`` reads all bytes; the check before each run, ``manifest.load_manifests``, only a few headers.
The functions ``describe_data`` and ``*_lines`` turn the content of a data folder and its faults into text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.manifest import (
    Manifest,
    Shard,
    ShardReader,
    Split,
    load_manifest,
    read_manifest_summary,
    splits_of,
)
from maskgit_pl.data.tar import BLOCK, member_label
from maskgit_pl.data.writer import LEFT_OUT
from maskgit_pl.files import open_regular, sha256_of
from maskgit_pl.processes import choose_workers, run_jobs
from maskgit_pl.text import count_text, printable, size_text

_READ_BYTES, _DECODED_BYTES = 2**28, 2**25  # one process reads, and decodes, this much in about 10 seconds

_SHOWN_CLASSES = 10


class Verification(NamedTuple):
    """The result of ``verify_shards``."""

    amount: str  # of data that was read, such as "3 shards, 12 samples, 61.4 kB"
    faults: tuple[str, ...]  # a line for each file that differs from its manifest, which begins with its name


def verify_shards(
    folder: str | Path,
    *,
    decode: bool = False,
    workers: int | None = 1,
    on_shard: Callable[[Split, int], object] = lambda split, total: None,
) -> Verification:
    """Compares all files with the hashes in the manifests.

    1. Compare each index file.
    2. Compare every shard, in parallel, and decode its images where the index says that they are, if ``decode``.

    Args:
        folder: The data folder.
        decode: True also decodes every image, unless an index is damaged.
        workers: Number of processes; each verifies one shard at a time. None: one per core, fewer for little data.
        on_shard: Called with the split of each finished shard and the split's number of shards (for a progress bar).
    """
    folder = Path(folder)
    manifests = {split: load_manifest(folder, split) for split in splits_of(folder)}
    faults = [fault for manifest in manifests.values() for fault in _find_bad_index(manifest)]  # 1.
    # 2. Jobs finish in any order; the report has the order of the manifests.
    jobs = [(split, number) for split, manifest in manifests.items() for number in range(len(manifest.shards))]
    shards = [shard for manifest in manifests.values() for shard in manifest.shards]
    size = sum(shard.bytes for shard in shards)
    workers = choose_workers(workers, work=size / (_DECODED_BYTES if decode else _READ_BYTES))
    results = dict[tuple[Split, int], str]()
    for job, fault in run_jobs(_verify_shard, (manifests, decode and not faults), jobs, workers=workers):
        results[job] = fault
        on_shard(job[0], len(manifests[job[0]].shards))
    faults += [results[job] for job in jobs if results[job]]
    amount = f"{count_text(len(shards), 'shard')}, {sum(shard.samples for shard in shards)} samples, {size_text(size)}"
    return Verification(amount, tuple(faults))


def describe_data(folder: Path, done: str, notes: Iterable[str] = ()) -> str:
    """Returns lines about a data folder.

    1. The samples, classes and images, after the action that is done.
    2. The notes.
    3. The number of train images of each class, and the number of classes that a model cannot learn.
    """
    summary, train = read_manifest_summary(folder), load_manifest(folder, "train")
    assert summary.images is not None  # of a data folder
    heights, widths = summary.images.height, summary.images.width
    samples = ", ".join(f"{count} {split}" for split, count in summary.samples.items())
    size = " x ".join(str(low) if low == high else f"{low}-{high}" for low, high in (widths, heights))
    colour = "grey" if summary.channels == 1 else "colour"
    classes = "1 class" if summary.num_classes == 1 else f"{summary.num_classes} classes"
    lines = [f"{folder}: {done}: {samples}; {classes}; {size} pixels, {colour}", *notes]
    counts = np.bincount(ShardReader(train).index["label"], minlength=summary.num_classes).tolist()
    most = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
    listed = [f"{printable(train.classes[label])} {counts[label]}" for label in most]
    if len(listed) > 2 * _SHOWN_CLASSES:
        listed = [*listed[:_SHOWN_CLASSES], "...", *listed[-_SHOWN_CLASSES:]]
    lines.append(f"train images of each class: {', '.join(listed)}")
    if missing := counts.count(0):
        lines.append(f"no image in train of {missing} of {len(counts)} classes, which a model cannot learn")
    return "\n  ".join(lines)


def unreadable_lines(folder: Path) -> Iterator[str]:
    """Yields one line about the images that ``maskgit data make --lenient`` left out, if there are any."""
    if (folder / LEFT_OUT).is_file():
        with open(folder / LEFT_OUT, "rb") as file:
            yield f"{sum(1 for _ in file)} images that cannot be read, listed in {LEFT_OUT}"


def index_lines(
    folder: Path, shards: Mapping[Split, Sequence[Path]], how: str, manifests: Mapping[Split, Manifest]
) -> Iterator[str]:
    """Yields lines about the shards and the phrase of ``split_shards``, and about samples that are left out."""
    for split, paths in shards.items():
        names = [path.relative_to(folder).as_posix() for path in paths]
        span = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        yield f"{split}: {count_text(len(names), 'shard')}, {span}"
    yield how
    for split, manifest in manifests.items():
        yield from (f"{split}: left out: {count} {printable(fault)}" for fault, count in manifest.left_out.items())


def _find_bad_index(manifest: Manifest) -> Iterator[str]:
    try:
        manifest.index(check=True)
    except (OSError, ValueError) as error:
        yield f"{manifest.split}.npy: {error}"


def _verify_shard(task: tuple[dict[Split, Manifest], bool], job: tuple[Split, int]) -> str:
    """Returns the fault of a shard, after its name; an empty text if it has none.

    Args:
        task: Manifests, and True if images are decoded.
        job: The split, and the number of the shard.
    """
    (manifests, decode), (split, number) = task, job
    manifest = manifests[split]
    shard = manifest.shards[number]
    try:
        with open(open_regular(manifest.folder / shard.name), "rb") as file:
            size, sha256 = os.fstat(file.fileno()).st_size, sha256_of(file.fileno())
            if size != shard.bytes:
                return f"{shard.name}: {shard.bytes} bytes expected, got {size}"
            if sha256 != shard.sha256:
                return f"{shard.name}: sha256 {shard.sha256[:12]} expected, got {sha256[:12]}"
            if not decode:
                return ""
            first = sum(earlier.samples for earlier in manifest.shards[:number])
            images = manifest.index()[["offset", "size"]][first : first + shard.samples].tolist()
            faults = list(_find_bad_images(file.fileno(), shard, images))
    except OSError as error:
        return f"{shard.name}: {error.strerror}"
    return f"{shard.name}: {count_text(len(faults), 'unreadable image')}: {faults[0]}" if faults else ""


def _find_bad_images(descriptor: int, shard: Shard, images: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yields the fault of each image that cannot be decoded."""
    for offset, size in images:
        name = member_label(shard.name, os.pread(descriptor, BLOCK, offset - BLOCK), offset)
        try:
            decode_image(os.pread(descriptor, size, offset), channels=3, name=name)
        except UnreadableImageError as error:
            yield str(error)

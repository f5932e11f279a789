"""From a source to a data folder: shards written by ``webdataset.ShardWriter``, manifests, a note of what made them.

The folder is built under a temporary name beside its place and renamed when it is whole, so that a half-made one is
never taken for data. A second run of the same command finds the note and does nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from maskgit_pl.shards.images import decode_image, encode_png, fit_square, read_header
from maskgit_pl.shards.index import find_shards, index_shards
from maskgit_pl.shards.manifest import Split, load_manifest, splits_of
from maskgit_pl.shards.sources import Sample, Source

__all__ = ["RECORD", "is_made_from", "make_shards", "write_split"]

RECORD = "made_from.json"


def make_shards(
    source: Source,
    folder: str | Path,
    *,
    size: int | None = None,
    shard_size: int = 10_000,
    on_sample: Callable[[Split], object] = lambda split: None,
) -> bool:
    """Write a data folder.

    Args:
        source: Where the samples come from.
        folder: The data folder to make.
        size: Crop to the central square and resize to this side; None keeps every file's bytes.
        shard_size: Samples a shard, at most.
        on_sample: Told the split of each sample written (for a progress bar).

    Returns:
        False if the folder already holds this very data, True if it was written.

    Raises:
        ValueError: The folder holds something else, or a sample is not an image that we read.
    """
    folder = Path(folder)
    for name, value in (("size", size), ("shard size", shard_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: at least 1 is needed, got {value}")
    record = describe(source, size=size, shard_size=shard_size)
    if is_made_from(folder, record):
        return False
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"data folder {folder}: it holds something else than what was asked for (see its {RECORD}); "
            "give another --out, or remove it"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(partial, source, record, size=size, shard_size=shard_size, on_sample=on_sample)
        if folder.is_dir():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def describe(source: Source, *, size: int | None = None, shard_size: int = 10_000) -> dict[str, Any]:
    """What decides the content of a data folder, as plain JSON values."""
    return {"source": source.describe(), "size": size, "shard_size": shard_size}


def is_made_from(folder: str | Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds whole shards that were made from this record.

    Raises:
        ValueError: It was, but shards have been changed or lost since.
    """
    try:
        found = json.loads((Path(folder) / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if found != record:
        return False
    for split in splits_of(folder) or ("train",):
        load_manifest(folder, split)
    return True


def write_split(
    samples: Iterable[Sample], folder: Path, split: Split, *, shard_size: int, on_sample: Callable[[Split], object]
) -> None:
    """Write ``SPLIT-%06d.tar`` shards; keys count the samples, so that they are safe names and keep the order."""
    from webdataset import ShardWriter

    # One owner and time for all members: the same samples give the same bytes, hence the same fingerprint.
    # The opener gives an absolute path, which webdataset cannot read as a URL, and keeps % in the folder's name.
    writer = ShardWriter(
        f"{split}-%06d.tar",
        maxcount=shard_size,
        verbose=0,
        opener=lambda name: str(folder.resolve() / name),
        mtime=0,
        user="",
        group="",
    )
    with writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", sample.extension: sample.data, "cls": sample.label})
            on_sample(split)


def _fill(
    partial: Path,
    source: Source,
    record: dict[str, Any],
    *,
    size: int | None,
    shard_size: int,
    on_sample: Callable[[Split], object],
) -> None:
    partial.mkdir(parents=True)
    for split in source.counts:
        samples: Iterable[Sample] = source.samples(split)
        if size is not None:
            samples = (_resized(sample, size) for sample in samples)
        write_split(samples, partial, split, shard_size=shard_size, on_sample=on_sample)
    shards = {split: find_shards(partial, f"{split}-*.tar") for split in source.counts}
    index_shards(partial, shards, classes=source.classes)
    (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _resized(sample: Sample, size: int) -> Sample:
    """A sample whose image is a square of that side; JPEG stays JPEG (quality 95), everything else becomes PNG."""
    header = read_header(sample.data, name=sample.name)
    if header.height == header.width == size:
        return sample
    image = decode_image(sample.data, channels=1 if header.channels == 1 else 3, name=sample.name)
    square = fit_square(image, image_size=size, crop=None)
    if header.format == "JPEG":
        return sample._replace(data=_encode_jpeg(square))
    return sample._replace(data=encode_png(square), extension="png")


def _encode_jpeg(image: Any) -> bytes:
    from torchvision.io import encode_jpeg

    data: bytes = encode_jpeg(image, quality=95).numpy().tobytes()
    return data

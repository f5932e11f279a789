"""Makes a data folder in one call: from images of your own, or from a public data set. Logs its content.

The commands ``maskgit data make`` and ``maskgit data fetch`` and the demo call these functions. The same call resumes
after a stop, and does nothing if the folder is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from maskgit_pl.checks import ImageSize, check_choice
from maskgit_pl.data.folders import hold_lock
from maskgit_pl.data.manifest import load_manifests, read_manifest_summary
from maskgit_pl.data.samples import Source
from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.sources.public import public_datasets
from maskgit_pl.data.stats import find_duplicates
from maskgit_pl.data.verify import describe_data, duplicate_lines, unreadable_lines, untrained_lines
from maskgit_pl.data.writer import make_shards
from maskgit_pl.processes import named_bars

__all__ = ["convert_images", "fetch_dataset"]

log = logging.getLogger(__name__)

_MOST_COMPARED = 2**30  # bytes of shards that are read again after they are made


def convert_images(  # noqa: PLR0913  # the options of its source and of its shards
    images: str | Path,
    out: Path,
    *,
    image_size: ImageSize | None = None,
    shard_size: int = 10_000,
    val_fraction: float | None = None,
    classes: Sequence[str] | None = None,
    label_field: str = "label",
    vectors: bool = True,
    lenient: bool = False,
    workers: int | None = None,
) -> None:
    """Makes the data folder of a folder, an archive or a data set of images, and logs which images are equal.

    Args:
        images: See ``open_source``, also for the options of a source.
        out: Data folder.
        image_size: Side, or (height, width), of the images; None keeps the files. See ``make_shards``.
        shard_size: Maximum number of images per shard.
        val_fraction: Fraction of the images that become val; None for 0.1. Not for a source that has both splits.
        classes: Class names, if the source has none.
        label_field: Column of the labels in a table.
        vectors: True to take the ``.npy`` files beside images as their vectors.
        lenient: True leaves out and lists images that cannot be read; False rejects them.
        workers: Number of processes; None for one per core, fewer for little data.

    Raises:
        FileNotFoundError: if there are no such images.
        ValueError: if images cannot be read, or the folder has other content.
    """
    source = open_source(images, classes=classes, val_fraction=val_fraction, label_field=label_field, vectors=vectors)
    _make(source, out, image_size=image_size, shard_size=shard_size, lenient=lenient, workers=workers)
    if sum(file.stat().st_size for file in out.glob("*.tar")) > _MOST_COMPARED:
        log.info("  duplicates: not searched for in so much data; `maskgit data stats %s` does", out)
        return
    found = find_duplicates(load_manifests(out))
    if found.val_in_train or any(found.repeated.values()):
        log.info("%s", "\n".join(f"  {line}" for line in duplicate_lines(found)))


def fetch_dataset(
    name: str,
    out: Path | None = None,
    *,
    raw: Path | None = None,
    source: Path | None = None,
    image_size: int | None = None,
) -> None:
    """Downloads a public data set, unless it is there, checks its files and makes its data folder.

    Args:
        name: One of ``public_datasets()``.
        out: Data folder; None for ``data/shards/NAME``.
        raw: Folder that keeps the downloaded files; None for ``data/raw/NAME``.
        source: Existing files in place of a download; see ``Dataset.source``.
        image_size: Side of the images in pixels, one of ``Dataset.image_sizes``; None for the first.

    Raises:
        FileNotFoundError: if no source of the data can be reached.
        ValueError: if there is no such data set or size, a file is not the known one, or the folder has other content.
    """
    datasets = public_datasets()
    dataset = datasets[check_choice("NAME", name, datasets)]
    size = dataset.image_sizes[0] if image_size is None else image_size
    if size not in dataset.image_sizes:
        raise ValueError(f"image_size must be {' or '.join(map(str, dataset.image_sizes))} for {name}, got {size}")
    files = dataset.fetch(raw or Path("data/raw", name)) if source is None else source
    _make(dataset.open(files, image_size=size), out or Path("data/shards", name))


def _make(
    source: Source,
    out: Path,
    *,
    image_size: ImageSize | None = None,
    shard_size: int = 10_000,
    lenient: bool = False,
    workers: int | None = 1,
) -> None:
    """Makes a data folder with a progress bar and logs its content."""
    # The lock is held until the manifest is written, so that two processes never write to the same folder.
    with hold_lock(out, hint="give another --out"), named_bars("samples") as advance:
        made = make_shards(
            source,
            out,
            size=image_size,
            shard_size=shard_size,
            lenient=lenient,
            workers=workers,
            on_samples=lambda split, count: advance(split, count, source.counts[split]),
        )
    done = "made" if made else "complete already, nothing to do"
    lines = [describe_data(out, read_manifest_summary(out), done)]
    lines += [f"  left out: {line}" for line in [*source.left_out, *unreadable_lines(out)]]
    log.info("%s", "\n".join([*lines, *(f"  {line}" for line in untrained_lines(out))]))

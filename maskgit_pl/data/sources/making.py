"""Makes a data folder in one call: from a public data set, or from images of your own. Logs its content.

The same call resumes after a stop, and does nothing if the folder is complete.
"""

from __future__ import annotations

import logging
from pathlib import Path

from maskgit_pl.data.folders import hold_lock
from maskgit_pl.data.manifest import load_manifests, read_manifest_summary
from maskgit_pl.data.samples import Source
from maskgit_pl.data.sources.opening import HUB_PREFIX, open_source
from maskgit_pl.data.sources.public import public_datasets
from maskgit_pl.data.stats import find_duplicates
from maskgit_pl.data.verify import describe_data, duplicate_lines, unreadable_lines, untrained_lines
from maskgit_pl.data.writer import make_shards
from maskgit_pl.processes import named_bars

__all__ = ["convert_images", "fetch_dataset"]

log = logging.getLogger(__name__)

_MOST_COMPARED = 2**30  # bytes of shards that are read again after they are made


def fetch_dataset(name: str, out: Path) -> None:
    """Downloads a public data set to ``data/raw/NAME``, unless it is there, and makes its data folder.

    Args:
        name: One of ``public_datasets()``.
        out: Data folder.

    Raises:
        FileNotFoundError: if no source of the data can be reached.
        ValueError: if a file is not the known one, or the folder has other content.
    """
    dataset = public_datasets()[name]
    files = dataset.fetch(Path("data/raw", name))
    _make(dataset.open(files, image_size=dataset.image_sizes[0]), out, workers=1)


def convert_images(images: str | Path, out: Path) -> None:
    """Makes the data folder of a folder, an archive or a data set of images, and logs which images are equal.

    Args:
        images: See ``open_source``.
        out: Data folder.

    Raises:
        FileNotFoundError: if there are no such images.
        ValueError: if images cannot be read, or the folder has other content.
    """
    # Several workers would each read a stream from its beginning.
    _make(open_source(images), out, workers=1 if str(images).startswith(HUB_PREFIX) else None)
    if sum(file.stat().st_size for file in out.glob("*.tar")) > _MOST_COMPARED:
        log.info("  duplicates: not searched for in so much data; `maskgit data stats %s` does", out)
        return
    found = find_duplicates(load_manifests(out))
    if found.val_in_train or any(found.repeated.values()):
        log.info("%s", "\n".join(f"  {line}" for line in duplicate_lines(found)))


def _make(source: Source, out: Path, *, workers: int | None) -> None:
    # The lock is held until the manifest is written, so that two processes never write to the same folder.
    with hold_lock(out, hint="name another data folder"), named_bars("samples") as advance:
        made = make_shards(
            source,
            out,
            workers=workers,
            on_samples=lambda split, count: advance(split, count, source.counts[split]),
        )
    done = "made" if made else "complete already, nothing to do"
    lines = [describe_data(out, read_manifest_summary(out), done)]
    lines += [f"  left out: {line}" for line in [*source.left_out, *unreadable_lines(out)]]
    log.info("%s", "\n".join([*lines, *(f"  {line}" for line in untrained_lines(out))]))

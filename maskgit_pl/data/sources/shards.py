"""Makes a data folder in one call, from images of your own or from a public data set, and logs its content.

The sources of images are files in folders and archives, IDX and parquet files, and the Hub; see
``samples.Source``. The commands ``maskgit data make`` and ``maskgit data fetch`` and the demo call these
functions. The same call resumes after a stop, and does nothing if the folder is complete.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskgit_pl.checks import ImageSize, check_choice, check_number
from maskgit_pl.data.samples import Source, split_of
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.parquet import ParquetFolder, find_parquet
from maskgit_pl.data.sources.public import IdxFiles, public_datasets
from maskgit_pl.data.verify import describe_data, unreadable_lines
from maskgit_pl.data.writer import make_shards
from maskgit_pl.folders import hold_lock
from maskgit_pl.processes import named_bars
from maskgit_pl.text import printable

log = logging.getLogger(__name__)

_HUB = "hf:"
_NAME = re.compile(r"(?P<name>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")


def convert_images(  # noqa: PLR0913  # the options of its source and of its shards
    images: str | Path,
    out: Path,
    *,
    image_size: ImageSize | None = None,
    shard_size: int = 10_000,
    val_fraction: float | None = None,
    classes: Sequence[str] | None = None,
    label_field: str = "label",
    lenient: bool = False,
    workers: int | None = None,
) -> None:
    """Makes the data folder of a folder, an archive or a data set of images.

    See ``open_source`` for the source ``images`` and its options, and ``make_shards`` for the data folder ``out``.
    """
    source = open_source(images, classes=classes, val_fraction=val_fraction, label_field=label_field)
    _make(source, out, image_size=image_size, shard_size=shard_size, lenient=lenient, workers=workers)


def fetch_dataset(name: str, out: Path | None = None, *, source: Path | None = None) -> None:
    """Downloads a public data set, unless it is there, checks its files and makes its data folder.

    Args:
        name: One of ``public_datasets()``.
        out: Data folder; None for ``data/shards/NAME``.
        source: Existing files in place of a download to ``data/raw/NAME``: a folder, or the picture of Blue Marble.
    """
    datasets = public_datasets()
    dataset = datasets[check_choice("NAME", name, datasets)]
    files = dataset.fetch(Path("data/raw", name)) if source is None else source
    _make(dataset.open(files), out or Path("data/shards", name))


def _make(source: Source, out: Path, **options: Any) -> None:
    """Makes a data folder with a progress bar and logs its content; for the options, see ``make_shards``."""
    # The lock is held until the manifest is written, so that two processes never write to the same folder.
    with hold_lock(out, hint="give another --out"), named_bars("samples") as advance:
        is_made = make_shards(
            source, out, on_samples=lambda split, count: advance(split, count, source.counts[split]), **options
        )
    done = "made" if is_made else "complete already, nothing to do"
    left_out = [*source.left_out, *unreadable_lines(out)]
    log.info("%s", describe_data(out, done, [f"left out: {line}" for line in left_out]))


def open_source(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    val_fraction: float | None = None,
    label_field: str = "label",
) -> Source:
    """Opens a source; its content decides the kind.

    Args:
        path: A folder of IDX, parquet or image files, an archive of image files, or ``hf:NAME[@REVISION][:SPLIT]`` for
            a data set of the Hugging Face Hub, which is downloaded to ``data/raw``.
        classes: Class names, if the source has none.
        val_fraction: Fraction of the samples that become val, in (0, 1), for a source without splits; None for 0.1.
        label_field: Column of the labels in parquet and metadata files.
    """
    fraction = 0.1 if val_fraction is None else check_number("val_fraction", val_fraction, "(0, 1)")
    folder = _download(str(path).removeprefix(_HUB)) if str(path).startswith(_HUB) else Path(path)
    source: IdxFiles | ParquetFolder | ImageFolder
    if folder.is_dir() and any(folder.glob("*-images?idx3-ubyte*")):
        source = IdxFiles(folder, classes=classes)
    elif folder.is_dir() and find_parquet(folder):
        source = ParquetFolder(folder, classes=classes, val_fraction=fraction, label_field=label_field)
    else:
        source = ImageFolder(folder, classes=classes, val_fraction=fraction, label_field=label_field)
    if val_fraction is not None and source.has_splits:
        raise ValueError(
            f"val_fraction must not be set for source {printable(path)}, which has a train and a val split; leave it "
            "out"
        )
    return source


def _download(name: str) -> Path:
    """Downloads the files of a data set of the Hub that are not there yet, and returns their folder.

    Of a data set with a split, only the files that have the split in their path are downloaded. A file of the
    data set is never run.
    """
    source = f"source {_HUB}{printable(name)}"
    if (match := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{source} must be {_HUB}OWNER/NAME[@REVISION][:SPLIT]")
    from huggingface_hub import errors, snapshot_download

    folder = Path("data/raw", re.sub(r"[^\w.-]+", "-", name))
    try:
        snapshot_download(
            match["name"],
            repo_type="dataset",
            revision=match["revision"],
            allow_patterns=match["split"] and f"*{match['split']}*",
            local_dir=folder,
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, FileNotFoundError) as error:
        got = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{source} must be a data set of the Hub, with a connection to it, got: {got}"
        ) from error
    parts = sorted({path.relative_to(folder).parts[0] for path in find_parquet(folder) if path.parent != folder})
    if len(several := [name for name in parts if not split_of(name)]) > 1:
        raise ValueError(
            f"{source} must have parquet files of one configuration, got {', '.join(map(printable, several))}; they "
            f"are downloaded: name the folder of one, such as {printable(folder / several[0])}"
        )
    return folder

"""The sources of ``maskgit data make``: image files in folders and archives, IDX and parquet files, the Hub.

A source counts the samples of its splits, yields samples one by one, and describes itself, so that a second run of the
same command finds that the data are complete. See ``samples.Source`` for the interface.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from maskgit_pl.data.samples import Source
from maskgit_pl.data.sources.idx import IdxFiles
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.parquet import ParquetFolder, find_parquet, split_of
from maskgit_pl.errors import printable

__all__ = ["open_source"]

_HUB = "hf:"
_NAME = re.compile(r"(?P<name>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")


def open_source(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    val_fraction: float | None = None,
    label_field: str = "label",
    vectors: bool = True,
) -> Source:
    """Opens a source; its content decides the kind.

    Args:
        path: A folder of IDX, parquet or image files, an archive of image files, or ``hf:NAME[@REVISION][:SPLIT]`` for
            a data set of the Hugging Face Hub, which is downloaded to ``data/raw``.
        classes: Class names, if the source has none.
        val_fraction: Fraction of the samples that become val, in (0, 1), for a source without splits; None for 0.1.
        label_field: Column of the labels in parquet and metadata files.
        vectors: True to take the ``.npy`` files beside images as their vectors.

    Raises:
        FileNotFoundError: if there is no such folder, archive or data set.
        ValueError: if it is not a valid source, or has splits and ``val_fraction`` is set.
    """
    fraction = 0.1 if val_fraction is None else val_fraction
    folder = _download(str(path).removeprefix(_HUB)) if str(path).startswith(_HUB) else Path(path)
    source: IdxFiles | ParquetFolder | ImageFolder
    if folder.is_dir() and any(folder.glob("*-images*idx3*")):
        source = IdxFiles(folder, classes=classes)
    elif folder.is_dir() and find_parquet(folder):
        source = ParquetFolder(folder, classes=classes, val_fraction=fraction, label_field=label_field)
    else:
        source = ImageFolder(folder, classes=classes, val_fraction=fraction, label_field=label_field, vectors=vectors)
    if val_fraction is not None and source.has_splits:
        raise ValueError(
            f"val_fraction must not be set for source {printable(path)}, which has a train and a val split; leave it "
            "out"
        )
    return source


def _download(name: str) -> Path:
    """Downloads the files of a data set of the Hub that are not there yet, and returns their folder.

    Of a data set with a split, only the files that have the split in their path are downloaded. A file of the data set
    is never run.
    """
    shown = f"source {_HUB}{printable(name)}"
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{shown} must be {_HUB}OWNER/NAME[@REVISION][:SPLIT]")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path("data/raw", re.sub(r"[^\w.-]+", "-", name))
    try:
        snapshot_download(
            found["name"],
            repo_type="dataset",
            revision=found["revision"],
            allow_patterns=found["split"] and f"*{found['split']}*",
            local_dir=folder,
        )
    except (HfHubHTTPError, HFValidationError, FileNotFoundError) as error:
        got = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{shown} must be a data set of the Hub, with a connection to it, got: {got}"
        ) from error
    parts = sorted({path.relative_to(folder).parts[0] for path in find_parquet(folder) if path.parent != folder})
    if len(several := [name for name in parts if not split_of(name)]) > 1:
        raise ValueError(
            f"{shown} must have parquet files of one configuration, got {', '.join(map(printable, several))}; they are "
            f"downloaded: name the folder of one, such as {printable(folder / several[0])}"
        )
    return folder

"""The sources of ``maskgit data make``: image files in folders and archives, IDX and parquet files, ``datasets``.

A source counts the samples of its splits, yields samples one by one, and describes itself, so that a second run of the
same command finds that the data are complete. See ``samples.Source`` for the interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maskgit_pl.data.samples import Source
from maskgit_pl.data.sources.idx import IdxFiles
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.tables import HubDataset, ParquetFolder
from maskgit_pl.errors import printable

__all__ = ["HUB_PREFIX", "open_source"]

HUB_PREFIX = "hf:"


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
        path: A folder of IDX, parquet or image files, an archive of image files, or ``hf:NAME[:SPLIT]`` for a data set
            of the Hugging Face Hub.
        classes: Class names, if the source has none.
        val_fraction: Fraction of the samples that become val, in (0, 1), for a source without splits; None for 0.1.
        label_field: Column of the labels in parquet and metadata files, and in data sets of the Hub.
        vectors: True to take the ``.npy`` files beside images as their vectors.

    Raises:
        FileNotFoundError: if there is no such folder or archive.
        ValueError: if it is not a valid source, or has splits and ``val_fraction`` is set.
    """
    fraction = 0.1 if val_fraction is None else val_fraction
    source = _open(path, classes=classes, val_fraction=fraction, label_field=label_field, vectors=vectors)
    if val_fraction is not None and source.has_splits:
        raise ValueError(
            f"val_fraction must not be set for source {printable(path)}, which has a train and a val split; leave it "
            "out"
        )
    return source


def _open(
    path: str | Path, *, classes: Sequence[str] | None, val_fraction: float, label_field: str, vectors: bool
) -> IdxFiles | ParquetFolder | HubDataset | ImageFolder:
    """Opens a source with a class for its kind."""
    if str(path).startswith(HUB_PREFIX):
        name = str(path).removeprefix(HUB_PREFIX)
        return HubDataset(name, classes=classes, val_fraction=val_fraction, label_field=label_field)
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*-images*idx3*")):
        return IdxFiles(folder, classes=classes)
    if folder.is_dir() and (any(folder.glob("*.parquet")) or any(folder.glob("*/*.parquet"))):
        return ParquetFolder(folder, classes=classes, val_fraction=val_fraction, label_field=label_field)
    return ImageFolder(folder, classes=classes, val_fraction=val_fraction, label_field=label_field, vectors=vectors)

"""Describes the images that a measurement holds out: the val split of a data folder, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskgit_pl.data.manifest import DataSummary
from maskgit_pl.data.writer import MAX_RECORD_BYTES, RECORD
from maskgit_pl.files import read_json

__all__ = ["describe_held_out"]

_ADVICE = (
    "to judge on an official test set, put its images into test/ beside train/, or give a data folder whose val split "
    "it is with --data"
)
_SOURCES = {  # kind of source in the data folder's record -> origin of its val split
    "idx": "the official test set of the IDX files",
    "emoji": "pictures of the emoji that `maskgit data fetch` holds out",
    "blue marble": "tiles of the blocks that `maskgit data fetch` holds out",
    "image folder": f"those in val/ or test/ of the image folder if it has one, else about a tenth of all; {_ADVICE}",
    "parquet": "those of its validation or test files if it has them, else about a tenth of all",
}
_UNKNOWN = f"the val shards, which maskgit_pl did not choose; {_ADVICE}"


def describe_held_out(folder: Path, summary: DataSummary) -> dict[str, Any]:
    """Describes the val split of a data folder in plain values.

    Args:
        folder: Data folder.
        summary: Its summary.

    Returns:
        ``split``, ``images``, ``fraction`` (of train and val together), ``source`` (``idx``, ``image folder``, ... or
        ``unknown``), and ``text``, a sentence.
    """
    record = read_json(folder / RECORD, max_bytes=MAX_RECORD_BYTES) if (folder / RECORD).is_file() else {}
    made_from = record.get("source") if isinstance(record, dict) else None
    kind = made_from.get("kind") if isinstance(made_from, dict) else None
    source = kind if kind in _SOURCES else "unknown"
    images = summary.samples["val"]
    fraction = images / sum(summary.samples.values())
    text = (
        f"Held out: {images:,} images of the val split ({fraction:.0%} of the data), {_SOURCES.get(source, _UNKNOWN)}."
    )
    return {"split": "val", "images": images, "fraction": fraction, "source": source, "text": text}

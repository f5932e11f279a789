"""A folder of parquet files as Hugging Face's datasets are stored, as a source of samples; needs pyarrow.

Columns: an image, as bytes or as a struct with ``bytes`` in it, and a class number. Names of the classes stand in the
metadata that the ``datasets`` package writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.shards.images import read_header
from maskgit_pl.shards.manifest import Split
from maskgit_pl.shards.samples import EXTENSIONS, Sample, check_val_fraction, is_val
from maskgit_pl.shards.walk import MAX_CLASSES

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = ["ParquetFolder"]

_SPLIT_NAMES: tuple[tuple[Split, str], ...] = (("train", "train"), ("val", "validation|valid|val"), ("val", "test"))
_IMAGE_COLUMNS = ("image", "img")
_ROWS_AT_ONCE = 64  # of images, so that memory stays small whatever the row groups are


class ParquetFolder:
    """Parquet files in a folder or its sub-folders; ``train-*`` and ``validation-*`` (or ``test-*``) are the splits.

    Samples keep the order of the files' names and rows. Where there is no val, a hash of file name and row decides.

    Args:
        folder: The folder.
        classes: Class names, where the metadata has none.
        val_fraction: Share of the rows that become val where no file is, in (0, 1).
        label_field: Column of the class numbers.

    Raises:
        ValueError: pyarrow is missing, a file is none or lacks a column, labels are no classes, or names disagree.
    """

    def __init__(
        self, folder: Path, *, classes: Sequence[str] | None, val_fraction: float = 0.1, label_field: str = "label"
    ) -> None:
        check_val_fraction(val_fraction)
        self.folder = folder
        self.label_field = label_field
        self._paths, of_split = _files_of_splits(folder)
        opened = [_open(path) for path in self._paths]
        self.image_field = _image_column(opened[0], self._paths[0])
        self.classes = _class_names(opened, self._paths, label_field, classes)
        self._labels = [
            _read_labels(file, path, label_field, self.classes) for file, path in zip(opened, self._paths, strict=True)
        ]
        if not self.classes:
            self.classes = tuple(str(label) for label in range(1 + max(int(labels.max()) for labels in self._labels)))
        self._rows = self._split_rows(of_split, val_fraction)
        for split, rows in self._rows.items():
            if not len(rows):
                raise ValueError(f"source {folder}: the {split} split has no rows")

    @property
    def counts(self) -> dict[Split, int]:
        """Rows of each split."""
        return {split: len(rows) for split, rows in self._rows.items()}

    def describe(self) -> dict[str, Any]:
        """Class names, and a hash over names and lengths of the files, labels and rows of each split."""
        digest = hashlib.sha256()
        for path, labels in zip(self._paths, self._labels, strict=True):
            digest.update(f"{path.relative_to(self.folder).as_posix()} {path.stat().st_size}\n".encode())
            digest.update(labels.tobytes())
        rows = {split: hashlib.sha256(rows.tobytes()).hexdigest() for split, rows in self._rows.items()}
        fields = [self.image_field, self.label_field]
        return {
            "kind": "parquet",
            "classes": list(self.classes),
            "columns": fields,
            "files": digest.hexdigest(),
            "rows": rows,
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample]:
        """Rows of a split, a few in memory at a time."""
        wanted = self._rows[split][places.start : places.stop]
        for number in np.unique(wanted[:, 0]):
            path, labels = self._paths[number], self._labels[number]
            for row, data in _read_images(path, self.image_field, wanted[wanted[:, 0] == number, 1]):
                name = f"{path.relative_to(self.folder)}:row {row}"
                header = read_header(data, name=name)
                yield Sample(data, EXTENSIONS[header.format], int(labels[row]), name)

    def _split_rows(self, of_split: dict[Split, list[int]], val_fraction: float) -> dict[Split, npt.NDArray[np.int64]]:
        """(n, 2) int64, file and row of each sample of each split."""
        rows = {
            split: [(number, row) for number in numbers for row in range(len(self._labels[number]))]
            for split, numbers in of_split.items()
        }
        if "val" not in rows:
            chosen = [is_val(self._digest(number, row), val_fraction) for number, row in rows["train"]]
            every = rows["train"]
            rows = {
                "train": [place for place, val in zip(every, chosen, strict=True) if not val],
                "val": [place for place, val in zip(every, chosen, strict=True) if val],
            }
        return {split: np.array(places, np.int64).reshape(-1, 2) for split, places in rows.items()}

    def _digest(self, number: int, row: int) -> bytes:
        return hashlib.sha256(f"{self._paths[number].relative_to(self.folder).as_posix()} {row}".encode()).digest()


def _files_of_splits(folder: Path) -> tuple[list[Path], dict[Split, list[int]]]:
    """The files that are read, and which of them each split has."""
    paths = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*/*.parquet"))
    found: dict[Split, list[Path]] = {}
    for split, words in _SPLIT_NAMES:
        matching = [path for path in paths if re.search(rf"(?<![a-z])({words})(?![a-z])", path.stem.lower())]
        if matching and split not in found:
            found[split] = matching
    if "train" not in found:
        found["train"] = [path for path in paths if path not in found.get("val", ())]
    if not found["train"]:
        raise ValueError(f"source {folder}: no file is train, got {', '.join(path.name for path in paths[:5])}")
    used = [path for split in ("train", "val") for path in found.get(split, ())]
    return used, {split: [used.index(path) for path in of_split] for split, of_split in found.items()}


def _open(path: Path) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f'parquet file {path}: pyarrow is needed; pip install "maskgit_pl[parquet]"') from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"parquet file {path}: cannot be read ({error})") from error


def _image_column(file: ParquetFile, path: Path) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    schema = file.schema_arrow
    found = [field.name for field in schema if holds_bytes(field.type)]
    chosen = [name for name in _IMAGE_COLUMNS if name in found] or found
    if not chosen:
        raise ValueError(f"parquet file {path}: a column of image bytes is needed, got {', '.join(schema.names)}")
    return str(chosen[0])


def _class_names(
    files: Sequence[ParquetFile], paths: Sequence[Path], label_field: str, given: Sequence[str] | None
) -> tuple[str, ...]:
    """Class names of the metadata, or those given; none if there are none."""
    found = {path: _names_in_metadata(file, label_field) for file, path in zip(files, paths, strict=True)}
    first = found[paths[0]]
    for path, names in found.items():
        if names != first:
            raise ValueError(f"parquet file {path}: its class names are not those of {paths[0].name}")
    if first and given is not None and tuple(given) != first:
        raise ValueError(f"class names: the files have their own ({', '.join(first[:3])} ...), so none can be given")
    return first or tuple(given or ())


def _names_in_metadata(file: ParquetFile, label_field: str) -> tuple[str, ...]:
    """``ClassLabel`` names, which the datasets package writes as JSON."""
    try:
        metadata = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        return tuple(map(str, metadata["info"]["features"][label_field]["names"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def _read_labels(file: ParquetFile, path: Path, label_field: str, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """(rows,) int64, each a class."""
    import pyarrow as pa

    schema = file.schema_arrow
    if label_field not in schema.names:
        names = ", ".join(schema.names)
        raise ValueError(f"parquet file {path}: no column {label_field!r}, got {names}; name it with --label-field")
    if not pa.types.is_integer(schema.field(label_field).type):
        kind = schema.field(label_field).type
        raise ValueError(f"parquet file {path}: column {label_field!r} must hold class numbers, got {kind}")
    try:
        column = file.read(columns=[label_field]).column(label_field)
    except (OSError, ValueError) as error:
        raise ValueError(f"parquet file {path}: cannot be read ({error})") from error
    if column.null_count:
        raise ValueError(f"parquet file {path}: {column.null_count} rows have no {label_field!r}")
    labels: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    most = len(classes) or MAX_CLASSES
    bad = np.flatnonzero((labels < 0) | (labels >= most))
    if len(bad):
        value = labels[bad[0]]
        raise ValueError(f"parquet file {path}: row {bad[0]}: a class below {most} is needed, got {value}")
    return labels


def _read_images(path: Path, image_field: str, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """Bytes of the images in some rows, which rise; row groups without any are passed over."""
    file = _open(path)
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        wanted = set(rows[(rows >= start) & (rows < end)].tolist())
        if wanted:
            yield from _read_group(file, path, image_field, group, start, wanted)
        start = end


def _read_group(
    file: ParquetFile, path: Path, image_field: str, group: int, start: int, wanted: set[int]
) -> Iterator[tuple[int, bytes]]:
    row = start
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[image_field]):
            for value in batch.column(0):
                if row in wanted:
                    image = value.as_py()
                    yield row, _image_bytes(image, f"parquet file {path}: row {row}")
                row += 1
    except OSError as error:
        raise ValueError(f"parquet file {path}: row group {group} cannot be read ({error})") from error


def _image_bytes(image: Any, name: str) -> bytes:
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise ValueError(f"{name}: the image's bytes are needed, got none (a path is not followed)")
    return data

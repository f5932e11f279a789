"""A folder of parquet files with images and labels as a source. Used by ``open_source``.

pyarrow reads the files, a few rows at a time: 4,000 images of 100 kB in one row group take 160 MB. The streams of the
package ``datasets`` take 1.2 GB for them, and ten times as long.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import Sample, UnreadableSample, is_val, read_sample
from maskgit_pl.data.sources.labels import number_classes
from maskgit_pl.data.sources.parquet_pages import check_parquet
from maskgit_pl.errors import printable
from maskgit_pl.files import parse_any_json, size_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = ["ParquetFolder", "find_parquet", "split_of"]

_SPLITS = {"val": "validation|valid|val", "test": "test", "train": "train|training"}  # words in names, in this order
_ROWS_AT_ONCE = 64  # images in memory, for row groups of any size
_LABELS_AT_ONCE = 2**16
_BYTES_AT_ONCE = 2**28  # limit for pages of any size: with a dictionary, each row may repeat a whole page
_MAX_ROWS = 2**25  # of all files together
_MAX_CLASS_BYTES = 2**24  # of the texts in a dictionary of labels


def find_parquet(folder: Path) -> list[Path]:
    """Returns the parquet files in a folder, or else those one or two levels below it."""
    levels = (sorted(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"))
    return next((found for found in levels if found), [])


def split_of(name: str) -> str | None:
    """Returns ``"train"``, ``"val"`` or ``"test"`` by the word for it in a name; None without one."""
    for split, words in _SPLITS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", name.lower()):
            return split
    return None


class ParquetFolder:
    """The parquet files in a folder or in its sub-folders. Requires pyarrow.

    Files named ``train-*`` and ``validation-*`` (or ``test-*``), or in sub-folders with such names, are the splits.
    Without train files, all that name no split are train. Columns: an image, as bytes or as a struct with the field
    ``bytes``, and a class number or a class name. The names of class numbers are in the metadata that ``datasets``
    writes.

    Samples keep the order of the rows. Without a val split, a hash of the file's name and the row chooses the val
    samples. Labels are read first, then images, which stay undecoded.

    Args:
        folder: The folder.
        classes: Class names, if the files have none. If all labels are texts, these are all that may occur.
        val_fraction: Fraction of the rows that become val if there is no val split, in (0, 1).
        label_field: Column of the labels.

    Raises:
        ValueError: if pyarrow is missing, a file is not parquet or would expand to too many bytes, it lacks a column, a
            label is not a class, or the class names of the files differ.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        label_field: str = "label",
    ) -> None:
        check_number("val_fraction", val_fraction, "(0, 1)")
        self.folder, self.shown, self.label_field = folder, printable(folder), label_field
        files, unused = self._find_files()
        self.left_out = tuple(f"parquet file {printable(name)}" for name in unused)
        self.has_splits = "val" in files
        self._files = [name for names in files.values() for name in names]
        checked: list[tuple[int, int]] = []
        for name in self._files:
            with self._one_line(name):
                checked.append(check_parquet(folder / name))
        if (count := sum(rows for rows, _ in checked)) > _MAX_ROWS:
            raise ValueError(f"source {self.shown} must have at most {_MAX_ROWS} rows, got {count}")
        self._rows_at_once = min(_ROWS_AT_ONCE, 1 + _BYTES_AT_ONCE // max(1, *(page for _, page in checked)))
        self.image_field, names = self._read_columns()
        if names and classes is not None and tuple(classes) != names:
            raise ValueError(f"source {self.shown}: class names must not be given, since the data set has its own")
        labels = [self._read_labels(name) for name in self._files]
        found: dict[Any, str] = {}
        for name, values in zip(self._files, labels, strict=True):
            for row, label in enumerate(values):
                if label not in found:
                    found[label] = f"source {self.shown}:{printable(name)}: row {row}"
        self.classes, numbers = number_classes(found, names or classes, label_field=label_field)
        self._labels = [np.array([numbers[label] for label in values], np.int64) for values in labels]
        self._rows = self._split_rows(files, val_fraction)
        for split, rows in self._rows.items():
            if not len(rows):
                raise ValueError(f"source {self.shown}: the {split} split must have at least 1 row, got 0")
        self._opened: tuple[str, int, Iterator[tuple[int, Any]]] | None = None  # file, next row, rows

    @property
    def counts(self) -> dict[Split, int]:
        """The number of rows of each split."""
        return {split: len(rows) for split, rows in self._rows.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, columns, and hashes of files, labels and the rows of each split."""
        files = hashlib.sha256()
        for name, labels in zip(self._files, self._labels, strict=True):
            files.update(f"{name} {(self.folder / name).stat().st_size}\n".encode("utf-8", "surrogateescape"))
            files.update(labels.tobytes())
        return {
            "kind": "parquet",
            "classes": list(self.classes),
            "columns": [self.image_field, self.label_field],
            "files": files.hexdigest(),
            "rows": {split: hashlib.sha256(rows.tobytes()).hexdigest() for split, rows in self._rows.items()},
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields rows of a split. Successive ranges continue a file; a range before it starts again.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the split's order.
        """
        for number, row in self._rows[split][places.start : places.stop].tolist():
            file = self._files[number]
            with self._one_line(file):
                image = self._take(file, row)
            name = f"{self.shown}:{printable(file)} row {row}"
            yield read_sample(partial(_image_bytes, image, name), label=int(self._labels[number][row]), name=name)
        if places.stop >= len(self._rows[split]):
            self._opened = None  # closes its file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # a worker process opens files itself

    @contextmanager
    def _one_line(self, file: str = "") -> Iterator[None]:
        """Turns the errors of pyarrow into a ``ValueError`` of one line."""
        try:
            yield
        except ImportError as error:
            install = 'pip install "maskgit_pl[parquet]"'
            raise ValueError(f"source {self.shown} requires {error.name}: {install}") from error
        except Exception as error:
            text = printable((str(error).splitlines() or [type(error).__name__])[0])
            shown = f"{self.shown}:{printable(file)}" if file else self.shown
            raise ValueError(f"source {shown} cannot be read: {text}") from error

    def _find_files(self) -> tuple[dict[Split, list[str]], list[str]]:
        """Returns the files of each split, by their names relative to the folder, and those that are not used."""
        names = [path.relative_to(self.folder).as_posix() for path in find_parquet(self.folder)]
        found: dict[str | None, list[str]] = {}
        for name in names:  # the name of the file counts more than that of its sub-folder
            parent, _, file = name.rpartition("/")
            found.setdefault(split_of(file.removesuffix(".parquet")) or split_of(parent), []).append(name)
        files: dict[Split, list[str]] = {"train": found.get("train") or found.get(None) or []}
        if not files["train"]:
            raise ValueError(f"source {self.shown} must have files of the train split, got {_listed(names)}")
        if val := found.get("val") or found.get("test"):  # test files are val only without validation files
            files["val"] = val
        used = {name for part in files.values() for name in part}
        every = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.parquet")}
        return files, sorted(every - used)

    def _read_columns(self) -> tuple[str, tuple[str, ...]]:
        """Returns the column of the images, and the class names in the metadata of the files, if there are any."""
        image_field, first = "", None
        for name in self._files:
            with self._one_line(name):
                schema = self._open(name).schema_arrow
            if self.label_field not in schema.names:
                raise ValueError(
                    f"source {self.shown}:{printable(name)} must have a column {self.label_field!r}, got "
                    f"{_listed(schema.names)}; set it with --label-field"
                )
            label = schema.field(self.label_field).type
            if label.num_fields:
                raise ValueError(
                    f"source {self.shown}:{printable(name)} must have class numbers or names in {self.label_field!r}, "
                    f"got {label}"
                )
            try:
                metadata = parse_any_json((schema.metadata or {})[b"huggingface"], "metadata")
                classes = tuple(map(str, metadata["info"]["features"][self.label_field]["names"]))
            except (KeyError, TypeError, ValueError):
                classes = ()
            if first is None:
                first, images = classes, [field.name for field in schema if _holds_bytes(field.type)]
                if not images:
                    raise ValueError(f"source {self.shown} must have a column of images, got {_listed(schema.names)}")
                image_field = next((field for field in ("image", "img") if field in images), images[0])
            if classes != first:
                raise ValueError(
                    f"source {self.shown}:{printable(name)} must have the class names of {printable(self._files[0])}"
                )
        return image_field, first or ()

    def _open(self, name: str, *dictionaries: str) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        # Without a size of the buffer, the column of a row group is read as a whole.
        return ParquetFile(self.folder / name, buffer_size=2**20, read_dictionary=list(dictionaries))

    def _read_labels(self, name: str) -> list[Any]:
        """Returns the label of each row, a class number or a text."""
        from pyarrow import types

        labels: list[Any] = []
        with self._one_line(name):
            file = self._open(name, self.label_field)  # a text that many rows repeat is in memory once
            for batch in file.iter_batches(_LABELS_AT_ONCE, columns=[self.label_field]):
                column = batch.column(0)
                if column.null_count:
                    row = len(labels) + column.is_null().index(True).as_py()
                    raise ValueError(f"row {row}: {self.label_field} must be a class, got nothing")
                if types.is_integer(column.type):
                    labels += column.to_pylist()
                    continue
                if not types.is_dictionary(column.type) or not types.is_string(column.type.value_type):
                    raise ValueError(f"column {self.label_field!r} must hold class numbers or names, got {column.type}")
                if column.dictionary.nbytes > _MAX_CLASS_BYTES:
                    limit = size_text(_MAX_CLASS_BYTES)
                    raise ValueError(f"column {self.label_field!r} must hold class names of at most {limit}, got more")
                words = column.dictionary.to_pylist()
                labels += [words[place] for place in column.indices.to_pylist()]
        return labels

    def _split_rows(
        self, files: Mapping[Split, Sequence[str]], val_fraction: float
    ) -> dict[Split, npt.NDArray[np.int64]]:
        """Returns the file's number and the row of each sample of each split, (n, 2) int64."""
        split_of_file = {name: split for split, names in files.items() for name in names}
        rows: dict[Split, list[tuple[int, int]]] = {"train": [], "val": []}
        for number, (name, labels) in enumerate(zip(self._files, self._labels, strict=True)):
            for row in range(len(labels)):
                split = split_of_file[name]
                if not self.has_splits:
                    digest = hashlib.sha256(f"{name} {row}".encode("utf-8", "surrogateescape")).digest()
                    split = "val" if is_val(digest, val_fraction) else "train"
                rows[split].append((number, row))
        return {split: np.array(places, np.int64).reshape(-1, 2) for split, places in rows.items()}

    def _take(self, file: str, row: int) -> Any:
        """Returns the image of a row; rows that ascend are read in one pass."""
        if self._opened is None or self._opened[0] != file or self._opened[1] > row:
            self._opened = file, 0, self._read_images(file, row)
        rows = self._opened[2]
        image = next(value for number, value in rows if number == row)
        self._opened = file, row + 1, rows
        return image

    def _read_images(self, name: str, row: int) -> Iterator[tuple[int, Any]]:
        """Yields the number and the image of each row from the row group of the given one on."""
        from pyarrow import types

        file, group, start = self._open(name), 0, 0
        while start + (count := file.metadata.row_group(group).num_rows) <= row:
            group, start = group + 1, start + count
        is_struct = types.is_struct(file.schema_arrow.field(self.image_field).type)
        column = f"{self.image_field}.bytes" if is_struct else self.image_field  # other fields may have any length
        groups = range(group, file.num_row_groups)
        batches = file.iter_batches(self._rows_at_once, row_groups=groups, columns=[column])
        images = (image for batch in batches for image in batch.column(0))
        images = (image["bytes"] if is_struct and image.is_valid else image for image in images)
        return enumerate((image.as_buffer() if image.is_valid else None for image in images), start)


def _holds_bytes(kind: Any) -> bool:
    """Returns whether a column may hold image files: bytes, or a struct with a field of bytes."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _image_bytes(image: Any, name: str) -> bytes:
    if image is None:
        raise UnreadableImageError(f"image {name} must be inside the data set, got a path outside of it or nothing")
    if len(image) > MAX_IMAGE_BYTES:
        limit, size = size_text(MAX_IMAGE_BYTES), size_text(len(image))
        raise UnreadableImageError(f"image {name} must have at most {limit}, got {size}", reason="too large")
    return bytes(image)


def _listed(names: Sequence[str]) -> str:
    return ", ".join([printable(name) for name in names[:20]] + ["..."] * (len(names) > 20))

"""A folder of parquet files in the layout of Hugging Face datasets, as a source of samples. Requires pyarrow.

Columns: an image, as bytes or as a struct with the field ``bytes``, and a class number. The class names are in the
metadata that the ``datasets`` package writes. Used by ``open_source``.

A page that expands a thousandfold is rejected before pyarrow decompresses it. The footer states sizes too, but they may
be wrong, so the page headers are read here. A page header is a Thrift struct in the compact protocol. Its field 2 is
the decompressed length of the page's content, field 3 its length in the file.

Source: apache/parquet-format, ``parquet.thrift``; apache/thrift, ``thrift-compact-protocol.md``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import MAX_CLASSES, Sample, UnreadableSample, is_val, read_sample
from maskgit_pl.errors import printable
from maskgit_pl.files import parse_any_json, size_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = ["ParquetFolder"]

_SPLIT_NAMES = {"val": "validation|valid|val", "test": "test", "train": "train|training"}
_IMAGE_COLUMNS = ("image", "img")
_ROWS_AT_ONCE = 64  # images in memory, for row groups of any size
_BYTES_AT_ONCE = 2**28  # limit for pages of any size: with a dictionary, each row may repeat a whole page
_MAX_PAGE_BYTES = 2**29  # decompressed; writers end a page after about 1 MB
_MAX_FOOTER_BYTES = 2**25
_MAX_ROWS = 2**25  # of all files together

_WINDOW = 2**14  # bytes that are read for a header; its statistics have at most 8 kB
# Type codes of the compact protocol; the two booleans have no bytes of their own.
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12
_MAX_DEPTH = 4  # of structs in a header


class ParquetFolder:
    """A source of samples: the parquet files in a folder or in its sub-folders.

    Files named ``train-*`` and ``validation-*`` (or ``test-*``), or in sub-folders with such names, are the splits.
    Without train files, all that name no split are train. Without val files, a hash of file name and row chooses the
    val samples. Samples keep the order of the files' names and rows.

    Args:
        folder: The folder.
        classes: Class names, if the metadata has none.
        val_fraction: Fraction of the rows that become val if there are no val files, in (0, 1).
        label_field: Column of the class numbers.

    Raises:
        ValueError: if pyarrow is missing, a file is not parquet or lacks a column, labels are not classes, or the class
            names of the files differ.
    """

    def __init__(
        self, folder: Path, *, classes: Sequence[str] | None, val_fraction: float = 0.1, label_field: str = "label"
    ) -> None:
        check_number("val_fraction", val_fraction, "(0, 1)")
        self.folder = folder
        self.label_field = label_field
        self._paths, of_split = _files_of_splits(folder)
        # Only footers and labels are read here; images are read by ``samples``.
        opened = [_open_file(path) for path in self._paths]
        count = sum(file.metadata.num_rows for file in opened)
        if count > _MAX_ROWS:
            raise ValueError(f"source {printable(folder)} must have at most {_MAX_ROWS} rows, got {count}")
        self.image_field = _image_column(opened[0], self._paths[0])
        self.classes = _class_names(opened, self._paths, label_field, classes)
        self._labels = [
            _read_labels(file, path, label_field, self.classes) for file, path in zip(opened, self._paths, strict=True)
        ]
        if not self.classes:
            self.classes = tuple(str(label) for label in range(1 + max(int(labels.max()) for labels in self._labels)))
        self.has_splits = "val" in of_split
        self._rows = self._split_rows(of_split, val_fraction)
        for split, rows in self._rows.items():
            if not len(rows):
                raise ValueError(f"source {printable(folder)}: the {split} split must have at least 1 row, got 0")

    @property
    def counts(self) -> dict[Split, int]:
        """The number of rows of each split."""
        return {split: len(rows) for split, rows in self._rows.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, columns, and hashes of file names, file lengths, labels and the rows of each split."""
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

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parquet files that belong to no split, one line per file."""
        found = {*self.folder.glob("*.parquet"), *self.folder.glob("*/*.parquet")} - {*self._paths}
        return tuple(f"parquet file {printable(str(path.relative_to(self.folder)))}" for path in sorted(found))

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields rows of a split, with a few of them in memory at a time.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the split's order.
        """
        wanted = self._rows[split][places.start : places.stop]  # (n, 2): file, row
        for number in np.unique(wanted[:, 0]):
            path, labels = self._paths[number], self._labels[number]
            for row, value in _read_images(path, self.image_field, wanted[wanted[:, 0] == number, 1]):
                name = f"{printable(str(path.relative_to(self.folder)))}: row {row}"
                yield read_sample(partial(_image_bytes, value, name), label=int(labels[row]), name=name)

    def _split_rows(self, of_split: dict[Split, list[int]], val_fraction: float) -> dict[Split, npt.NDArray[np.int64]]:
        """Returns the file number and the row of each sample of each split, (n, 2) int64."""
        rows = {
            split: [(number, row) for number in numbers for row in range(len(self._labels[number]))]
            for split, numbers in of_split.items()
        }
        # Without val files, the hash of a row's name chooses val, as for image folders.
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
    """Returns the files of all splits, and for each split the positions of its files in that list."""
    paths = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*/*.parquet"))
    named = [_split_name(folder, path) for path in paths]
    of_name = {name: [path for path, of in zip(paths, named, strict=True) if of == name] for name in {*named}}
    found: dict[Split, list[Path]] = {"train": of_name.get("train") or of_name.get("", [])}
    if val := of_name.get("val") or of_name.get("test"):  # test files are val only if there are no validation files
        found["val"] = val
    if not found["train"]:
        names = _format_names([path.relative_to(folder).as_posix() for path in paths])
        raise ValueError(f"source {printable(folder)} must have files of the train split, got {names}")
    used = [path for split in ("train", "val") for path in found.get(split, ())]
    return used, {split: [used.index(path) for path in of_split] for split, of_split in found.items()}


def _split_name(folder: Path, path: Path) -> str:
    """Returns ``"train"``, ``"val"`` or ``"test"``, by the file's name or else its sub-folder; else an empty text."""
    for text in (path.stem.lower(), path.parent.relative_to(folder).as_posix().lower()):
        for name, words in _SPLIT_NAMES.items():
            if re.search(rf"(?<![a-z])({words})(?![a-z])", text):
                return name
    return ""


def _open_file(path: Path) -> ParquetFile:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f'{_file_label(path)} requires pyarrow; pip install "maskgit_pl[parquet]"') from error
    if not path.is_file():
        raise ValueError(f"{_file_label(path)} must be a regular file")
    # A file ends with the length of its footer (4 bytes) and the magic bytes; pyarrow would read a footer of any size.
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        end = file.read(8)
    footer = int.from_bytes(end[:4], "little")
    if end[4:] == b"PAR1" and footer > _MAX_FOOTER_BYTES:
        limit = size_text(_MAX_FOOTER_BYTES)
        raise ValueError(f"{_file_label(path)} must have a footer of at most {limit}, got {size_text(footer)}")
    try:
        return ParquetFile(path, buffer_size=2**20)  # without it, the column of a row group is read as a whole
    except (OSError, ValueError) as error:
        raise ValueError(f"{_file_label(path)}: cannot be read ({_first_line(error)})") from error


def _file_label(path: Path) -> str:
    return f"parquet file {printable(path)}"


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0][:200])


def _image_column(file: ParquetFile, path: Path) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    # The usual names first, else the first column of bytes.
    schema = file.schema_arrow
    found = [field.name for field in schema if holds_bytes(field.type)]
    chosen = [name for name in _IMAGE_COLUMNS if name in found] or found
    if not chosen:
        got = _format_names([f"{field.name} ({field.type})" for field in schema])
        raise ValueError(f"{_file_label(path)} must have a column of image bytes, got {got}")
    return str(chosen[0])


def _format_names(names: Sequence[str]) -> str:
    return ", ".join([printable(name) for name in names[:20]] + ["..."] * (len(names) > 20))


def _class_names(
    files: Sequence[ParquetFile], paths: Sequence[Path], label_field: str, given: Sequence[str] | None
) -> tuple[str, ...]:
    """Returns the class names of the metadata, else the given ones, else an empty tuple.

    Raises:
        ValueError: if the files have different names, or names are given although the files have others.
    """
    found = {path: _names_in_metadata(file, label_field) for file, path in zip(files, paths, strict=True)}
    first = found[paths[0]]
    for path, names in found.items():
        if names != first:
            raise ValueError(f"{_file_label(path)} must have the class names of {printable(paths[0].name)}, got others")
    if first and given is not None and tuple(given) != first:
        raise ValueError(
            f"class names must not be given, since the files have their own ({_format_names(first[:3])} ...)"
        )
    return first or tuple(given or ())


def _names_in_metadata(file: ParquetFile, label_field: str) -> tuple[str, ...]:
    """Reads the names of a ``ClassLabel`` column, which the ``datasets`` package writes as JSON; empty if missing."""
    try:
        metadata = parse_any_json((file.schema_arrow.metadata or {})[b"huggingface"], "metadata")
        return tuple(map(str, metadata["info"]["features"][label_field]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _read_labels(file: ParquetFile, path: Path, label_field: str, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Reads the labels of a file, (rows,) int64, and checks that each is a class."""
    import pyarrow as pa

    schema = file.schema_arrow
    if label_field not in schema.names:
        names = _format_names(schema.names)
        raise ValueError(
            f"{_file_label(path)} must have a column {label_field!r}, got {names}; set it with --label-field"
        )
    if not pa.types.is_integer(schema.field(label_field).type):
        kind = schema.field(label_field).type
        raise ValueError(f"{_file_label(path)}: column {label_field!r} must hold class numbers, got {kind}")
    # Before pyarrow decompresses any page.
    for group in range(file.num_row_groups):
        _check_pages(file, path, group, label_field)
    try:
        column = file.read(columns=[label_field]).column(label_field)
    except (OSError, ValueError) as error:
        raise ValueError(f"{_file_label(path)}: cannot be read ({_first_line(error)})") from error
    if column.null_count:
        raise ValueError(
            f"{_file_label(path)} must have {label_field!r} in every row, got {column.null_count} rows without"
        )
    labels: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    limit = len(classes) or MAX_CLASSES
    bad = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(bad):
        value = labels[bad[0]]
        raise ValueError(f"{_file_label(path)}: row {bad[0]}: the class must be in [0, {limit}), got {value}")
    return labels


def _read_images(path: Path, image_field: str, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
    """Yields the image values of some rows, which ascend; row groups without such rows are not read."""
    file = _open_file(path)
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        wanted = set(rows[(rows >= start) & (rows < end)].tolist())
        if wanted:
            yield from _read_group(file, path, image_field, group, start, wanted)
        start = end


def _read_group(
    file: ParquetFile, path: Path, image_field: str, group: int, start: int, wanted: set[int]
) -> Iterator[tuple[int, Any]]:
    # A batch holds at most _BYTES_AT_ONCE, even if every row repeats the largest page.
    column = _bytes_column(file, image_field)
    largest = _check_pages(file, path, group, column)
    rows_at_once = min(_ROWS_AT_ONCE, 1 + _BYTES_AT_ONCE // max(1, largest))
    row = start
    try:
        for batch in file.iter_batches(rows_at_once, row_groups=[group], columns=[column]):
            for value in batch.column(0):
                if row in wanted:
                    yield row, value
                row += 1
    except OSError as error:
        raise ValueError(f"{_file_label(path)}: row group {group} cannot be read ({_first_line(error)})") from error


def _bytes_column(file: ParquetFile, image_field: str) -> str:
    """Returns the column that holds the bytes of the images. Other fields of a struct may have any length."""
    import pyarrow as pa

    schema = file.schema_arrow
    is_struct = pa.types.is_struct(schema.field(schema.names.index(image_field)).type)
    return f"{image_field}.bytes" if is_struct else image_field


def _image_bytes(value: Any, name: str) -> bytes:
    """Returns the bytes of a pyarrow value: binary, or a struct with the field ``bytes``."""
    import pyarrow as pa

    if pa.types.is_struct(value.type) and value.is_valid:
        value = value["bytes"]
    if not value.is_valid:
        raise UnreadableImageError(f"{name}: the image must be stored as bytes, got none (paths are not followed)")
    size = value.as_buffer().size
    if size > MAX_IMAGE_BYTES:
        limit = size_text(MAX_IMAGE_BYTES)
        raise UnreadableImageError(f"image {name} must have at most {limit}, got {size_text(size)}", reason="too large")
    data: bytes = value.as_py()
    return data


def _check_pages(file: ParquetFile, path: Path, group: int, column: str) -> int:
    """Checks the decompressed size of a column's pages in a row group.

    Returns:
        Decompressed bytes of the largest page.

    Raises:
        ValueError: if this is above the limit, or a page is damaged.
    """
    descriptor = os.open(path, os.O_RDONLY)
    largest = 0
    try:
        chunks = file.metadata.row_group(group)
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            if f"{chunk.path_in_schema}.".startswith(f"{column}."):  # all that pyarrow decompresses for the column
                starts = (chunk.dictionary_page_offset, chunk.data_page_offset)
                start = min((offset for offset in starts if offset), default=0)  # there may be no dictionary page
                largest = max(largest, _largest_page(descriptor, start, chunk.total_compressed_size))
    except (OSError, ValueError) as error:
        raise ValueError(f"{_file_label(path)}: row group {group}: {error}") from error
    finally:
        os.close(descriptor)
    if largest > _MAX_PAGE_BYTES:
        limit = f"pages of at most {size_text(_MAX_PAGE_BYTES)}"
        raise ValueError(f"{_file_label(path)}: row group {group} must have {limit}, got {size_text(largest)}")
    return largest


def _largest_page(descriptor: int, start: int, length: int) -> int:
    """Returns the decompressed size in bytes of the largest page of a column chunk.

    Raises:
        ValueError: if the chunk is not within the file, a header is damaged or a page is longer than the chunk.
    """
    size = os.fstat(descriptor).st_size
    if not 0 <= start <= start + length <= size:
        raise ValueError(f"pages at bytes {start} to {start + length} must be within the file of {size} bytes")
    place, end, largest = start, start + length, 0
    # The pages follow each other: header, content, header, content ...
    while place < end:
        reader = _Reader(os.pread(descriptor, min(_WINDOW, end - place), place))
        try:
            fields = reader.read_struct(_MAX_DEPTH)
            expanded, stored = fields[2], fields[3]
        except (IndexError, KeyError) as error:
            raise ValueError(f"damaged page header at byte {place}") from error
        place += reader.place + stored
        if expanded < 0 or stored < 0 or place > end:
            raise ValueError(f"damaged page of {stored} bytes before byte {place}")
        largest = max(largest, expanded)
    return largest


class _Reader:
    """A reader of Thrift's compact protocol from the bytes of a header."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def read_struct(self, depth: int) -> dict[int, int]:
        """Returns the integer fields of a struct by their numbers, and skips the others.

        Args:
            depth: Allowed depth of nested structs.
        """
        fields, number = dict[int, int](), 0
        while (head := self._byte()) != 0:
            # Low 4 bits: type; high 4 bits: difference from the last field number, 0 if the number follows.
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else _decode_zigzag(self._varint())
            if kind in _INTEGERS:
                fields[number] = _decode_zigzag(self._varint())
            else:
                self._skip(kind, depth)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        if kind == _STRUCT and depth:
            self.read_struct(depth - 1)
        elif kind in (_BYTE, _DOUBLE, _BINARY):
            length = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint()
            self.place += length
        elif kind not in _BOOLEANS:
            raise KeyError(kind)  # page headers have no lists or maps

    def _varint(self) -> int:
        # 7 bits per byte, lowest first; the top bit says that more follow
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise KeyError("a varint has at most 10 bytes")

    def _byte(self) -> int:
        byte = self.data[self.place]
        self.place += 1
        return byte


def _decode_zigzag(value: int) -> int:
    return value >> 1 ^ -(value & 1)

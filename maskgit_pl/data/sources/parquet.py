"""A folder of parquet files with images and labels as a source. Used by ``open_source``.

A child process reads each file with pyarrow and writes records to a pipe: damaged bytes may abort pyarrow, and a page
of a few bytes may expand to gigabytes. The child may take 2 GiB of memory, and its end is an error of one line here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import MAX_CLASSES, Sample, UnreadableSample, is_val, number_classes, read_sample
from maskgit_pl.errors import printable
from maskgit_pl.files import open_regular, parse_any_json, size_text

__all__ = ["ParquetFolder", "find_parquet", "split_of"]

_SPLITS = {"val": "validation|valid|val", "test": "test", "train": "train|training"}  # words in names, in this order
_MAX_ROWS = 2**25  # of all files together
_CHILD_BYTES = 2**31  # memory of the child
_ROWS_AT_ONCE, _LABELS_AT_ONCE = 16, 2**12  # images and labels in memory of the child, for row groups of any size
_MAX_LABEL_BYTES = 2**24  # of so many labels together
_PROGRAM = "from maskgit_pl.data.sources.parquet import _serve; _serve()"
# A record: its kind and the length of its bytes. The last record of a file that was read whole is an end.
_HEADER, _BYTES, _NOTHING, _ERROR, _END = Struct("<cI"), b"b", b"n", b"e", b"."


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
        ValueError: if pyarrow is missing, a file cannot be read, it lacks a column, a label is not a class, or the
            class names of the files differ.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        label_field: str = "label",
    ) -> None:
        self.folder, self.shown, self.label_field = folder, printable(folder), label_field
        files, unused = self._find_files()
        self.left_out = tuple(f"parquet file {printable(name)}" for name in unused)
        self.has_splits = "val" in files
        self._files = [name for names in files.values() for name in names]
        first_row: dict[Any, str] = {}  # of each label
        heads, codes = zip(*(self._read_labels(name, first_row) for name in self._files), strict=True)
        for name, head in zip(self._files, heads, strict=True):
            if head["names"] != heads[0]["names"]:
                raise ValueError(
                    f"source {self.shown}:{printable(name)} must have the class names of {printable(self._files[0])}"
                )
        names, images = heads[0]["names"], heads[0]["images"]
        self.image_field: str = next((field for field in ("image", "img") if field in images), images[0])
        if names and classes is not None and list(classes) != names:
            raise ValueError(f"source {self.shown}: class names must not be given, since the data set has its own")
        self.classes, numbers = number_classes(first_row, names or classes, label_field=label_field)
        number_of_code = np.array([numbers[label] for label in first_row], np.int64)
        self._labels = [number_of_code[of_file] for of_file in codes]
        self._rows = self._split_rows(files, val_fraction)
        for split, rows in self._rows.items():
            if not len(rows):
                raise ValueError(f"source {self.shown}: the {split} split must have at least 1 row, got 0")
        self._opened: tuple[str, int, Iterator[bytes | None]] | None = None  # file, next row, images from it on

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
            name = f"{self.shown}:{printable(file)} row {row}"
            image = partial(_image_bytes, self._take(file, row), name)
            yield read_sample(image, label=int(self._labels[number][row]), name=name)
        if places.stop >= len(self._rows[split]):
            self._opened = None  # ends the child

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # a worker process starts children itself

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

    def _read_labels(self, name: str, first_row: dict[Any, str]) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
        """Reads the labels of a file.

        Args:
            name: The file.
            first_row: For each label of the files before it, the name of its first row; new labels are added.

        Returns:
            Names of the columns of images and of the classes, and for each row the place of its label in ``first_row``.
        """
        place, codes = {label: number for number, label in enumerate(first_row)}, list[int]()
        with self._one_line(name):
            records = _read(self.folder / name, "labels", self.label_field)
            head: dict[str, Any] = parse_any_json(next(records) or b"", "columns")
            for record in records:
                for label in parse_any_json(record or b"", "labels"):
                    if label not in place:
                        place[label] = len(place)
                        first_row[label] = f"source {self.shown}:{printable(name)}: row {len(codes)}"
                    codes.append(place[label])
                if len(codes) > _MAX_ROWS or len(place) > MAX_CLASSES:
                    raise ValueError(f"must have at most {_MAX_ROWS} rows and {MAX_CLASSES} classes, got more")
            if len(set(map(type, first_row))) > 1:
                raise ValueError(f"{self.label_field} must be a class number in all files, or a name in all, got both")
        return head, np.array(codes, np.int64)

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

    def _take(self, file: str, row: int) -> bytes | None:
        """Returns the image of a row; rows that ascend are read in one pass."""
        if self._opened is None or self._opened[0] != file or self._opened[1] > row:
            self._opened = file, row, _read(self.folder / file, "images", self.image_field, str(row))
        _, first, images = self._opened
        with self._one_line(file):
            for _ in range(first, row):
                next(images)
            image = next(images)
        self._opened = file, row + 1, images
        return image

    @contextmanager
    def _one_line(self, file: str) -> Iterator[None]:
        """Names the file in the errors of its child. A file that has changed since its labels were read ends early."""
        try:
            yield
        except (ValueError, OSError, StopIteration) as error:
            text = printable(str(error)) or "it has fewer rows than before"
            raise ValueError(f"source {self.shown}:{printable(file)} cannot be read: {text}") from error


def _read(path: Path, *arguments: str) -> Iterator[bytes | None]:
    """Yields the records of a file that a child process reads; see ``_serve`` for its arguments.

    Raises:
        ValueError: if the child reports an error, or ends early.
    """
    os.close(open_regular(path))  # rejects a FIFO or a device, which would block
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    child = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(path), *arguments],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        while len(header := child.stdout.read(_HEADER.size)) == _HEADER.size:
            kind, size = _HEADER.unpack(header)
            data = child.stdout.read(size)
            if kind == _END:
                return
            if kind == _ERROR:
                raise ValueError(data.decode())
            yield None if kind == _NOTHING else data
        raise ValueError(f"it is damaged; pyarrow ended with {child.wait()}")
    finally:
        child.stdout.close()
        child.kill()
        child.wait()


def _serve() -> None:
    """Writes the records of a file to stdout, in the child: the column names and the labels, or the images of rows.

    The arguments are the file and either ``labels``, COLUMN, or ``images``, COLUMN and the first ROW.
    """
    path, what, *arguments = sys.argv[1:]
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        pyarrow.set_cpu_count(1)
        resource.setrlimit(resource.RLIMIT_DATA, (_CHILD_BYTES, _CHILD_BYTES))
        # Without a size of the buffer, the column of a row group is read as a whole.
        file = ParquetFile(path, buffer_size=2**20)
        for record in (_label_records if what == "labels" else _image_records)(file, *arguments):
            _send(_NOTHING if record is None else _BYTES, record or b"")
        _send(_END)
    except ImportError:
        _send(_ERROR, b'pyarrow is missing: pip install "maskgit_pl[parquet]"')
    except MemoryError:  # also that of pyarrow
        _send(_ERROR, f"its pages must need at most {size_text(_CHILD_BYTES)} of memory".encode())
    except Exception as error:
        _send(_ERROR, (str(error).splitlines() or [type(error).__name__])[0].encode(errors="replace"))
    sys.stdout.flush()
    os._exit(0)  # without what pyarrow does at the end


def _send(kind: bytes, data: bytes | memoryview = b"") -> None:
    sys.stdout.buffer.write(_HEADER.pack(kind, len(data)))
    sys.stdout.buffer.write(data)


def _label_records(file: Any, field: str) -> Iterator[bytes]:
    """Yields the names of the columns of images and of the classes, then lists of labels, as JSON."""
    from pyarrow import types

    schema = file.schema_arrow
    if field not in schema.names:
        raise ValueError(f"it must have a column {field!r}, got {_listed(schema.names)}; set it with --label-field")
    images = [column.name for column in schema if _holds_bytes(column.type)]
    if not images:
        raise ValueError(f"it must have a column of images, got {_listed(schema.names)}")
    try:
        metadata = parse_any_json((schema.metadata or {})[b"huggingface"], "metadata")
        names = list(map(str, metadata["info"]["features"][field]["names"]))
    except (KeyError, TypeError, ValueError):
        names = []
    yield json.dumps({"images": images, "names": names}).encode()
    kind = schema.field(field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(value) or types.is_string(value) or types.is_large_string(value)):
        raise ValueError(f"column {field!r} must hold class numbers or names, got {kind}")
    row = 0
    for batch in file.iter_batches(_LABELS_AT_ONCE, columns=[field], use_threads=False):
        column = batch.column(0)
        if column.null_count:
            raise ValueError(f"row {row + column.is_null().index(True).as_py()}: {field} must be a class, got nothing")
        row += len(column)
        record = json.dumps(column.to_pylist()).encode()
        if len(record) > _MAX_LABEL_BYTES:
            raise ValueError(f"column {field!r} must hold class names of at most {size_text(_MAX_LABEL_BYTES)}")
        yield record


def _image_records(file: Any, field: str, first: str) -> Iterator[memoryview | None]:
    """Yields the bytes of the image of each row from the given one on; None if it has none."""
    from pyarrow import types

    group, skipped = 0, int(first)
    while skipped >= (count := file.metadata.row_group(group).num_rows):
        group, skipped = group + 1, skipped - count
    is_struct = types.is_struct(file.schema_arrow.field(field).type)
    column = f"{field}.bytes" if is_struct else field  # other fields may have any length
    groups = range(group, file.num_row_groups)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[column], use_threads=False):
        for image in batch.column(0)[skipped:]:
            value = image["bytes"] if is_struct and image.is_valid else image
            yield memoryview(value.as_buffer())[: MAX_IMAGE_BYTES + 1] if value.is_valid else None
        skipped = max(0, skipped - len(batch))


def _holds_bytes(kind: Any) -> bool:
    """Returns whether a column may hold image files: bytes, or a struct with a field of bytes."""
    from pyarrow import types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _image_bytes(image: bytes | None, name: str) -> bytes:
    if image is None:
        raise UnreadableImageError(f"image {name} must be inside the data set, got a path outside of it or nothing")
    if len(image) > MAX_IMAGE_BYTES:
        limit = size_text(MAX_IMAGE_BYTES)
        raise UnreadableImageError(f"image {name} must have at most {limit}, got more", reason="too large")
    return image


def _listed(names: Sequence[str]) -> str:
    return ", ".join([printable(name) for name in names[:20]] + ["..."] * (len(names) > 20))

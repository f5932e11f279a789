"""A folder of parquet files with images and labels as a source. Used by ``open_source``.

A child process reads each file with pyarrow, in at most 2 GiB of memory; its end is an error of one line here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import (
    MAX_CLASSES,
    Sample,
    UnreadableSample,
    is_val,
    number_classes,
    read_sample,
    split_of,
)
from maskgit_pl.data.sources import parquet_child
from maskgit_pl.data.sources.parquet_child import END, ERROR, HEADER, NOTHING, TOO_LARGE
from maskgit_pl.files import open_regular, parse_any_json
from maskgit_pl.text import printable, size_text

_MAX_ROWS = 2**25  # of all files together
_CHILD_BYTES = 2**31  # memory of the child


def find_parquet(folder: Path) -> list[Path]:
    """Returns the parquet files in a folder, or else those one or two levels below it."""
    levels = (sorted(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet"))
    return next((paths for paths in levels if paths), [])


class ParquetFolder:
    """The parquet files in a folder or in its sub-folders. Requires pyarrow.

    Files named ``train-*`` and ``validation-*`` (or ``test-*``), or in sub-folders with such names, are the
    splits. Without train files, all that name no split are train. Columns: an image, as bytes or as a struct
    with the field ``bytes``, and a class number or a class name. The names of class numbers are in the
    metadata that ``datasets`` writes.

    Samples keep the order of the rows. Without a val split, a hash of the file's name and the row chooses the
    val samples.

    Args:
        folder: The folder; for the other arguments, see ``open_source``.
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
        if sum(map(len, codes)) > _MAX_ROWS:
            raise ValueError(f"source {self.shown} must have at most {_MAX_ROWS} rows in all files, got more")
        names, images = heads[0]["names"], heads[0]["images"]
        self.image_field: str = next((field for field in ("image", "img") if field in images), images[0])
        for name, head in zip(self._files, heads, strict=True):
            if head["names"] != names or self.image_field not in head["images"]:
                raise ValueError(
                    f"source {self.shown}:{printable(name)} must have the class names of "
                    f"{printable(self._files[0])}, and its column {self.image_field!r} of images"
                )
        self.classes, numbers = number_classes(first_row, classes or names or None, label_field=label_field)
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
        """Yields rows of a split. Successive ranges continue a file; a range before it starts again."""
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
        names_of: dict[str | None, list[str]] = {}
        for name in names:  # the name of the file counts more than that of its sub-folder
            parent, _, file = name.rpartition("/")
            names_of.setdefault(split_of(file.removesuffix(".parquet")) or split_of(parent), []).append(name)
        files: dict[Split, list[str]] = {"train": names_of.get("train") or names_of.get(None) or []}
        if not files["train"]:
            listed = ", ".join(map(printable, names[:20]))
            raise ValueError(f"source {self.shown} must have files of the train split, got {listed}")
        if val := names_of.get("val") or names_of.get("test"):  # test files are val only without validation files
            files["val"] = val
        used = {name for part in files.values() for name in part}
        every = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.parquet")}
        return files, sorted(every - used)

    def _read_labels(self, name: str, first_row: dict[Any, str]) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
        """Reads the labels of a file, and adds new ones to ``first_row``, with the name of their first row.

        Returns:
            Names of the columns of images and of the classes, and for each row the place of its label in ``first_row``.
        """
        title = f"source {self.shown}:{printable(name)}"
        code_of, codes = {label: number for number, label in enumerate(first_row)}, list[int]()
        records = _read(self.folder / name, title, self.label_field)
        images = parse_any_json(next(records) or b"", title)
        try:
            metadata = parse_any_json(next(records) or b"", title)
            names = list(map(str, metadata["info"]["features"][self.label_field]["names"]))
        except (KeyError, TypeError, ValueError):
            names = []
        for record in records:
            for label in parse_any_json(record or b"", title):
                if label not in code_of:
                    code_of[label] = len(code_of)
                    first_row[label] = f"{title}: row {len(codes)}"
                codes.append(code_of[label])
            if len(codes) > _MAX_ROWS or len(code_of) > MAX_CLASSES:
                raise ValueError(f"{title} must have at most {_MAX_ROWS} rows and {MAX_CLASSES} classes, got more")
        if len(set(map(type, first_row))) > 1:
            raise ValueError(f"{title}: {self.label_field} must be a number in all files, or a name in all, got both")
        return {"images": images, "names": names}, np.array(codes, np.int64)

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
            title = f"source {self.shown}:{printable(file)}"
            self._opened = file, row, _read(self.folder / file, title, self.image_field, str(row))
        _, first, images = self._opened
        self._opened = file, row + 1, images
        return next(islice(images, row - first, None), None)


def _read(path: Path, title: str, *arguments: str) -> Iterator[bytes | None]:
    """Yields the records of a file that a child process reads; see ``parquet_child`` for its arguments.

    A ``ValueError`` that begins with ``title`` is raised if the child reports an error, or ends early.
    """
    os.close(open_regular(path))  # rejects a FIFO or a device, which would block
    # A thread of OpenBLAS takes 40 MB of the bound.
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    arrow = {"PYTHONPATH": os.pathsep.join(sys.path), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    child = subprocess.Popen(
        [sys.executable, parquet_child.__file__, str(path), str(_CHILD_BYTES), *arguments],
        env={**os.environ, **single, **arrow},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    try:
        while len(header := child.stdout.read(HEADER.size)) == HEADER.size:
            kind, size = HEADER.unpack(header)
            data = child.stdout.read(size)
            if kind == END:
                return
            if kind == TOO_LARGE:
                raise ValueError(
                    f"{title} cannot be read: its pages take more than {size_text(_CHILD_BYTES)} of memory"
                )
            if kind == ERROR:
                raise ValueError(f"{title} cannot be read: {printable(data.decode())}")
            yield None if kind == NOTHING else data
        raise ValueError(f"{title} cannot be read: it is damaged, and pyarrow ended with {child.wait()}")
    finally:
        child.stdout.close()
        child.kill()
        child.wait()


def _image_bytes(image: bytes | None, name: str) -> bytes:
    if image is None:
        raise UnreadableImageError(f"image {name} must be inside the data set, got a path outside of it or nothing")
    if len(image) > MAX_IMAGE_BYTES:
        limit = size_text(MAX_IMAGE_BYTES)
        raise UnreadableImageError(f"image {name} must have at most {limit}, got more", reason="too large")
    return image

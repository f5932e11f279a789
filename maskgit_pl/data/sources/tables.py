"""Tables of images and labels as sources: a folder of parquet files, or a data set of the Hugging Face Hub.

Images stay undecoded. pyarrow reads parquet files few rows at a time; ``datasets`` streams what is on the Hub. From
version 4 on it runs no code of a data set; older ones are refused. Used by ``open_source``.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError, read_image_file
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import MAX_CLASSES, Sample, UnreadableSample, is_val, read_sample
from maskgit_pl.data.sources.parquet_pages import check_parquet
from maskgit_pl.errors import printable
from maskgit_pl.files import parse_any_json, size_text

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

__all__ = ["HubDataset", "ParquetFolder"]

_NAME = re.compile(r"(?P<name>.+?)(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")
_SPLIT_NAMES = {"val": "validation|valid|val", "test": "test", "train": "train|training"}
_MIN_VERSION = 4  # of datasets: trusts no remote code
_ROWS_AT_ONCE = 64  # images in memory, for row groups of any size
_BYTES_AT_ONCE = 2**28  # limit for pages of any size: with a dictionary, each row may repeat a whole page
_MAX_ROWS = 2**25  # of all parquet files together
_END = object()


class _Columns(NamedTuple):
    """The columns of a stream: the names of all, of those that hold images, and class names (none: an empty tuple)."""

    every: Sequence[str]
    images: Sequence[str]
    classes: tuple[str, ...]


class _Table(ABC):
    """A table that is read in one stream or several: files, or splits of a data set.

    Samples keep the order of the rows. Without a val split, a hash of the stream's name and the row chooses the val
    samples. Labels are read first, then images.

    Args:
        shown: Name of the source in messages.
        streams: Names of the streams of each split.
        classes: Class names, if the source has none. If all labels are texts, these are all that may occur.
        val_fraction: Fraction of the rows that become val if there is no val split, in (0, 1).
        label_field: Column of the labels.
    """

    kind: ClassVar[str]
    extra: ClassVar[str]  # of the installation
    left_out: tuple[str, ...] = ()

    def __init__(
        self,
        shown: str,
        streams: Mapping[Split, Sequence[str]],
        *,
        classes: Sequence[str] | None,
        val_fraction: float,
        label_field: str,
    ) -> None:
        check_number("val_fraction", val_fraction, "(0, 1)")
        self.shown, self.label_field, self.has_splits = shown, label_field, "val" in streams
        self._streams = [name for names in streams.values() for name in names]
        columns = [self._columns(name) for name in self._streams]
        for name, (every, _, names) in zip(self._streams, columns, strict=True):
            if label_field not in every:
                raise ValueError(
                    f"source {shown}:{printable(name)} must have a column {label_field!r}, got {_listed(every)}; set "
                    "it with --label-field"
                )
            if names != columns[0].classes:
                raise ValueError(f"source {shown}:{printable(name)} must have the class names of {self._streams[0]}")
        if not columns[0].images:
            raise ValueError(f"source {shown} must have a column of images, got {_listed(columns[0].every)}")
        self.image_field = next((name for name in ("image", "img") if name in columns[0].images), columns[0].images[0])
        if columns[0].classes and classes is not None and tuple(classes) != columns[0].classes:
            raise ValueError(f"source {shown}: class names must not be given, since the data set has its own")
        labels = [self._read_labels(name) for name in self._streams]
        self.classes, self._labels = self._number_labels(labels, columns[0].classes or tuple(classes or ()))
        self._rows = self._split_rows(streams, val_fraction)
        self._opened: tuple[str, int, Iterator[tuple[int, Any]]] | None = None  # stream, next row, rows
        for split, rows in self._rows.items():
            if not len(rows):
                raise ValueError(f"source {shown}: the {split} split must have at least 1 row, got 0")

    @property
    def counts(self) -> dict[Split, int]:
        """The number of rows of each split."""
        return {split: len(rows) for split, rows in self._rows.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, columns, and hashes of files, labels and the rows of each split."""
        files = hashlib.sha256()
        for name, labels in zip(self._streams, self._labels, strict=True):
            files.update(self._describe_files(name).encode("utf-8", "surrogateescape"))
            files.update(labels.tobytes())
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "columns": [self.image_field, self.label_field],
            "files": files.hexdigest(),
            "rows": {split: hashlib.sha256(rows.tobytes()).hexdigest() for split, rows in self._rows.items()},
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields rows of a split. Successive ranges continue a stream; a range before it starts another one.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the split's order.
        """
        for number, row in self._rows[split][places.start : places.stop].tolist():
            stream = self._streams[number]
            with self._one_line(stream):
                value = self._take(stream, row)
            name = f"{self.shown}:{printable(stream)} row {row}"
            yield read_sample(partial(self._image_bytes, value, name), label=int(self._labels[number][row]), name=name)
        if places.stop >= len(self._rows[split]):
            self._opened = None  # closes its files

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens its own streams.
        return {**self.__dict__, "_opened": None}

    @abstractmethod
    def _columns(self, stream: str) -> _Columns:
        """Returns the columns of a stream."""

    @abstractmethod
    def _read_labels(self, stream: str) -> list[Any]:
        """Returns the label of each row."""

    @abstractmethod
    def _read_images(self, stream: str, row: int) -> Iterator[tuple[int, Any]]:
        """Yields the number and the image of each row from one at or before the given one."""

    @abstractmethod
    def _describe_files(self, stream: str) -> str:
        """Returns names and lengths of the files of a stream."""

    def _take(self, stream: str, row: int) -> Any:
        """Returns the image of a row; rows that ascend are read in one pass."""
        if self._opened is None or self._opened[0] != stream or self._opened[1] > row:
            self._opened = stream, 0, self._read_images(stream, row)
        rows = self._opened[2]
        value = next((value for number, value in rows if number == row), _END)
        if value is _END:
            raise ValueError(f"there must be a row {row}, got the end")
        self._opened = stream, row + 1, rows
        return value

    def _image_bytes(self, value: Any, name: str) -> bytes:
        """Returns the bytes of an image from what ``_take`` has returned."""
        if value is None:
            raise UnreadableImageError(f"image {name} must be inside the data set, got a path outside of it or nothing")
        if len(value) > MAX_IMAGE_BYTES:
            limit, size = size_text(MAX_IMAGE_BYTES), size_text(len(value))
            raise UnreadableImageError(f"image {name} must have at most {limit}, got {size}", reason="too large")
        return bytes(value)

    @contextmanager
    def _one_line(self, stream: str = "") -> Iterator[None]:
        """Turns the errors of other packages into a ``ValueError`` of one line."""
        try:
            yield
        except ImportError as error:
            install = f'pip install "maskgit_pl[{self.extra}]"'
            raise ValueError(f"source {self.shown} requires {error.name}: {install}") from error
        except Exception as error:
            # datasets raises errors of many libraries: pyarrow, fsspec, huggingface_hub, yaml.
            text = printable((str(error).splitlines() or [type(error).__name__])[0])
            shown = f"{self.shown}:{printable(stream)}" if stream else self.shown
            raise ValueError(f"source {shown} cannot be read: {text}") from error

    def _number_labels(
        self, labels: Sequence[Sequence[Any]], given: tuple[str, ...]
    ) -> tuple[tuple[str, ...], list[npt.NDArray[np.int64]]]:
        """Returns the class names, and the class number of each row of each stream."""
        found = {label for values in labels for label in values if _is_label(label)}
        numbers: dict[Any, int] = {}
        if found and all(isinstance(label, str) for label in found):
            given = given or tuple(sorted(found))
            numbers = {name: number for number, name in enumerate(given)}
        else:
            limit = len(given) or MAX_CLASSES
            numbers = {label: label for label in found if type(label) is int and 0 <= label < limit}
        for stream, values in zip(self._streams, labels, strict=True):
            wrong = next((row for row, value in enumerate(values) if not (_is_label(value) and value in numbers)), None)
            if wrong is not None:
                hint = f"; name another split, such as {self.shown}:train" if self.kind == "datasets" else ""
                raise ValueError(
                    f"source {self.shown}:{printable(stream)}: row {wrong}: {self.label_field} must be one of "
                    f"{len(given) or MAX_CLASSES} classes, got {values[wrong]!r:.40}{hint}"
                )
        classes = given or tuple(map(str, range(1 + max(numbers.values(), default=0))))
        return classes, [np.array([numbers[label] for label in values], np.int64) for values in labels]

    def _split_rows(
        self, streams: Mapping[Split, Sequence[str]], val_fraction: float
    ) -> dict[Split, npt.NDArray[np.int64]]:
        """Returns the stream's number and the row of each sample of each split, (n, 2) int64."""
        every: dict[Split, list[tuple[int, int]]] = {split: [] for split in streams}
        split_of = {name: split for split, names in streams.items() for name in names}
        for number, (name, labels) in enumerate(zip(self._streams, self._labels, strict=True)):
            every[split_of[name]] += [(number, row) for row in range(len(labels))]
        if not self.has_splits:
            both: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
            for number, row in every["train"]:
                digest = hashlib.sha256(f"{self._streams[number]} {row}".encode("utf-8", "surrogateescape")).digest()
                both[is_val(digest, val_fraction)].append((number, row))
            every = {"train": both[False], "val": both[True]}
        return {split: np.array(rows, np.int64).reshape(-1, 2) for split, rows in every.items()}


def _is_label(value: Any) -> bool:
    return type(value) in (int, str)  # bool is a subclass of int


def _listed(names: Sequence[str]) -> str:
    return ", ".join([printable(name) for name in names[:20]] + ["..."] * (len(names) > 20))


class ParquetFolder(_Table):
    """The parquet files in a folder or in its sub-folders, each of which is a stream. Requires pyarrow.

    Files named ``train-*`` and ``validation-*`` (or ``test-*``), or in sub-folders with such names, are the splits.
    Without train files, all that name no split are train. Columns: an image, as bytes or as a struct with the field
    ``bytes``, and a class number. The class names are in the metadata that ``datasets`` writes.

    Args:
        folder: The folder.
        classes: See ``_Table``, also for the other options.

    Raises:
        ValueError: if pyarrow is missing, a file is not parquet or would expand to too many bytes, it lacks a column, a
            label is not a class, or the class names of the files differ.
    """

    kind, extra = "parquet", "parquet"

    def __init__(
        self, folder: Path, *, classes: Sequence[str] | None, val_fraction: float = 0.1, label_field: str = "label"
    ) -> None:
        self.folder, self.shown = folder, printable(folder)
        with self._one_line():
            import pyarrow.parquet  # noqa: F401  # or the way to install it
        paths = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*/*.parquet"))
        streams = _files_of_splits([path.relative_to(folder).as_posix() for path in paths], shown=self.shown)
        used = [name for names in streams.values() for name in names]
        every = {path.relative_to(folder).as_posix() for path in (*paths, *folder.glob("*/*.parquet"))}
        self.left_out = tuple(f"parquet file {printable(name)}" for name in sorted(every - {*used}))
        checked = [check_parquet(folder / name) for name in used]
        if (count := sum(rows for rows, _ in checked)) > _MAX_ROWS:
            raise ValueError(f"source {self.shown} must have at most {_MAX_ROWS} rows, got {count}")
        self._rows_at_once = min(_ROWS_AT_ONCE, 1 + _BYTES_AT_ONCE // max(1, *(page for _, page in checked)))
        super().__init__(self.shown, streams, classes=classes, val_fraction=val_fraction, label_field=label_field)

    def _file(self, stream: str) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        # Without a size of the buffer, the column of a row group is read as a whole.
        return ParquetFile(self.folder / stream, buffer_size=2**20)

    def _columns(self, stream: str) -> _Columns:
        import pyarrow as pa

        def holds_bytes(kind: Any) -> bool:
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

        with self._one_line(stream):
            schema = self._file(stream).schema_arrow
        try:
            metadata = parse_any_json((schema.metadata or {})[b"huggingface"], "metadata")
            classes = tuple(map(str, metadata["info"]["features"][self.label_field]["names"]))
        except (KeyError, TypeError, ValueError):
            classes = ()
        return _Columns(schema.names, [field.name for field in schema if holds_bytes(field.type)], classes)

    def _read_labels(self, stream: str) -> list[Any]:
        import pyarrow as pa

        with self._one_line(stream):
            file = self._file(stream)
            kind = file.schema_arrow.field(self.label_field).type
            if not pa.types.is_integer(kind):  # texts may expand
                raise ValueError(f"column {self.label_field!r} must hold class numbers, got {kind}")
            labels: list[Any] = file.read(columns=[self.label_field]).column(0).to_pylist()
            return labels

    def _read_images(self, stream: str, row: int) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa

        file, group, start = self._file(stream), 0, 0
        while start + (count := file.metadata.row_group(group).num_rows) <= row:
            group, start = group + 1, start + count
        is_struct = pa.types.is_struct(file.schema_arrow.field(self.image_field).type)
        column = f"{self.image_field}.bytes" if is_struct else self.image_field  # other fields may have any length
        groups = range(group, file.num_row_groups)
        batches = file.iter_batches(self._rows_at_once, row_groups=groups, columns=[column])
        images = (image for batch in batches for image in batch.column(0))
        images = (image["bytes"] if is_struct and image.is_valid else image for image in images)
        return enumerate((image.as_buffer() if image.is_valid else None for image in images), start)

    def _describe_files(self, stream: str) -> str:
        return f"{stream} {(self.folder / stream).stat().st_size}\n"


def _files_of_splits(names: Sequence[str], *, shown: str) -> dict[Split, list[str]]:
    """Returns the parquet files of each split, by their names relative to the folder."""

    def split_of(name: str) -> str:
        """Returns ``"train"``, ``"val"`` or ``"test"``, by the file's name or else its sub-folder; else nothing."""
        folder, _, file = name.lower().rpartition("/")
        for text in (file.removesuffix(".parquet"), folder):
            for split, words in _SPLIT_NAMES.items():
                if re.search(rf"(?<![a-z])({words})(?![a-z])", text):
                    return split
        return ""

    found = {split: [name for name in names if split_of(name) == split] for split in (*_SPLIT_NAMES, "")}
    if not (train := found["train"] or found[""]):
        raise ValueError(f"source {shown} must have files of the train split, got {_listed(names)}")
    # Test files are val only if there are no validation files.
    return {"train": train, **({"val": val} if (val := found["val"] or found["test"]) else {})}


class HubDataset(_Table):
    """A data set of the Hugging Face Hub, or a local folder in its format: parquet files, or the form ImageFolder.

    Its splits ``train`` and ``validation`` (or ``test``) are kept. Each split is a stream. Requires ``datasets``.

    Args:
        name: ``OWNER/NAME[@REVISION][:SPLIT]``, or a local folder in place of ``OWNER/NAME``.
        classes: See ``_Table``, also for the other options.

    Raises:
        ValueError: if ``datasets`` is missing, there is no such data set, split or column, or a label is not a class.
    """

    kind, extra = "datasets", "hf"

    def __init__(
        self, name: str, *, classes: Sequence[str] | None, val_fraction: float = 0.1, label_field: str = "label"
    ) -> None:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"source hf:{printable(name)} must be hf:OWNER/NAME[@REVISION][:SPLIT]")
        self.name, self.revision, self.shown = found["name"], found["revision"], f"hf:{printable(found['name'])}"
        if self.revision is not None and Path(self.name).is_dir():
            raise ValueError(
                f"source {self.shown} must have no @REVISION, since it is a local folder, got "
                f"@{printable(self.revision)}; leave it out"
            )
        with self._one_line():
            data_files = self._builder().config.data_files
        self._files = {str(part): list(map(str, files)) for part, files in data_files.items()}
        self._origins = {str(part): files.origin_metadata for part, files in data_files.items()}
        remote = f"hf://datasets/{self.name}@"
        self._remote = {file for files in self._files.values() for file in files if file.startswith(remote)}
        streams = _choose_splits(list(self._files), found["split"], shown=self.shown)
        super().__init__(self.shown, streams, classes=classes, val_fraction=val_fraction, label_field=label_field)

    def _builder(self, **options: Any) -> Any:
        import datasets

        if int(datasets.__version__.split(".")[0]) < _MIN_VERSION:
            raise ValueError(f"datasets must be of version {_MIN_VERSION} or later, got {datasets.__version__}")
        builder = datasets.load_dataset_builder(self.name, revision=self.revision, **options)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in ("parquet", "imagefolder"):
            raise ValueError(f"its files must be parquet or imagefolder, got {kind}; @refs/convert/parquet may be")
        return builder

    def _columns(self, stream: str) -> _Columns:
        import datasets

        with self._one_line(stream):
            rows = self._builder().as_streaming_dataset(split=stream)
            features = rows.features or rows._resolve_features().features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not images:
            hint = "; if they are in parquet files, leave out hf:" if Path(self.name).is_dir() else ""
            got = _listed(list(features))
            raise ValueError(f"source {self.shown} must have a column of the type Image of datasets, got {got}{hint}")
        return _Columns(list(features), images, tuple(getattr(features.get(self.label_field), "names", None) or ()))

    def _load(self, stream: str, column: str) -> Any:
        """Returns a stream of rows with one column; of parquet files, others are not downloaded."""
        builder = self._builder()
        if hasattr(builder.config, "columns"):
            builder = self._builder(columns=[column])
        return builder.as_streaming_dataset(split=stream).select_columns([column])

    def _read_labels(self, stream: str) -> list[Any]:
        with self._one_line(stream):
            return [row[self.label_field] for row in self._load(stream, self.label_field)]

    def _read_images(self, stream: str, row: int) -> Iterator[tuple[int, Any]]:
        import datasets

        rows = self._load(stream, self.image_field).cast_column(self.image_field, datasets.Image(decode=False))
        return enumerate(values[self.image_field] for values in rows)

    def _describe_files(self, stream: str) -> str:
        # The address of a file of the Hub has the commit. Of a local file, the length counts, not the time.
        described = [stream]
        for file, origin in zip(self._files[stream], self._origins[stream], strict=True):
            is_local = os.path.isfile(file)
            described.append(os.path.relpath(file, self.name) if is_local else file)
            described.append(str(os.path.getsize(file) if is_local else origin))
        return "\n".join(described)

    def _take(self, stream: str, row: int) -> Any:
        value = super()._take(stream, row) or {}
        data, path = value.get("bytes"), value.get("path")
        if data is not None or path not in self._remote:  # a row may name any address
            return path if data is None else data
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    def _image_bytes(self, value: Any, name: str) -> bytes:
        if not isinstance(value, str):
            return super()._image_bytes(value, name)
        # A row may name any file of this machine; only those of the data set are its images.
        if Path(self.name).is_dir() and Path(os.path.realpath(value)).is_relative_to(os.path.realpath(self.name)):
            return read_image_file(value, name=name)
        return super()._image_bytes(None, name)


def _choose_splits(found: Sequence[str], given: str | None, *, shown: str) -> dict[Split, list[str]]:
    """Returns the split that the user named, else train and val, else the only one."""
    if given is not None and given not in found:
        raise ValueError(f"source {shown} must have the split {given!r}, got {', '.join(found)}")
    if given is not None or len(found) == 1:
        return {"train": [given or found[0]]}
    if "train" not in found:
        raise ValueError(
            f"source {shown} must have the split train, got {', '.join(found)}; name one, as in {shown}:{found[0]}"
        )
    val = [name for name in ("validation", "valid", "val", "test") if name in found]
    return {"train": ["train"], **({"val": val[:1]} if val else {})}

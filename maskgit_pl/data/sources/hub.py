"""A data set of the Hugging Face Hub, or a local folder in its format, as a source. Requires the package ``datasets``.

Samples are streamed with their images undecoded. ``datasets`` from version 4 on runs no code of a data set; older ones
are refused. Used by ``open_source``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError, read_image_file
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import MAX_CLASSES, Sample, UnreadableSample, is_val, read_sample
from maskgit_pl.errors import printable
from maskgit_pl.files import size_text

__all__ = ["HubDataset"]

_NAME = re.compile(r"(?P<name>.+?)(@(?P<revision>[^:]+))?(:(?P<split>\w+))?")
_VAL_SPLITS = ("validation", "valid", "val", "test")
_KINDS = ("parquet", "imagefolder")
_MIN_VERSION = 4  # trusts no remote code


class _Rows(NamedTuple):
    """The rows of a split of ours: a split of the data set, and (n,) int64 row numbers in it."""

    part: str
    rows: npt.NDArray[np.int64]


class HubDataset:
    """A data set that ``datasets`` can stream, in parquet files or in the form ImageFolder.

    Its splits ``train`` and ``validation`` (or ``test``) are kept. With one split, a hash of the row number chooses the
    val samples. Samples keep the order of the data set. Labels are read first, then images, in one stream for each
    split.

    Args:
        name: ``OWNER/NAME[@REVISION][:SPLIT]``, or a local folder in place of ``OWNER/NAME``.
        classes: Class names, if the labels are plain numbers or texts; then these are all texts that occur.
        val_fraction: Fraction of the rows that become val if there is one split, in (0, 1).
        label_field: Column of the labels.

    Raises:
        ValueError: if ``datasets`` is missing, there is no such data set, split or column, or a label is not a class.
    """

    left_out: tuple[str, ...] = ()

    def __init__(
        self, name: str, *, classes: Sequence[str] | None, val_fraction: float = 0.1, label_field: str = "label"
    ) -> None:
        check_number("val_fraction", val_fraction, "(0, 1)")
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"source hf:{printable(name)} must be hf:OWNER/NAME[@REVISION][:SPLIT]")
        self.name, self.revision = found["name"], found["revision"]
        if self.revision is not None and Path(self.name).is_dir():
            raise ValueError(
                f"source {self.shown} must have no @REVISION, since it is a local folder, got "
                f"@{printable(self.revision)}; leave it out"
            )
        self.label_field = label_field
        self._streams: dict[str, _Stream] = {}
        with self._one_line():
            builder = self._builder()
            self._files = {str(part): list(map(str, files)) for part, files in builder.config.data_files.items()}
            remote = f"hf://datasets/{self.name}@"
            self._remote = {file for files in self._files.values() for file in files if file.startswith(remote)}
            self._origins = {str(part): files.origin_metadata for part, files in builder.config.data_files.items()}
        parts = _choose_parts(list(self._files), found["split"], shown=self.shown)
        features = self._features(parts[0])
        self.image_field = self._image_column(features)
        with self._one_line():
            labels = {part: self._read_labels(part) for part in parts}
        self.classes, self._labels = self._number_labels(features, labels, classes)
        self.has_splits = len(parts) == 2
        self._rows = self._split_rows(parts, val_fraction)
        for split, (_, rows) in self._rows.items():
            if not len(rows):
                raise ValueError(f"source {self.shown}: the {split} split must have at least 1 row, got 0")

    @property
    def shown(self) -> str:
        """The name in messages."""
        return f"hf:{printable(self.name)}"

    @property
    def counts(self) -> dict[Split, int]:
        """The number of rows of each split."""
        return {split: len(rows) for split, (_, rows) in self._rows.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, columns, and hashes of the files, the labels and the rows of each split."""
        return {
            "kind": "datasets",
            "classes": list(self.classes),
            "columns": [self.image_field, self.label_field],
            "splits": {
                split: {
                    "name": part,
                    "files": self._digest_files(part),
                    "labels": hashlib.sha256(self._labels[part].tobytes()).hexdigest(),
                    "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
                }
                for split, (part, rows) in self._rows.items()
            },
        }

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields rows of a split. Successive ranges continue one stream; a range before it starts another one.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the split's order.
        """
        part, rows = self._rows[split]
        for row in rows[places.start : places.stop].tolist():
            with self._one_line():
                value = self._download(self._stream(part, row).take(row)[self.image_field])
            name = f"{self.shown}:{part} row {row}"
            yield read_sample(partial(self._image_bytes, value, name), label=int(self._labels[part][row]), name=name)
        if places.stop >= len(rows):
            self._streams.pop(part, None)  # closes its files

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens its own streams.
        return {**self.__dict__, "_streams": {}}

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turns the errors of ``datasets`` into a ``ValueError`` of one line."""
        try:
            yield
        except ImportError as error:
            raise ValueError(f'source {self.shown} requires datasets: pip install "maskgit_pl[hf]"') from error
        except Exception as error:
            # datasets raises errors of many libraries: pyarrow, fsspec, huggingface_hub, yaml.
            text = printable((str(error).splitlines() or [type(error).__name__])[0])
            raise ValueError(f"source {self.shown} cannot be read: {text}") from error

    def _builder(self, **options: Any) -> Any:
        import datasets

        if int(datasets.__version__.split(".")[0]) < _MIN_VERSION:
            raise ValueError(f"datasets must be of version {_MIN_VERSION} or later, got {datasets.__version__}")
        builder = datasets.load_dataset_builder(self.name, revision=self.revision, **options)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _KINDS:
            raise ValueError(f"its files must be {' or '.join(_KINDS)}, got {kind}; @refs/convert/parquet may be")
        return builder

    def _load(self, part: str, columns: Sequence[str]) -> Any:
        """Returns a stream of rows with some columns; of parquet files, other columns are not downloaded."""
        builder = self._builder()
        if hasattr(builder.config, "columns"):
            builder = self._builder(columns=list(columns))
        return builder.as_streaming_dataset(split=part).select_columns(list(columns))

    def _features(self, part: str) -> Mapping[str, Any]:
        with self._one_line():
            stream = self._builder().as_streaming_dataset(split=part)
            features = stream.features or stream._resolve_features().features
        if self.label_field not in features:
            got = ", ".join(map(printable, features))
            raise ValueError(
                f"source {self.shown} must have a column {self.label_field!r}, got {got}; set it with --label-field"
            )
        return dict(features)

    def _image_column(self, features: Mapping[str, Any]) -> str:
        import datasets

        for name, feature in features.items():
            if isinstance(feature, datasets.Image):
                return name
        hint = "; if they are in parquet files, leave out hf:" if Path(self.name).is_dir() else ""
        got = ", ".join(map(printable, features))
        raise ValueError(f"source {self.shown} must have a column of the type Image of datasets, got {got}{hint}")

    def _read_labels(self, part: str) -> list[Any]:
        return [row[self.label_field] for row in self._load(part, [self.label_field])]

    def _number_labels(
        self, features: Mapping[str, Any], labels: Mapping[str, list[Any]], given: Sequence[str] | None
    ) -> tuple[tuple[str, ...], dict[str, npt.NDArray[np.int64]]]:
        """Returns the class names, and the class number of each row of each part."""
        names = getattr(features[self.label_field], "names", None)  # of a ClassLabel
        if names and given is not None and list(given) != list(names):
            raise ValueError(f"source {self.shown}: class names must not be given, since the data set has its own")
        every = [label for values in labels.values() for label in values]
        if every and all(isinstance(label, str) for label in every):
            known = tuple(given or sorted(set(every)))
            numbers = {name: number for number, name in enumerate(known)}
            numbered = {part: [numbers.get(label, -1) for label in values] for part, values in labels.items()}
        else:
            known = tuple(names or given or ())
            numbered = {part: [_as_number(label) for label in values] for part, values in labels.items()}
        limit = len(known) or MAX_CLASSES
        for part, values in numbered.items():
            wrong = next((row for row, value in enumerate(values) if not 0 <= value < limit), None)
            if wrong is not None:
                raise ValueError(
                    f"source {self.shown}:{part}: row {wrong}: {self.label_field} must be one of {limit} classes, got "
                    f"{labels[part][wrong]!r:.40}; name another split, such as {self.shown}:train"
                )
        largest = max((value for values in numbered.values() for value in values), default=0)
        classes = known or tuple(map(str, range(largest + 1)))
        return classes, {part: np.array(values, np.int64) for part, values in numbered.items()}

    def _split_rows(self, parts: Sequence[str], val_fraction: float) -> dict[Split, _Rows]:
        every = [_Rows(part, np.arange(len(self._labels[part]))) for part in parts]
        if len(every) == 2:
            return {"train": every[0], "val": every[1]}
        part, rows = every[0]
        digests = (hashlib.sha256(f"{part} {row}".encode()).digest() for row in rows.tolist())
        chosen = np.array([is_val(digest, val_fraction) for digest in digests], bool)
        return {"train": _Rows(part, rows[~chosen]), "val": _Rows(part, rows[chosen])}

    def _digest_files(self, part: str) -> str:
        # The address of a file of the Hub has the commit. Of a local file, the length counts, not the time.
        digest = hashlib.sha256()
        for file, origin in zip(self._files[part], self._origins[part], strict=True):
            is_local = os.path.isfile(file)
            name = os.path.relpath(file, self.name) if is_local else file
            digest.update(
                f"{name} {os.path.getsize(file) if is_local else origin}\n".encode("utf-8", "surrogateescape")
            )
        return digest.hexdigest()

    def _stream(self, part: str, row: int) -> _Stream:
        stream = self._streams.get(part)
        if stream is None or stream.position > row:
            import datasets

            rows = self._load(part, [self.image_field])
            stream = _Stream(iter(rows.cast_column(self.image_field, datasets.Image(decode=False))))
            self._streams[part] = stream
        return stream

    def _download(self, value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Reads the image of a row that names a file of the data set on the Hub; a row may name any address."""
        if value is None or value.get("bytes") is not None or value.get("path") not in self._remote:
            return value
        from datasets.utils.file_utils import xopen

        with xopen(value["path"], "rb") as file:
            return {"bytes": file.read(MAX_IMAGE_BYTES + 1)}

    def _image_bytes(self, value: Mapping[str, Any] | None, name: str) -> bytes:
        """Returns the bytes of an undecoded image: its own, or those of a file of a local data set."""
        data, path = (None, None) if value is None else (value.get("bytes"), value.get("path"))
        if data is None and path is not None and self._is_inside(path):
            return read_image_file(path, name=name)
        if data is None:
            raise UnreadableImageError(f"image {name} must be inside the data set, got a path outside of it or nothing")
        if len(data) > MAX_IMAGE_BYTES:
            limit, size = size_text(MAX_IMAGE_BYTES), size_text(len(data))
            raise UnreadableImageError(f"image {name} must have at most {limit}, got {size}", reason="too large")
        return bytes(data)

    def _is_inside(self, path: str) -> bool:
        # A row may name any file of this machine; only those of the data set are its images.
        return Path(self.name).is_dir() and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(self.name))


class _Stream:
    """An iterator over rows that knows its position."""

    def __init__(self, rows: Iterator[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.position = 0

    def take(self, row: int) -> Mapping[str, Any]:
        """Returns a row at or after the position."""
        for values in self._rows:
            self.position += 1
            if self.position > row:
                return values
        raise ValueError(f"the data set must have a row {row}, got its end after {self.position} rows")


def _as_number(label: Any) -> int:
    return label if type(label) is int else -1


def _choose_parts(found: Sequence[str], given: str | None, *, shown: str) -> list[str]:
    """Returns the split that the user named, else train and val, else the only one."""
    if given is not None:
        if given not in found:
            raise ValueError(f"source {shown} must have the split {given!r}, got {', '.join(found)}")
        return [given]
    val = [name for name in _VAL_SPLITS if name in found]
    if "train" in found:
        return ["train", *val[:1]]
    if len(found) == 1:
        return list(found)
    raise ValueError(
        f"source {shown} must have the split train, got {', '.join(found)}; name one, as in {shown}:{found[0]}"
    )

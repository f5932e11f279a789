"""Image files as a source: a folder, a zip or a tar, with class folders, without classes, or with a metadata file.

A row of ``metadata.csv`` or ``metadata.jsonl`` names an image relative to the folder of the file, and its
label, as in Hugging Face's ImageFolder. Files ``NAME.npy`` beside the images are their vectors.

Source: Hugging Face, Datasets, "Create an image dataset": ``file_name`` and further columns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from maskgit_pl.checks import shorten
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import Sample, UnreadableSample, check_class_lines, is_val, number_classes, read_sample
from maskgit_pl.data.scan import IMAGE_EXTENSIONS
from maskgit_pl.data.sources.archives import Entries, EntryError
from maskgit_pl.data.vectors import MAX_VECTOR_BYTES, VECTOR_EXTENSION, VectorKind, parse_vector
from maskgit_pl.errors import printable
from maskgit_pl.files import parse_any_json

log = logging.getLogger(__name__)

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_MAX_LISTED = 3  # names of files that are left out
_METADATA = ("metadata.csv", "metadata.jsonl")
_MAX_METADATA_BYTES = 2**29  # 100 bytes for each of five million files
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})")


class _File(NamedTuple):
    """An image of a source."""

    name: str  # in the source
    label: int
    digest: bytes  # of the name relative to the split's root; determines order and split
    vector: str | None = None  # the file NAME.npy beside NAME.jpg


class ImageFolder:
    """Image files in a folder or an archive; ``train/`` and ``val/`` (or ``test/``) in it are the splits.

    1. With a file ``metadata.csv`` or ``metadata.jsonl``, its rows are the labels.
    2. Else each sub-folder is a class.
    3. Without sub-folders, all images have one class, named like the folder.

    A hash of each file's path inside the folder determines its order and, without split folders, its split. So each
    shard has mixed classes, and adding a file never moves others between splits. The same files in a folder, a zip and
    a tar give the same shards. If one image has a vector, all must have one, of the same size and type.

    Args:
        path: The folder or the archive; for the other arguments, see ``open_source``.

    Raises:
        FileNotFoundError: if there is no such folder or archive.
        ValueError: if the archive or the metadata cannot be used, there are no images, val has a class that
            train lacks, one split folder stands without the other, or a split has no files.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        label_field: str = "label",
        vectors: bool = True,
    ) -> None:
        self._entries = Entries(Path(path))
        self._shown = printable(self._entries.path)
        self._left_out = self._entries.left_out
        self._roots = self._split_roots()
        self.has_splits = None not in self._roots
        roots = dict.fromkeys(["", *self._roots.values()])
        tables = [name for root in roots for name in self._metadata_in(root)]
        folders = {name.rpartition("/")[0] for name in tables}
        if len(folders) < len(tables) or (len(folders) > 1 and "" in folders):
            raise ValueError(f"source {self._shown} must have one metadata file, got {' and '.join(tables)}")
        self._has_metadata = bool(tables)
        if tables:
            self.classes, labels = self._label_by_metadata(tables, classes, label_field=label_field)
        else:
            self.classes, labels = self._label_by_folder(classes)
            check_class_lines(f"source {self._shown}", self.classes)
        outside = (name for name in [*self._entries.sizes, *self._entries.folders] if self._root_of(name) is None)
        used = {root.rstrip("/") for root in self._roots.values()} | {*tables}
        self._left_out["beside the folders of the splits"] = sorted({name.partition("/")[0] for name in outside} - used)
        vector_of = self._take_vectors(labels) if vectors else {}
        self._files = self._split_files(labels, vector_of, val_fraction)
        self._vector_kind = self._find_vector_kind()

    @property
    def counts(self) -> dict[Split, int]:
        """The number of files of each split."""
        return {split: len(files) for split, files in self._files.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and a hash of the names and lengths of the files of each split."""

        def digest(part: Callable[[_File], bytes]) -> dict[Split, str]:
            return {split: hashlib.sha256(b"".join(map(part, files))).hexdigest() for split, files in by_split}

        by_split, sizes = self._files.items(), self._entries.sizes
        described: dict[str, Any] = {"kind": "image folder", "classes": list(self.classes)}
        described["files"] = digest(lambda file: file.digest + sizes.get(file.name, 0).to_bytes(8, "little"))
        # Without vectors or metadata, the record has no key of them.
        if self._vector_kind is not None:
            described["vectors"] = digest(self._digest_vector)
        if self._has_metadata:
            described["labels"] = digest(lambda file: b"%d " % file.label)
        return described

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files that are not images of a class, one line per kind with a count and the first names."""
        return tuple(_format_files(kind, names) for kind, names in sorted(self._left_out.items()) if names)

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields files of a split in the order of their hashes, checked to be complete images without decoding."""
        for file in self._files[split][places.start : places.stop]:
            name = printable(self._entries.path / file.name)
            sample = read_sample(partial(self._entries.read, file.name), label=file.label, name=name)
            if self._vector_kind is not None and isinstance(sample, Sample):
                sample = self._add_vector(sample, file)
            yield sample

    def _split_roots(self) -> dict[Split | None, str]:
        """Returns the folder of each split with a trailing ``/``; one folder, the whole source, for no splits."""
        # The first of these names is the val split; without it, or without train/, sub-folders are classes.
        folders = self._entries.folders
        val = next((name for name in _VAL_FOLDERS if name in folders), None)
        if "train" in folders and val is not None:
            return {"train": "train/", "val": f"{val}/"}
        # One split folder without the other would become a class that is named like a split. A class may be
        # called train too: it has images in it, not folders.
        above = {folder.partition("/")[0] for folder in folders if "/" in folder}
        for name in ("train", *_VAL_FOLDERS):
            if name in above or (name in folders and self._metadata_in(f"{name}/")):
                missing = "val/ (or test/)" if name == "train" else "train/"
                raise ValueError(
                    f"source {self._shown} must have {missing} beside {name}/, got no such folder; add it, or name "
                    f"{printable(self._entries.path / name)} to take the val split from its images"
                )
        return {None: ""}

    def _metadata_in(self, root: str) -> list[str]:
        """Returns the metadata files in a folder of the source, with a trailing ``/``, or an empty string."""
        return [root + name for name in _METADATA if root + name in self._entries.sizes]

    def _root_of(self, name: str) -> str | None:
        return next((root for root in self._roots.values() if name.startswith(root)), None)

    def _split_files(
        self, labels: dict[str, int], vectors: dict[str, str], val_fraction: float
    ) -> dict[Split, list[_File]]:
        """Returns the files of each split in the order of their hashes."""
        files: dict[Split, list[_File]] = {"train": [], "val": []}
        for split, root in self._roots.items():
            names = [name for name in labels if name.startswith(root)]
            if not names:
                raise ValueError(self._describe_no_images(root))
            for name in names:
                # In UTF-8 in every locale, so that the order and the val split are the same.
                digest = hashlib.sha256(name[len(root) :].encode("utf-8", "surrogateescape")).digest()
                chosen: Split = split or ("val" if is_val(digest, val_fraction) else "train")
                files[chosen].append(_File(name, labels[name], digest, vectors.get(name)))
        for of_split, some in files.items():
            if not some:  # a hash puts few files into one split
                raise ValueError(
                    f"source {self._shown}: the {of_split} split must have files, got none of {len(labels)} at a val "
                    f"fraction of {val_fraction:g}; add images, set --val-fraction, or make the folders train/ and val/"
                )
            some.sort(key=lambda file: file.digest)
        return files

    def _describe_no_images(self, root: str) -> str:
        kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        hint = "unpack archives inside it, or use maskgit data index for WebDataset shards"
        return (
            f"source {printable(self._entries.path / root)} must hold {kinds} files, got "
            f"{', '.join(self.left_out) or 'none'}{f'; {hint}' if '.tar' in self._left_out else ''}"
        )

    def _label_by_metadata(
        self, metadata_files: Sequence[str], class_names: Sequence[str] | None, *, label_field: str
    ) -> tuple[tuple[str, ...], dict[str, int]]:
        """Returns class names, and the label of each row that names an image; some may not exist."""
        parts = {name: _read_metadata(self._entries, name, label_field=label_field) for name in metadata_files}
        classes, labels = _number_metadata(parts, class_names, label_field=label_field)
        for name in sorted(labels.keys() | self._entries.sizes.keys() - set(metadata_files)):
            if not _is_image(name):
                self._left_out[_suffix_kind(name)].append(name)
            elif name not in labels:
                self._left_out[f"without a row in {' and '.join(metadata_files)}"].append(name)
        return classes, {name: label for name, label in labels.items() if _is_image(name)}

    def _label_by_folder(self, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, int]]:
        """Returns class names, and the label of each image by its folder."""
        inside = {root: self._class_folders(root) for root in self._roots.values()}
        # Labels are numbered by train's classes; val may lack some of them.
        first, *others = inside
        classes = inside[first]
        if unknown := sorted({name for root in others for name in inside[root]} - set(classes)):
            names = ", ".join(map(printable, unknown))
            raise ValueError(f"source {self._shown}: train/ must have all classes of {others[0]}; it lacks {names}")
        if classes and class_names is not None:
            raise ValueError(
                f"source {self._shown}: class names must not be given, since they are the names of its sub-folders"
            )
        labels, numbers = dict[str, int](), {name: label for label, name in enumerate(classes)}
        for name in sorted(self._entries.sizes):
            root = self._root_of(name)
            if root is None:
                continue
            folder, _, inner = name[len(root) :].partition("/")
            if not inner and classes:
                self._left_out["outside the class folders"].append(name)
            elif not _is_image(name):
                self._left_out[_suffix_kind(name)].append(name)
            else:
                labels[name] = numbers[folder] if classes else 0
        return classes or self._single_class(class_names), labels

    def _class_folders(self, root: str) -> tuple[str, ...]:
        inside = (name[len(root) :] for name in self._entries.folders if name.startswith(root))
        return tuple(sorted(name for name in inside if name and "/" not in name))

    def _single_class(self, class_names: Sequence[str] | None) -> tuple[str, ...]:
        """Returns the name of the only class of images without sub-folders."""
        if any(name.endswith(".cls") for name in self._entries.sizes):
            raise ValueError(
                f"source {self._shown} must hold images, got .cls files beside them, as in WebDataset shards; use "
                "maskgit data index"
            )
        if class_names is not None and len(class_names) != 1:
            raise ValueError(
                f"source {self._shown}: 1 class name must be given for images without sub-folders, got "
                f"{len(class_names)}; make one sub-folder per class, or a metadata.csv with file_name and label"
            )
        return tuple(class_names) if class_names is not None else (self._entries.title or "image",)

    def _take_vectors(self, labels: dict[str, int]) -> dict[str, str]:
        """Returns the vector beside each image, and removes these vectors from the files that are left out."""
        vector_of = {name: vector for name in labels if (vector := _vector_name(name)) in self._entries.sizes}
        kind = f".{VECTOR_EXTENSION}"
        self._left_out[kind] = sorted({*self._left_out[kind]} - {*vector_of.values()})
        return vector_of

    def _find_vector_kind(self) -> tuple[VectorKind, str] | None:
        """Returns size and type of the vectors, which the first valid one decides, and its name; None without any."""
        first_error: ValueError | None = None
        for name in (file.vector for files in self._files.values() for file in files if file.vector is not None):
            try:
                return self._read_vector(name)[1], printable(self._entries.path / name)
            except ValueError as error:
                first_error = first_error or error
        if first_error is not None:
            raise ValueError(f"{first_error}; correct the .npy files, or leave all of them out with --no-vectors")
        return None

    def _read_vector(self, name: str) -> tuple[bytes, VectorKind]:
        data = self._entries.read(name, what="vector", limit=MAX_VECTOR_BYTES)
        return data, parse_vector(data, name=printable(self._entries.path / name))[0]

    def _add_vector(self, sample: Sample, file: _File) -> Sample | UnreadableSample:
        """Returns the sample with its vector, or an ``UnreadableSample`` if that is missing or invalid."""
        assert self._vector_kind is not None
        expected, first = self._vector_kind
        if file.vector is None:
            vector_name = _vector_name(file.name).rpartition("/")[2]
            return UnreadableSample(f"image {sample.name} must have the vector {vector_name} beside it, got none")
        try:
            data, kind = self._read_vector(file.vector)
        except ValueError as error:
            return UnreadableSample(str(error))
        if kind != expected:
            path = printable(self._entries.path / file.vector)
            return UnreadableSample(f"vector {path} must have {expected}, as {first}, got {kind}")
        return sample._replace(vector=data)

    def _digest_vector(self, file: _File) -> bytes:
        """Returns a hash of the content of a vector, since another encoder gives files of the same lengths."""
        data = b""
        if file.vector is not None:
            with suppress(EntryError):  # its sample is reported as unreadable
                data = self._entries.read(file.vector, limit=MAX_VECTOR_BYTES)
        return hashlib.sha256(data).digest()


def _format_files(kind: str, names: Sequence[str]) -> str:
    listed = [printable(name) for name in names[:_MAX_LISTED]] + ["..."] * (len(names) > _MAX_LISTED)
    return f"{len(names)} {printable(kind)} ({', '.join(listed)})"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS


def _suffix_kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without an ending"


def _vector_name(image: str) -> str:
    return f"{os.path.splitext(image)[0]}.{VECTOR_EXTENSION}"


def _read_metadata(entries: Entries, name: str, *, label_field: str) -> dict[str, str]:
    """Returns the label of each file that a metadata file names, a class number or a class name, as text.

    Raises:
        ValueError: if it is damaged or too large, lacks a column or a value, names a file outside its folder,
            or has two labels for one file.
    """
    title = f"metadata {printable(entries.path / name)}"
    data = entries.read(name, what="metadata", limit=_MAX_METADATA_BYTES)
    try:
        text = data.decode("utf-8-sig")  # Excel writes a BOM
        rows = list((_csv_rows if name.endswith(".csv") else _json_rows)(text))
    except (ValueError, csv.Error, RecursionError) as error:
        kind = "a CSV table" if name.endswith(".csv") else "one JSON object per line"
        raise ValueError(f"{title} must be UTF-8 text with {kind}, got: {printable(error)}") from error
    columns = dict.fromkeys(column for _, values in rows for column in values)
    for field in ("file_name", label_field):
        if field not in columns:
            got = ", ".join(map(printable, columns)) or "no rows"
            hint = "; set it with --label-field, or remove the file to take the classes from folders"
            raise ValueError(f"{title} must have a column {field!r}, got {got}{hint * (field != 'file_name')}")
    folder = name.rpartition("/")[0]
    labels = dict[str, str]()
    for line, values in rows:
        where = f"{title}: line {line}"
        file = _file_name(values.get("file_name"), folder, where)
        label = _label(values.get(label_field), label_field, where)
        if labels.setdefault(file, label) != label:
            got = f"{shorten(labels[file])} and {shorten(label)}"
            raise ValueError(f"{where}: {printable(file)} must have one label, got {got}")
    return labels


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line and the values of each row."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = [column.strip() for column in next(reader, [])]
    if len(set(columns)) < len(columns):
        raise ValueError(f"a repeated column in {columns}")
    for values in reader:
        if values and len(values) != len(columns):  # a blank line has no values
            raise ValueError(f"{len(values)} values for {len(columns)} columns in line {reader.line_num}")
        if values:
            yield reader.line_num, dict(zip(columns, values, strict=True))


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line and the values of each row."""
    # Not splitlines(): JSON allows the line separators of Unicode inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            values = parse_any_json(line, f"line {number}")
            if not isinstance(values, dict):
                raise ValueError(f"line {number} is not an object")
            yield number, values


def _file_name(name: Any, folder: str, where: str) -> str:
    parts = [part for part in str(name).split("/") if part not in ("", ".")]
    is_text = isinstance(name, str) and not re.search("[\ud800-\udfff]", name)  # JSON may have lone surrogates
    if not is_text or not parts or ".." in parts or name.startswith("/"):
        rule = "a path inside the folder of the metadata file, in UTF-8"
        raise ValueError(f"{where}: file_name must be {rule}, got {shorten(name)}")
    return "/".join([folder, *parts] if folder else parts)


def _label(value: Any, field: str, where: str) -> str:
    if type(value) not in (int, str) or not str(value).strip():  # bool is a subclass of int
        raise ValueError(f"{where}: {field} must be a class name or a class number, got {shorten(value)}")
    return str(value).strip()


def _number_metadata(
    parts: Mapping[str, Mapping[str, str]], class_names: Sequence[str] | None, *, label_field: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the class names, and the class number of each file.

    If every label is a whole number, labels are class numbers. Else they are class names; if some of them are
    such numbers, a warning says so.

    Args:
        parts: Labels of the files in each metadata file.
        class_names: See ``number_classes``.
        label_field: See there.
    """
    labels = {file: label for part in parts.values() for file, label in part.items()}
    first_row: dict[Any, str] = {}
    for name, part in parts.items():
        for file, label in part.items():
            if label not in first_row:
                first_row[label] = f"metadata {name}: {printable(file)}"
    names = sorted(label for label in first_row if not _NUMBER.fullmatch(label))
    if names and class_names is None and len(names) < len(first_row):
        log.warning(
            "%s: %s is %s, which is no class number; so all labels are class names, also numbers such as %s",
            *(first_row[names[0]], label_field, shorten(names[0]), printable(min(first_row.keys() - {*names}))),
        )
    kind = str if names else int
    classes, numbers = number_classes(
        {kind(label): row for label, row in first_row.items()}, class_names, label_field=label_field
    )
    return classes, {file: numbers[kind(label)] for file, label in labels.items()}

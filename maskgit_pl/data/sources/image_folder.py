"""Image files as a source: a folder, a zip or a tar, with class folders, without classes, or with a ``metadata.csv``.

A row of ``metadata.csv`` names an image relative to the folder of the file, and its label, as in Hugging Face's
ImageFolder.

Source: Hugging Face, Datasets, "Create an image dataset": ``file_name`` and further columns.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from maskgit_pl.data.manifest import Split
from maskgit_pl.data.samples import Sample, UnreadableSample, is_val, number_classes, read_sample
from maskgit_pl.data.scan import IMAGE_EXTENSIONS
from maskgit_pl.data.sources.archives import Entries
from maskgit_pl.text import printable, shorten

_VAL_FOLDERS = ("val", "valid", "validation", "test")
_MAX_LISTED = 3  # names of files that are left out
_METADATA = "metadata.csv"
_JSON_METADATA = "metadata.jsonl"  # which Hugging Face's ImageFolder also reads
_MAX_METADATA_BYTES = 2**29  # 100 bytes for each of five million files
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})")


class _File(NamedTuple):
    """An image of a source."""

    name: str  # in the source
    label: int
    digest: bytes  # of the name relative to the split's root; determines order and split


class ImageFolder:
    """Image files in a folder or an archive; ``train/`` and ``val/`` (or ``test/``) in it are the splits.

    1. With a file ``metadata.csv``, or one in each split folder, its rows are the labels.
    2. Else each sub-folder is a class.
    3. Without sub-folders, all images have one class, named like the folder.

    A hash of each file's path inside the folder determines its order and, without split folders, its split. So each
    shard has mixed classes, and adding a file never moves others between splits. The same files in a folder, a zip and
    a tar give the same shards.

    Args:
        path: The folder or the archive; for the other arguments, see ``open_source``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        label_field: str = "label",
    ) -> None:
        self._entries = Entries(Path(path))
        self._shown = printable(self._entries.path)
        self._roots = self._split_roots()
        self.has_splits = None not in self._roots
        tables = self._metadata_files()
        labels, first_row = self._label_by_metadata(tables, label_field) if tables else self._label_by_folder(classes)
        self.classes, numbers = number_classes(first_row, classes, label_field=label_field)
        labels = {name: label for name, label in labels.items() if _is_image(name)}
        self._list_left_out(labels.keys() | {*tables})
        self._files = self._split_files({name: numbers[label] for name, label in labels.items()}, val_fraction)

    @property
    def counts(self) -> dict[Split, int]:
        """The number of files of each split."""
        return {split: len(files) for split, files in self._files.items()}

    def describe(self) -> dict[str, Any]:
        """Returns class names, and a hash of names, lengths and labels of the files of each split."""
        hashes = {
            split: hashlib.sha256(b"".join(map(self._describe_file, files))).hexdigest()
            for split, files in self._files.items()
        }
        return {"kind": "image folder", "classes": list(self.classes), "files": hashes}

    @property
    def left_out(self) -> tuple[str, ...]:
        """The files that are not images of a class, one line per kind with a count and the first names."""
        return tuple(_format_files(kind, names) for kind, names in sorted(self._entries.left_out.items()))

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields files of a split in the order of their hashes, checked to be complete images without decoding."""
        for file in self._files[split][places.start : places.stop]:
            name = printable(self._entries.path / file.name)
            yield read_sample(partial(self._entries.read, file.name), label=file.label, name=name)

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
        if name := next((name for name in ("train", *_VAL_FOLDERS) if name in above), None):
            missing = "val/ (or test/)" if name == "train" else "train/"
            raise ValueError(
                f"source {self._shown} must have {missing} beside {name}/, got no such folder; add it, or name "
                f"{printable(self._entries.path / name)} to take the val split from its images"
            )
        return {None: ""}

    def _split_of(self, name: str) -> tuple[Split | None, str] | None:
        """Returns the split of a file or folder, and its path inside the folder of the split; None outside of them."""
        inside = ((split, name.removeprefix(root)) for split, root in self._roots.items() if name.startswith(root))
        return next(inside, None)

    def _metadata_files(self) -> list[str]:
        """Returns the metadata file of the source, or else those of its split folders."""
        places = ("", *self._roots.values())
        tables, others = (
            [place + kind for place in places if place + kind in self._entries.sizes]
            for kind in (_METADATA, _JSON_METADATA)
        )
        if others and not tables:  # the labels would be lost
            raise ValueError(
                f"source {self._shown} must have its labels in {_METADATA}, got {others[0]}; write the columns "
                f"file_name and label to {_METADATA}, or remove {others[0]} to take the classes from folders"
            )
        return [_METADATA] if _METADATA in tables else tables

    def _label_by_metadata(
        self, tables: Sequence[str], label_field: str
    ) -> tuple[Mapping[str, int | str], dict[int | str, str]]:
        """Returns the label of each row, and the first row of each label for error messages.

        If every label is a whole number, labels are class numbers. Else they are class names.
        """
        texts, first_row = dict[str, str](), dict[str, str]()
        for table in tables:
            for file, label in _read_metadata(self._entries, table, label_field=label_field).items():
                texts[file] = label
                first_row.setdefault(label, f"metadata {printable(table)}: {printable(file)}")
        kind = int if all(map(_NUMBER.fullmatch, first_row)) else str
        labels = {file: kind(label) for file, label in texts.items()}
        return labels, {kind(label): row for label, row in first_row.items()}

    def _label_by_folder(self, class_names: Sequence[str] | None) -> tuple[Mapping[str, str], dict[str, str]]:
        """Returns the label of each file in a class folder, and all labels with the source for error messages."""
        inside = {name: place[1] for name in self._entries.sizes if (place := self._split_of(name)) is not None}
        folders = [place[1] for name in self._entries.folders if (place := self._split_of(name)) is not None]
        classes = {folder for folder in folders if "/" not in folder}  # also empty ones
        if classes:
            labels = {name: path.partition("/")[0] for name, path in inside.items() if "/" in path}
            return labels, dict.fromkeys(classes, f"source {self._shown}")
        if any(name.endswith(".cls") for name in inside):
            raise ValueError(
                f"source {self._shown} must hold images, got .cls files beside them, as in WebDataset shards; use "
                "maskgit data index"
            )
        only = class_names[0] if class_names and len(class_names) == 1 else self._entries.title or "image"
        return dict.fromkeys(inside, only), {only: f"source {self._shown}"}

    def _list_left_out(self, used: Collection[str]) -> None:
        """Adds the other files to those that are left out, by kind."""
        for name in sorted(self._entries.sizes.keys() - used):
            kind = "without a label" if _is_image(name) else os.path.splitext(name)[1].lower() or "without an ending"
            if self._split_of(name) is None:
                kind = "beside the folders of the splits"
            self._entries.left_out[kind].append(name)

    def _split_files(self, labels: Mapping[str, int], val_fraction: float) -> dict[Split, list[_File]]:
        """Returns the files of each split in the order of their hashes."""
        files: dict[Split, list[_File]] = {"train": [], "val": []}
        for name, label in labels.items():
            if (place := self._split_of(name)) is not None:
                split, path = place
                # In UTF-8 in every locale, so that the order and the val split are the same.
                digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
                split = split or ("val" if is_val(digest, val_fraction) else "train")
                files[split].append(_File(name, label, digest))
        for of_split, some in files.items():
            if not some and (self.has_splits or not labels):
                raise ValueError(self._describe_no_images(of_split))
            if not some:  # a hash puts few files into one split
                raise ValueError(
                    f"source {self._shown}: the {of_split} split must have files, got none of {len(labels)} at a val "
                    f"fraction of {val_fraction:g}; add images, set --val-fraction, or make the folders train/ and val/"
                )
            some.sort(key=lambda file: file.digest)
        return files

    def _describe_no_images(self, split: Split) -> str:
        source = printable(self._entries.path / self._roots.get(split, ""))
        kinds = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        hint = "; unpack archives inside it, or use maskgit data index for WebDataset shards"
        got = ", ".join(self.left_out) or "none"
        return f"source {source} must hold {kinds} files, got {got}{hint * ('.tar' in self._entries.left_out)}"

    def _describe_file(self, file: _File) -> bytes:
        """Returns a hash of what identifies a sample."""
        size = self._entries.sizes.get(file.name, 0)
        return hashlib.sha256(b"%b %d %d " % (file.digest, size, file.label)).digest()


def _format_files(kind: str, names: Sequence[str]) -> str:
    listed = [printable(name) for name in names[:_MAX_LISTED]] + ["..."] * (len(names) > _MAX_LISTED)
    return f"{len(names)} {printable(kind)} ({', '.join(listed)})"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1][1:].lower() in IMAGE_EXTENSIONS


def _read_metadata(entries: Entries, name: str, *, label_field: str) -> dict[str, str]:
    """Returns the label of each file that a metadata file names, a class number or a class name, as text.

    Names are only compared with those of the source, so that a path outside of it is a missing file.
    """
    title = f"metadata {printable(entries.path / name)}"
    data = entries.read(name, what="metadata", limit=_MAX_METADATA_BYTES)
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)  # Excel writes a BOM
        columns = reader.fieldnames or ()
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{title} must be UTF-8 text with a CSV table, got: {printable(error)}") from error
    for field in ("file_name", label_field):
        if columns.count(field) != 1:  # DictReader would keep the last of two columns
            got = ", ".join(map(printable, columns)) or "none"
            hint = "; set it with --label-field, or remove the file to take the classes from folders"
            raise ValueError(f"{title} must have one column {field!r}, got {got}{hint * (field != 'file_name')}")
    labels = dict[str, str]()
    for line, row in rows:
        where = f"{title}: line {line}"
        if None in row or not all((row[field] or "").strip() for field in ("file_name", label_field)):
            raise ValueError(f"{where} must have a file_name, a {label_field} and {len(columns)} values in all")
        label = row[label_field].strip()
        file = "/".join(part for part in [*name.split("/")[:-1], *row["file_name"].split("/")] if part not in ("", "."))
        if labels.setdefault(file, label) != label:
            got = f"{shorten(labels[file])} and {shorten(label)}"
            raise ValueError(f"{where}: {printable(file)} must have one label, got {got}")
    return labels

"""Labels of samples: files ``metadata.csv`` and ``metadata.jsonl``, and the class numbers of labels.

A row of a metadata file names an image relative to the folder of the file, and its label, as in Hugging Face's
ImageFolder. Used by the other sources.

Source: Hugging Face, Datasets, "Create an image dataset": ``file_name`` and further columns.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from maskgit_pl.checks import shorten
from maskgit_pl.data.samples import MAX_CLASSES
from maskgit_pl.data.sources.archives import Entries, EntryError
from maskgit_pl.errors import printable
from maskgit_pl.files import parse_any_json

__all__ = ["Metadata", "find_metadata", "number_classes", "number_metadata", "read_metadata"]

log = logging.getLogger(__name__)

_FILES = ("metadata.csv", "metadata.jsonl")
_MAX_BYTES = 2**29  # 100 bytes for each of five million files
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})")


def number_classes(
    found: Mapping[Any, str], given: Sequence[str] | None, *, label_field: str
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Returns the class names, and the class number of each label.

    Integers are class numbers. Texts are class names: in the order of ``given``, or sorted.

    Args:
        found: Labels, all int or all str, and the row of each one for error messages.
        given: Class names from the user; None if they are not given.
        label_field: Column of the labels, for error messages.

    Raises:
        ValueError: if a label is not a class, or there are more than 100,000 classes.
    """
    limit = MAX_CLASSES if given is None else len(given)
    if all(isinstance(label, int) for label in found):
        rule = f"in [0, {limit})"
        wrong = [label for label in sorted(found) if not 0 <= label < limit]
        numbers = {label: label for label in found}
        classes = tuple(given or map(str, range(1 + max(found, default=0)))) if not wrong else ()
    else:
        rule = "one of the class names"
        classes = tuple(given or sorted(found))
        numbers = {name: number for number, name in enumerate(classes)}
        wrong = sorted(found.keys() - numbers.keys())
    if wrong:
        raise ValueError(f"{found[wrong[0]]}: {label_field} must be {rule}, got {shorten(wrong[0])}")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{found[classes[0]]}: {label_field} must be one of at most {MAX_CLASSES} classes, got more")
    return classes, numbers


class Metadata(NamedTuple):
    """The content of a metadata file.

    Args:
        name: Its name inside the source.
        labels: Label of each file, by its name inside the source; a class number or a class name, as text.
        repeated: Names of files with several rows of the same label.
        unused: Names of columns that are not used.
    """

    name: str
    labels: dict[str, str]
    repeated: tuple[str, ...]
    unused: tuple[str, ...]


def find_metadata(entries: Entries, root: str) -> str | None:
    """Returns the name of the metadata file of a folder; None if it has none.

    Args:
        entries: Files of the source.
        root: The folder inside the source, with a trailing ``/``, or an empty string.

    Raises:
        ValueError: if there are two.
    """
    found = [root + name for name in _FILES if root + name in entries.sizes]
    if len(found) > 1:
        raise ValueError(f"source {printable(entries.path)} must have one metadata file, got {' and '.join(found)}")
    return found[0] if found else None


def read_metadata(entries: Entries, name: str, *, label_field: str) -> Metadata:
    """Reads a metadata file.

    Args:
        entries: Files of the source.
        name: Name of the metadata file inside the source.
        label_field: Column of the labels.

    Raises:
        ValueError: if it is damaged or too large, lacks a column or a value, names a file outside its folder, or has
            two labels for one file.
    """
    shown = f"metadata {printable(entries.path / name)}"
    try:
        text = entries.read(name, limit=_MAX_BYTES).decode("utf-8-sig")  # Excel writes a BOM
        rows = list((_csv_rows if name.endswith(".csv") else _json_rows)(text))
    except EntryError as error:
        raise ValueError(f"{shown} {error}") from error
    except (ValueError, csv.Error, RecursionError, OSError) as error:
        kind = "a CSV table" if name.endswith(".csv") else "one JSON object per line"
        raise ValueError(f"{shown} must be UTF-8 text with {kind}, got: {printable(error)}") from error
    columns = dict.fromkeys(column for _, values in rows for column in values)
    for field in ("file_name", label_field):
        if field not in columns:
            got = ", ".join(map(printable, columns)) or "no rows"
            hint = "; set it with --label-field, or remove the file to take the classes from folders"
            raise ValueError(f"{shown} must have a column {field!r}, got {got}{hint * (field != 'file_name')}")
    folder = name.rpartition("/")[0]
    labels, repeated = dict[str, str](), list[str]()
    for line, values in rows:
        where = f"{shown}: line {line}"
        file = _file_name(values.get("file_name"), folder, where)
        label = _label(values.get(label_field), label_field, where)
        if file in labels:
            repeated.append(file)
        if labels.setdefault(file, label) != label:
            got = f"{shorten(labels[file])} and {shorten(label)}"
            raise ValueError(f"{where}: {printable(file)} must have one label, got {got}")
    return Metadata(name, labels, tuple(repeated), tuple(sorted(columns.keys() - {"file_name", label_field})))


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
    if not isinstance(name, str) or not parts or ".." in parts or name.startswith("/"):
        wanted = "a path inside the folder of the metadata file"
        raise ValueError(f"{where}: file_name must be {wanted}, got {shorten(name)}")
    return "/".join([folder, *parts] if folder else parts)


def _label(value: Any, field: str, where: str) -> str:
    if type(value) not in (int, str) or not str(value).strip():  # bool is a subclass of int
        raise ValueError(f"{where}: {field} must be a class name or a class number, got {shorten(value)}")
    return str(value).strip()


def number_metadata(
    parts: Sequence[Metadata], given: Sequence[str] | None, *, label_field: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the class names, and the class number of each file.

    If every label is a whole number, labels are class numbers. Else they are class names; if some of them are such
    numbers, a warning says so.

    Args:
        parts: Contents of the metadata files.
        given: Class names from the user; None if they are not given.
        label_field: Column of the labels, for messages.

    Raises:
        ValueError: See ``number_classes``.
    """
    labels = {file: label for part in parts for file, label in part.labels.items()}
    found: dict[Any, str] = {}
    for part in parts:
        for file, label in part.labels.items():
            if label not in found:
                found[label] = f"metadata {part.name}: {printable(file)}"
    others = sorted(label for label in found if not _NUMBER.fullmatch(label))
    if not others:
        classes, numbers = number_classes(
            {int(label): row for label, row in found.items()}, given, label_field=label_field
        )
        return classes, {file: numbers[int(label)] for file, label in labels.items()}
    if given is None and len(others) < len(found):
        log.warning(
            "%s: %s is %s, which is no class number; so all labels are class names, also numbers such as %s",
            *(found[others[0]], label_field, shorten(others[0]), printable(min(found.keys() - {*others}))),
        )
    classes, numbers = number_classes(found, given, label_field=label_field)
    return classes, {file: numbers[label] for file, label in labels.items()}

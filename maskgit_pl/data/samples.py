"""Samples, their labels and their class names: the interface that all sources and the readers of tars share.

Imports neither torch nor PIL.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from maskgit_pl.data.image_bytes import UnreadableImageError, check_complete
from maskgit_pl.data.images import parse_image_header
from maskgit_pl.data.manifest import Split
from maskgit_pl.files import parse_any_json, read_text
from maskgit_pl.text import printable, shorten

MAX_CLASSES = 100_000  # upper limit if no class names are given
_MAX_NAMES_BYTES = 2**24  # 160 bytes for each of these classes

_SPLITS = {"val": "validation|valid|val", "test": "test", "train": "train|training"}  # words in names, in this order
_LABEL = re.compile(rb"\s*(0|[1-9][0-9]{0,8})\s*")
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # by the format of the content, not by the file's name


class Sample(NamedTuple):
    """An image and its label."""

    data: bytes  # of the image file
    extension: str  # png, jpg or webp
    label: int  # in [0, num_classes)
    name: str  # in error messages


class UnreadableSample(NamedTuple):
    """An image that cannot be read, in place of its sample; ``error`` names the image and gives the reason."""

    error: str


class Source(Protocol):
    """The interface of a source of samples, as ``writer.make_shards`` uses it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; label i is ``classes[i]``."""

    @property
    def counts(self) -> dict[Split, int]:
        """The number of samples of each split."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON values that identify the samples: they differ if any sample differs."""

    @property
    def left_out(self) -> Sequence[str]:
        """The files of the source that are not samples, one line per kind of file."""

    def samples(self, split: Split, places: range) -> Iterator[Sample | UnreadableSample]:
        """Yields samples of a split.

        Args:
            split: ``"train"`` or ``"val"``.
            places: Range of places in the order of the split, which is always the same.
        """


def read_sample(read: Callable[[], bytes], *, label: int, name: str) -> Sample | UnreadableSample:
    """Reads an image file and checks, without decoding it, that its header is valid and that it is complete.

    Returns:
        The sample, or an ``UnreadableSample`` with the reason.
    """
    try:
        data = read()
        # The image's own format decides the extension; the pixels are not decoded.
        header = parse_image_header(data, name=name)
        check_complete(data, name=name)
    except UnreadableImageError as error:
        return UnreadableSample(str(error))
    return Sample(data, _EXTENSIONS[header.format], label, name)


def split_of(name: str) -> str | None:
    """Returns ``"train"``, ``"val"`` or ``"test"`` by the word for it in the name of a file; None without one."""
    for split, words in _SPLITS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", name.lower()):
            return split
    return None


def is_val(digest: bytes, fraction: float) -> bool:
    """Returns True for a fraction of the samples, in (0, 1), which are val.

    The hash of the sample's name, at least 8 bytes, decides, so adding samples never moves others between splits.
    """
    # The last 8 bytes as a uniform integer in [0, 2^64).
    return int.from_bytes(digest[-8:], "big") < math.ceil(fraction * 2**64)


@dataclass(frozen=True)
class Labels:
    """The source of labels.

    Args:
        source: ``"cls"``: a ``.cls`` member with a decimal class number. ``"json:FIELD"``: that field of the
            ``.json`` member, a class number or a class name. ``"none"``: no labels; all images have class 0.
        classes: Class names; None if they are unknown, then any number below 100,000 is a class.
    """

    source: str = "cls"
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cls|none|json:.+", self.source):
            raise ValueError(f"labels must be cls, json:FIELD or none, got {shorten(self.source)}")

    @property
    def extension(self) -> str | None:
        """The extension of the members that hold labels; None without labels."""
        return None if self.source == "none" else self.source.partition(":")[0]

    def read(self, data: bytes, *, name: str) -> int:
        """Reads a class number from the bytes of a ``.cls`` or ``.json`` member."""
        text = data if self.source == "cls" else self._read_field(data, name)
        match = _LABEL.fullmatch(text)  # unlike int(), rejects 1_000 and -1
        num_classes = MAX_CLASSES if self.classes is None else len(self.classes)
        if match is None or int(match[1]) >= num_classes:
            names = "" if self.source == "cls" else " or one of the class names"
            raise ValueError(f"label {name} must be a class number in [0, {num_classes}){names}, got {text[:40]!r}")
        return int(match[1])

    def _read_field(self, data: bytes, name: str) -> bytes:
        """Returns the field of a ``.json`` member as it is printed; of a class name, the class number."""
        field_name = self.source.partition(":")[2]
        try:
            value = parse_any_json(data, name)[field_name]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"label {name} must be a JSON object with {field_name!r}, got {data[:40]!r}") from error
        if isinstance(value, str) and value in (self.classes or ()):
            value = (self.classes or ()).index(value)
        return repr(value).encode(errors="backslashreplace")


def number_classes(
    first_row: Mapping[Any, str], class_names: Sequence[str] | None, *, label_field: str
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Returns the class names, and the class number of each label.

    Integers are class numbers. Texts are class names: in the order of ``class_names``, or sorted.

    Args:
        first_row: Labels, all int or all str, and the first row of each one for error messages.
        class_names: Class names from the user; None if they are not given.
        label_field: Column of the labels, for error messages.
    """
    limit = MAX_CLASSES if class_names is None else len(class_names)
    if all(isinstance(label, int) for label in first_row):
        rule = f"in [0, {limit})"
        invalid = [label for label in sorted(first_row) if not 0 <= label < limit]
        numbers = {label: label for label in first_row}
        classes = tuple(class_names or map(str, range(1 + max(first_row, default=0)))) if not invalid else ()
    else:
        rule = "one of the class names"
        classes = tuple(class_names or sorted(first_row))
        numbers = {name: number for number, name in enumerate(classes)}
        invalid = sorted(first_row.keys() - numbers.keys())
    if invalid:
        raise ValueError(f"{first_row[invalid[0]]}: {label_field} must be {rule}, got {shorten(invalid[0])}")
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"{next(iter(first_row.values()))}: {label_field} must be one of at most {MAX_CLASSES} classes, got more"
        )
    check_class_lines(next(iter(first_row.values()), "classes"), classes)
    return classes, numbers


def check_class_lines(where: str, classes: Sequence[str]) -> None:
    """Checks that the names of classes can be lines of a text file."""
    for name in classes:
        if not name or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise ValueError(
                f"{where}: a class must have a UTF-8 name on one line, got '{printable(name)}'; rename it, or use a "
                "UTF-8 locale, such as LC_ALL=C.UTF-8"
            )
    if len(set(classes)) < len(classes):
        raise ValueError(f"{where}: each class must have another name, got {shorten(classes)}")


def parse_class_names(text: str) -> list[str]:
    """Parses class names, in the order of their labels.

    Args:
        text: Names separated by commas, or the path of a UTF-8 file with one name per line.
    """
    if os.path.isfile(text):  # Path.is_file() raises an error if many names make a path that is too long
        lines = read_text(Path(text), max_bytes=_MAX_NAMES_BYTES).splitlines()
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [name.strip() for name in text.split(",")]
    check_class_lines("class names", names)
    return names

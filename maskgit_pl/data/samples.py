"""Samples and their labels: the interface that all sources share, and the images that cannot be read in training.

An unreadable image is replaced by the next readable one of its split (index + 1, + 2, ... modulo n), with its label.
The replacement is thus a function of the data and the index: equal on all ranks and workers, and after a resume.
Workers report replacements; the training process counts and lists them, and too many of them end the run.

Used by the sources, ``writer``, ``scan``, streams and the data modules. Imports neither torch nor PIL.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import shorten
from maskgit_pl.data.image_bytes import Reason, UnreadableImageError, check_complete
from maskgit_pl.data.images import parse_image_header
from maskgit_pl.data.manifest import Split, read_manifest_summary
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.files import parse_any_json, write_text

__all__ = [
    "ALWAYS_ALLOWED",
    "MAX_CLASSES",
    "MAX_IN_A_ROW",
    "Labels",
    "Sample",
    "Source",
    "Unreadable",
    "UnreadableImages",
    "UnreadableSample",
    "find_class_names",
    "is_val",
    "parse_class_names",
    "read_sample",
    "write_unreadable",
]

MAX_CLASSES = 100_000  # upper limit if no class names are given
ALWAYS_ALLOWED = 10  # different images; so few never end a run, even with little data
MAX_IN_A_ROW = 100  # so many consecutive images mean that a shard is damaged

_LABEL = re.compile(rb"\s*(0|[1-9][0-9]{0,8})\s*")
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # by the format of the content, not by the file's name
_MAX_LISTED = 20  # images in an error message; the JSON file lists all


class Sample(NamedTuple):
    """An image and its label.

    Args:
        data: Bytes of the image file.
        extension: ``"png"``, ``"jpg"`` or ``"webp"``.
        label: Class in [0, num_classes).
        name: The sample's name in error messages.
        vector: Bytes of the ``.npy`` file of its vector; None if it has none.
    """

    data: bytes
    extension: str
    label: int
    name: str
    vector: bytes | None = None


class UnreadableSample(NamedTuple):
    """An image that cannot be read, in place of its sample.

    Args:
        error: One line that names the image and gives the reason.
    """

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

    Args:
        read: Returns the bytes of the file.
        label: Label of the sample.
        name: The sample's name in error messages.

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
    except OSError as error:
        return UnreadableSample(f"image {name} cannot be read: {error.strerror}")
    return Sample(data, _EXTENSIONS[header.format], label, name)


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
        source: ``"cls"``: a ``.cls`` member with a decimal class number. ``"json:FIELD"``: that field of the ``.json``
            member, a class number or a class name. ``"none"``: no labels; all images have class 0.
        classes: Class names; None if they are unknown, then any number below 100,000 is a class.

    Raises:
        ValueError: if ``source`` is none of these.
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
        """Reads a class number from the bytes of a label member.

        Args:
            data: Bytes of the ``.cls`` or ``.json`` member.
            name: The member's name in error messages.

        Raises:
            ValueError: if the bytes are not a class.
        """
        text = data if self.source == "cls" else self._read_field(data, name)
        match = _LABEL.fullmatch(text)  # unlike int(), rejects 1_000 and -1
        if match is None:
            raise ValueError(f"label {name} must be a decimal class number, got {text[:40]!r}")
        label, num_classes = int(match[1]), MAX_CLASSES if self.classes is None else len(self.classes)
        if label >= num_classes:
            raise ValueError(f"label {name} must be a class in [0, {num_classes}), got {label}")
        return label

    def _read_field(self, data: bytes, name: str) -> bytes:
        """Returns the decimal class number in the field of a ``.json`` member."""
        field_name = self.source.partition(":")[2]
        try:
            value = parse_any_json(data, name)[field_name]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"label {name} must be a JSON object with {field_name!r}, got {data[:40]!r}") from error
        if isinstance(value, str) and value in (self.classes or ()):
            value = (self.classes or ()).index(value)
        if type(value) is not int:  # bool is a subclass of int
            raise ValueError(
                f"label {name}: {field_name!r} must be a class number or one of the class names, got {value!r:.40}"
            )
        return b"%d" % value


def parse_class_names(given: str) -> list[str]:
    """Parses class names, in the order of their labels.

    Args:
        given: Names separated by commas, or the path of a UTF-8 file with one name per line.

    Raises:
        ValueError: if a name is empty or repeated, or the file is not text.
    """
    is_file = os.path.isfile(given)  # Path.is_file() raises an error if many names make a path that is too long
    names = _read_lines(Path(given)) if is_file else [name.strip() for name in given.split(",")]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if not all(names) or doubled:
        raise ValueError(f"class names must be unique and not empty, got {shorten(doubled[0] if doubled else given)}")
    return names


def find_class_names(folder: Path) -> list[str] | None:
    """Returns the class names of a data folder's manifests.

    Returns:
        The names; None if there is no valid manifest, or its names are only numbers or one name.
    """
    try:
        names = read_manifest_summary(folder).classes
    except (FileNotFoundError, ValueError):
        return None
    # Numbers and the name of unlabelled data were not given by a user.
    return None if names == tuple(map(str, range(len(names)))) or len(names) == 1 else list(names)


class Unreadable(NamedTuple):
    """An image that cannot be read.

    Args:
        index: Number of the sample in its split.
        shard: File name of its tar.
        name: The image's name in messages, ``SHARD:MEMBER``.
        reason: Kind of the fault.
        error: Message of the decoder.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    shard: str
    name: str
    reason: Reason
    error: str


class UnreadableImages:
    """A counter of the unreadable images of a split, which ends the run if there are too many.

    The counts begin at 0 in each process, also after a resume.

    Args:
        explain: Maps the number of an unreadable sample to a description; called once per image.
        num_samples: Number of samples in the split, n.
        budget: Fraction of the samples seen that may be unreadable, in [0, 1]. Above 0, 10 different images are always
            allowed; 0 allows none.
    """

    def __init__(self, explain: Callable[[int], Unreadable], *, num_samples: int, budget: float) -> None:
        self.budget = budget
        self.num_samples = num_samples
        self.seen = 0
        self.times: Counter[int] = Counter()  # index -> number of times it was drawn
        self.images: dict[int, Unreadable] = {}
        self._explain = explain

    @property
    def count(self) -> int:
        """The number of times that an unreadable sample was drawn; a sample of two epochs counts twice."""
        return sum(self.times.values())

    def add(self, index: npt.NDArray[np.int64], replacement: npt.NDArray[np.int64]) -> None:
        """Counts the unreadable images of a batch.

        1. Every sample from the drawn one up to its replacement, which is excluded, is unreadable.
        2. A long series of unreadable samples ends the run: a shard is damaged.
        3. More different samples than are always allowed, above the budget, end the run.

        Args:
            index: (B,) int64, the samples drawn.
            replacement: (B,) int64, the samples shown in their place; -1 if the sample itself is shown.

        Raises:
            DataBudgetError: if the run must end. The message lists the images.
        """
        self.seen += len(index)
        row = np.flatnonzero(replacement >= 0)
        if not len(row):
            return
        # 1. A sample that is its own replacement: all n were tried.
        longest = 0
        for drawn, shown in zip(index[row].tolist(), replacement[row].tolist(), strict=True):
            length = (shown - drawn) % self.num_samples or self.num_samples
            longest = max(longest, length)
            for number in (place % self.num_samples for place in range(drawn, drawn + length)):
                self.times[number] += 1
                if number not in self.images:
                    self.images[number] = self._explain(number)
        # 2.
        if longest >= min(MAX_IN_A_ROW, self.num_samples):
            raise self._error(f"{longest} images in a row cannot be read")
        # 3.
        allowed = ALWAYS_ALLOWED if self.budget > 0 else 0
        if len(self.images) > allowed and self.count > self.budget * self.seen:
            raise self._error(
                f"unreadable images must be at most {self.budget:g} of all images, or {allowed} in total, "
                f"got {len(self.images)} ({self.count} times in {self.seen} images)"
            )

    def by_shard(self) -> dict[str, int]:
        """Returns the number of times that images of each shard could not be read, in descending order."""
        return self._count_by(lambda image: image.shard)

    def by_reason(self) -> dict[str, int]:
        """Returns the number of times that images could not be read for each reason, in descending order."""
        return self._count_by(lambda image: image.reason)

    def as_json(self) -> dict[str, Any]:
        """Returns the counts and the list of all images as JSON values."""
        images = [
            {"image": image.name, "index": index, "times": self.times[index]}
            | {"reason": image.reason, "error": image.error}
            for index, image in sorted(self.images.items())
        ]
        counts = {"shards": self.by_shard(), "reasons": self.by_reason()}
        return {"seen": self.seen, "unreadable": self.count, **counts, "images": images}

    def _count_by(self, key: Callable[[Unreadable], str]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for index, times in self.times.items():
            counts[key(self.images[index])] += times
        return dict(counts.most_common())

    def _error(self, rule: str) -> DataBudgetError:
        lines = [f"{image.name}: {image.reason}: {image.error}" for _, image in sorted(self.images.items())]
        more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        listed = "\n  ".join([*lines[:_MAX_LISTED], *more])
        return DataBudgetError(
            f"data budget: {rule}:\n  {listed}\n"
            "repair or leave out these images and make the shards again, or raise data.unreadable_budget"
        )


def write_unreadable(path: Path, splits: dict[str, UnreadableImages]) -> None:
    """Writes the counts and lists of all splits as JSON, atomically.

    Args:
        path: The JSON file; its folder is made if it is missing.
        splits: Counters by the names of their splits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: images.as_json() for name, images in splits.items()}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text("utf-8-sig").splitlines()  # Windows writes a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"class names {file} must be UTF-8 text, one name per line: {error}") from error
    return [line.strip() for line in lines if line.strip()]

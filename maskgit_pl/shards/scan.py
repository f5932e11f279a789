"""One tar -> its samples: where each image lies, its label, and all that is wrong with the tar, counted.

Used by the index, which makes manifests of it, and by verify, which compares it with them. Members are grouped as
webdataset groups them: side by side, under the part of the name before the first dot of its last component. Names are
keys and never paths; only images and labels are read, within bounds.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import shorten
from maskgit_pl.files import open_regular, sha256_of
from maskgit_pl.shards.image_bytes import MAX_IMAGE_BYTES, UnreadableImageError
from maskgit_pl.shards.images import ImageHeader, parse_image_header
from maskgit_pl.shards.manifest import INDEX_DTYPE, ImageRange
from maskgit_pl.shards.tar import BLOCK, DamagedTarError, Member, read_members
from maskgit_pl.text import printable

__all__ = [
    "IMAGE_EXTENSIONS",
    "MAX_CLASSES",
    "NO_LABEL",
    "Fault",
    "Labels",
    "ShardScan",
    "format_counts",
    "parse_label",
    "scan_shard",
]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_CLASSES = 100_000  # where no class names say how many there are
_MAX_LABEL_BYTES = 64
_MAX_JSON_BYTES = 2**20
_MAX_FAULTY = _MAX_IGNORED = 100_000
_LABEL = re.compile(rb"\s*(0|[1-9][0-9]{0,8})\s*")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f]|^/|(?:^|/)\.\.(?:/|$)")  # control characters, paths out of a folder
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

# What can be wrong with a sample; each is counted. The texts follow a count.
NO_IMAGE, NO_LABEL = "without an image", "without a label"
TWO_IMAGES, TWO_LABELS = "with two images", "with two labels"
REPEATED, INTERLEAVED = "of a key that comes twice", "whose members do not lie side by side"
BAD_IMAGE, BAD_LABEL = "with an image that cannot be read", "with a label that is no class"
BAD_NAME, BAD_KIND = "with an unsafe member name", "with a link, a device or a sparse file"
_FAULTS = (
    NO_IMAGE, NO_LABEL, TWO_IMAGES, TWO_LABELS, REPEATED, INTERLEAVED, BAD_IMAGE, BAD_LABEL, BAD_NAME, BAD_KIND
)  # fmt: skip
_BIT = {fault: 1 << number for number, fault in enumerate(_FAULTS)}


@dataclass(frozen=True)
class Labels:
    """The source of labels.

    Args:
        source: ``"cls"``: a ``.cls`` member with a decimal class number. ``"json:FIELD"``: that field of the ``.json``
            member, a class number or a class name. ``"none"``: there are none, all images are of one class.
        classes: Class names; None if they are not known, so that any number below 100,000 is a class.
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
        """Reads a class number from a label member's bytes.

        Raises:
            ValueError: It holds no class; ``name`` says where.
        """
        if self.source == "cls":
            return parse_label(data, name=name, num_classes=self._num_classes)
        field_name = self.source.partition(":")[2]
        try:
            value = json.loads(data)[field_name]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"label {name} must be a JSON object with {field_name!r}, got {data[:40]!r}") from error
        if isinstance(value, str) and value in (self.classes or ()):
            return (self.classes or ()).index(value)
        if type(value) is not int:
            raise ValueError(f"label {name}: {field_name!r} must be a class number or a given name, got {value!r:.40}")
        return parse_label(str(value).encode(), name=name, num_classes=self._num_classes)

    @property
    def _num_classes(self) -> int:
        return MAX_CLASSES if self.classes is None else len(self.classes)


def format_counts(ignored: Mapping[str, int]) -> str:
    """Returns how many members have which extension, the most frequent ones, as they may be shown."""
    listed = [f"{count} {printable(extension)}" for extension, count in Counter(ignored).most_common(5)]
    return ", ".join(listed + [f"{len(ignored) - 5} more kinds"] * (len(ignored) > 5))


def parse_label(data: bytes, *, name: str, num_classes: int | None = None) -> int:
    """Reads a class number from the bytes of a ``.cls`` member; ``int()`` would take ``1_000`` and ``-1``.

    Raises:
        ValueError: Not a decimal number, or not below ``num_classes``; ``name`` says where.
    """
    match = _LABEL.fullmatch(data)
    if match is None:
        raise ValueError(f"label {name} must be a decimal class number, got {data[:40]!r}")
    label = int(match[1])
    if num_classes is not None and label >= num_classes:
        raise ValueError(f"label {name} must be a class below {num_classes}, got {label}")
    return label


@dataclass(frozen=True)
class Fault:
    """One kind of fault in a shard: how many samples have it, and the first of them."""

    count: int
    first: str


@dataclass(frozen=True)
class ShardScan:
    """The result of reading one tar.

    Args:
        bytes: Length of the file.
        mtime_ns: When it was last changed.
        sha256: Of the whole file; empty if the tar is damaged or its samples are to be refused.
        rows: (n,) INDEX_DTYPE, the whole samples; ``shard`` is 0.
        images: Range of their sizes; None without any.
        num_keys: Samples with an image, whole or not.
        faults: What is wrong with other samples.
        ignored: Members that belong to no sample, by extension.
        damage: Why the file is not a whole tar; empty if it is.
    """

    bytes: int
    mtime_ns: int
    sha256: str
    rows: npt.NDArray[np.void]
    images: ImageRange | None
    num_keys: int
    faults: dict[str, Fault]
    ignored: dict[str, int]
    damage: str = ""


def scan_shard(path: Path, labels: Labels, *, lenient: bool = True) -> ShardScan:
    """Reads a tar: its labels, its image headers, its hash.

    Args:
        path: The tar.
        labels: Where labels come from.
        lenient: Samples with a fault are left out. If they are to be refused, the scan ends where they are too many
            to be anything but a mistake, and faulty shards are not hashed.

    Raises:
        OSError: if the file cannot be opened or read, or is not a regular file.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        scan = _Scanner(descriptor, path.name, labels, lenient=lenient)
        damage, digest = "", ""
        try:
            for member in read_members(descriptor):
                scan.take(member)
            if scan.is_good or lenient:
                digest = sha256_of(descriptor)
        except DamagedTarError as error:
            damage = str(error)
        return scan.result(status, digest, damage)
    finally:
        os.close(descriptor)


class _Sample:
    """Members of one key that lie side by side."""

    __slots__ = ("faults", "key", "label", "offset", "other", "place", "shape", "size")

    def __init__(self, key: str = "", place: int = -1) -> None:
        self.key = key
        self.place = place  # of its first payload
        self.offset = -1
        self.size = 0
        self.label = -1
        self.shape = -1  # of the image, packed; see _pack
        self.faults = 0  # bits
        self.other: list[str] = []  # extensions of members that are neither image nor label


class _Scanner:
    """The samples gathered member by member; a tar may have millions, so this is where time and memory go."""

    def __init__(self, descriptor: int, shard: str, labels: Labels, *, lenient: bool) -> None:
        self.descriptor, self.shard, self.labels, self.lenient = descriptor, shard, labels, lenient
        self.label_extension = labels.extension
        self.sample = _Sample()
        # hash of the key, place, offset, size, label, shape, faults: 56 bytes a sample, where an object takes 500
        self.runs = array("q")
        self.first: dict[str, str] = {}  # what the first sample of a fault is told of
        self.ignored: Counter[str] = Counter()
        self.num_faulty = self.num_ignored = 0

    def take(self, member: Member) -> None:
        """Takes one member after the other."""
        if member.kind == "folder":
            return
        match = _NAME.fullmatch(member.name)
        key, extension = match.groups() if match else (member.name, "")
        extension = extension.lower()
        if key != self.sample.key or self.sample.place < 0:
            self._finish()
            self.sample = _Sample(key, member.offset)
        is_image = extension in IMAGE_EXTENSIONS
        if not is_image and extension != self.label_extension:
            self.sample.other.append(extension)
        elif fault := _member_fault(member):
            self._add_fault(fault, member)
        elif is_image:
            self._take_image(member)
        else:
            self._take_label(member)

    @property
    def is_good(self) -> bool:
        """True if there are samples without a fault, once there is no more member."""
        self._finish()
        return bool(self.runs) and not self.num_faulty

    def result(self, status: os.stat_result, digest: str, damage: str) -> ShardScan:
        """Returns what was found, once there is no more member."""
        if not damage:
            self._finish()
        # not a copy, which a million samples would be worth avoiding; NumPy takes no empty buffer
        runs = np.frombuffer(self.runs or array("q", [0]), np.int64)[: len(self.runs)].reshape(-1, 7)
        keys, _, offsets, sizes, labels, shapes, bits = runs.T
        bits, repeated = self._mark_repeated(keys, bits, runs)
        whole = bits == 0
        rows = np.zeros(int(whole.sum()), INDEX_DTYPE)
        for name, column in (("offset", offsets), ("size", sizes), ("label", labels)):
            rows[name] = column[whole]
        return ShardScan(
            bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            sha256=digest,
            rows=rows,
            images=_image_range(shapes[whole]),
            num_keys=len(np.unique(keys[offsets >= 0])),
            faults=self._count(bits, runs) | repeated,
            ignored=dict(self.ignored),
            damage=damage,
        )

    def _take_image(self, member: Member) -> None:
        if self.sample.offset >= 0:
            self._add_fault(TWO_IMAGES, member)
            return
        self.sample.offset, self.sample.size = member.offset, member.size
        if not 0 < member.size <= MAX_IMAGE_BYTES:
            self._add_fault(BAD_IMAGE, member, f"1 to {MAX_IMAGE_BYTES} bytes are read, got {member.size}")
            return
        try:
            header = parse_image_header(self._payload(member), name=self._member_label(member))
        except UnreadableImageError as error:
            self._add_fault(BAD_IMAGE, member, str(error))
        else:
            self.sample.shape = _pack(header)

    def _take_label(self, member: Member) -> None:
        if self.sample.label >= 0 or self.sample.faults & _BIT[BAD_LABEL]:
            self._add_fault(TWO_LABELS, member)
            return
        most = _MAX_LABEL_BYTES if self.labels.source == "cls" else _MAX_JSON_BYTES
        if member.size > most:
            self._add_fault(BAD_LABEL, member, f"at most {most} bytes are read, got {member.size}")
            return
        try:
            self.sample.label = self.labels.read(self._payload(member), name=self._member_label(member))
        except ValueError as error:
            self._add_fault(BAD_LABEL, member, str(error))

    def _payload(self, member: Member) -> bytes:
        return os.pread(self.descriptor, member.size, member.offset)

    def _finish(self) -> None:
        """Closes the sample that is open."""
        sample = self.sample
        if sample.place < 0:
            return
        self.sample = _Sample()
        has_label = sample.label >= 0 or bool(sample.faults & _BIT[BAD_LABEL])
        is_sample = sample.offset >= 0 or has_label or bool(sample.faults)
        for extension in sample.other:
            if not is_sample or extension not in ("txt", "json", "cls"):
                self.ignored[f".{extension}"] += 1
                self.num_ignored += 1
        if self.num_ignored > _MAX_IGNORED:
            raise DamagedTarError(f"more than {_MAX_IGNORED} members that are no images: {format_counts(self.ignored)}")
        if not is_sample:
            return
        if self.label_extension is None:
            sample.label, has_label = 0, True
        if not sample.faults:
            sample.faults = (0 if has_label else _BIT[NO_LABEL]) | (0 if sample.offset >= 0 else _BIT[NO_IMAGE])
        self.num_faulty += sample.faults != 0
        if self.num_faulty > _MAX_FAULTY and not self.lenient:
            first = next(iter(self.first.values()), printable(sample.key))
            raise DamagedTarError(f"more than {_MAX_FAULTY} samples with a fault (first {first})")
        key = hash(sample.key)
        self.runs.extend((key, sample.place, sample.offset, sample.size, sample.label, sample.shape, sample.faults))

    def _add_fault(self, fault: str, member: Member, reason: str = "") -> None:
        self.sample.faults |= _BIT[fault]
        if fault not in self.first:
            called = self._member_label(member)
            self.first[fault] = called if not reason else reason if called in reason else f"{called}: {reason}"

    def _member_label(self, member: Member) -> str:
        return f"{self.shard}:{printable(member.name)}"

    def _mark_repeated(
        self, keys: npt.NDArray[np.int64], bits: npt.NDArray[np.int64], runs: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], dict[str, Fault]]:
        """Keys whose members come in several places: whole samples each (repeated) or parts (interleaved)."""
        if len(np.unique(keys)) == len(keys):
            return bits, {}
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        many = counts[inverse] > 1
        halves = _BIT[NO_IMAGE] | _BIT[NO_LABEL]
        in_parts = np.zeros(len(counts), bool)
        in_parts[inverse[many & (bits & halves != 0)]] = True
        parts = in_parts[inverse]
        bits = np.where(parts, bits & ~halves | _BIT[INTERLEAVED], bits)
        bits = np.where(many & ~parts, bits | _BIT[REPEATED], bits)
        found = {}
        for fault, chosen in ((REPEATED, many & ~parts), (INTERLEAVED, parts)):
            if chosen.any():
                found[fault] = Fault(len(np.unique(keys[chosen])), self._member_label_at(int(runs[chosen.argmax(), 1])))
        return bits, found

    def _count(self, bits: npt.NDArray[np.int64], runs: npt.NDArray[np.int64]) -> dict[str, Fault]:
        found = {}
        for fault in _FAULTS:
            chosen = bits & _BIT[fault] != 0
            if chosen.any() and fault not in (REPEATED, INTERLEAVED):
                first = self.first.get(fault) or self._member_label_at(int(runs[chosen.argmax(), 1]))
                found[fault] = Fault(int(chosen.sum()), first)
        return found

    def _member_label_at(self, place: int) -> str:
        """Names a sample by its first member's header, which lies before its payload."""
        name = os.pread(self.descriptor, 100, place - BLOCK).partition(b"\0")[0]
        return f"{self.shard}:{printable(name.decode('utf-8', 'surrogateescape'))}"


def _pack(header: ImageHeader) -> int:
    """Packs height, width and channels into one number; a side of 64 million pixels has 26 bits."""
    return header.height << 30 | header.width << 3 | header.channels


def _image_range(shapes: npt.NDArray[np.int64]) -> ImageRange | None:
    if not len(shapes):
        return None
    heights, widths, channels = shapes >> 30, shapes >> 3 & (1 << 27) - 1, np.unique(shapes & 7)
    return ImageRange(
        height=(int(heights.min()), int(heights.max())),
        width=(int(widths.min()), int(widths.max())),
        channels=tuple(channels.tolist()),
    )


def _member_fault(member: Member) -> str | None:
    if _UNSAFE.search(member.name):
        return BAD_NAME
    return None if member.kind == "file" else BAD_KIND

"""Scan of one tar: the position of each image and vector, its label, and a count of each kind of fault.

Used by ``index``, which writes manifests from scans.

1. Walk the members of the tar; see ``tar.read_members``.
2. Group consecutive members by key, as webdataset does: the key is the name up to the first dot of its last component.
   Members without a key are passed over.
3. Read the header of each image, each label and each vector (``.npy``), within limits on their size; no other member
   is read.
4. Note the faults of each sample as bits, and close the sample when the key changes.
5. At the end, find keys that occur more than once, and count the faults.

Names are used as keys only, never as paths.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.images import ImageHeader, parse_image_header
from maskgit_pl.data.manifest import INDEX_DTYPE, ImageRange
from maskgit_pl.data.samples import Labels
from maskgit_pl.data.tar import BLOCK, DamagedTarError, DescriptorBytes, Member, member_label, read_members
from maskgit_pl.data.vectors import MAX_VECTOR_BYTES, VECTOR_EXTENSION, VectorKind, parse_vector
from maskgit_pl.errors import printable
from maskgit_pl.files import open_regular, sha256_of

__all__ = [
    "BAD_VECTOR",
    "IMAGE_EXTENSIONS",
    "NO_LABEL",
    "NO_VECTOR",
    "Fault",
    "ShardScan",
    "format_counts",
    "require_vectors",
    "scan_shard",
]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MAX_LABEL_BYTES = 64  # a .cls member has one number
_MAX_JSON_BYTES = 2**20
_COLUMNS = 8  # of the scanner's table
_MAX_FAULTY = _MAX_IGNORED = 100_000  # more than this is a wrong file, not a few bad samples
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f]|^/|(?:^|/)\.\.(?:/|$)")  # control characters, paths out of a folder
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

# Faults of a sample, after a count in messages. Keys of ``left_out``: a manifest's fingerprint depends on these words.
NO_IMAGE, NO_LABEL = "without an image", "without a label"
TWO_IMAGES, TWO_LABELS = "with two images", "with two labels"
REPEATED, INTERLEAVED = "of a key that comes twice", "whose members do not lie side by side"
BAD_IMAGE, BAD_LABEL = "with an image that cannot be read", "with a label that is no class"
BAD_NAME, BAD_KIND = "with an unsafe member name", "with a link, a device or a sparse file"
TWO_VECTORS, BAD_VECTOR = "with two vectors", "with a vector that cannot be used"
NO_VECTOR = "without a vector"  # a fault only if other samples have vectors; see ``require_vectors``
_FAULTS = (
    NO_IMAGE, NO_LABEL, TWO_IMAGES, TWO_LABELS, REPEATED, INTERLEAVED, BAD_IMAGE, BAD_LABEL, BAD_NAME, BAD_KIND,
    TWO_VECTORS, BAD_VECTOR,
)  # fmt: skip
_BIT = {fault: 1 << number for number, fault in enumerate(_FAULTS)}  # a sample's faults are one integer


def format_counts(ignored: Mapping[str, int]) -> str:
    """Returns the five most frequent extensions with their counts, safe to print: ``12 .txt, 3 .npy``."""
    listed = [f"{count} {printable(extension)}" for extension, count in Counter(ignored).most_common(5)]
    return ", ".join(listed + [f"{len(ignored) - 5} more kinds"] * (len(ignored) > 5))


@dataclass(frozen=True)
class Fault:
    """A kind of fault in a shard.

    Args:
        count: Number of samples with this fault.
        first: Name of the first of them, with the reason if there is one.
    """

    count: int
    first: str


@dataclass(frozen=True)
class ShardScan:
    """The result of scanning one tar.

    Args:
        bytes: Length of the file.
        sha256: Hash of the whole file, hex; empty if the tar is damaged or its samples are to be rejected.
        rows: (n,) INDEX_DTYPE, the samples without a fault; ``shard`` is 0.
        images: Range of their sizes; None without samples.
        num_keys: Number of samples that have an image, with or without a fault.
        faults: Faults of the other samples.
        ignored: Number of members that belong to no sample, by extension.
        vectors: (n,) int64: position of the first value of each sample's vector in the file, -1 without a vector.
        vector_kind: Size and type of the vectors; None if there are none.
        without_vector: Name of the first sample of ``rows`` without a vector; empty if there is none.
        damage: The reason if the file is not a complete tar, else empty.
    """

    bytes: int
    sha256: str
    rows: npt.NDArray[np.void]
    images: ImageRange | None
    num_keys: int
    faults: dict[str, Fault]
    ignored: dict[str, int]
    vectors: npt.NDArray[np.int64]
    vector_kind: VectorKind | None = None
    without_vector: str = ""
    damage: str = ""


def require_vectors(scan: ShardScan) -> ShardScan:
    """Returns a scan whose samples without a vector have a fault, for data whose other samples have vectors."""
    has_vector = scan.vectors >= 0
    count = int((~has_vector).sum())
    if not count:
        return scan
    faults = scan.faults | {NO_VECTOR: Fault(count, scan.without_vector)}
    return replace(scan, rows=scan.rows[has_vector], vectors=scan.vectors[has_vector], faults=faults)


def scan_shard(
    path: Path,
    labels: Labels,
    *,
    lenient: bool = True,
    vectors: bool = True,
) -> ShardScan:
    """Scans a tar: reads its labels, image headers and vectors, and hashes it.

    Args:
        path: The tar.
        labels: Source of the labels.
        lenient: True if samples with a fault will be left out. False if they will be rejected; then the scan stops
            after 100,000 of them, and a shard with faults is not hashed.
        vectors: True to read ``.npy`` members as vectors; False ignores them.

    Raises:
        OSError: if the file cannot be opened or read, or is not a regular file.
    """
    descriptor = open_regular(path)
    try:
        scan = _Scanner(descriptor, path.name, labels, lenient=lenient, vectors=vectors)
        damage, digest = "", ""
        try:
            for member in read_members(DescriptorBytes(descriptor)):
                scan.take(member)
            # A second pass over the file, only if the hash will be used.
            if scan.has_no_faults() or lenient:
                digest = sha256_of(descriptor)
        except DamagedTarError as error:
            damage = str(error)
        return scan.result(os.fstat(descriptor).st_size, digest, damage)
    finally:
        os.close(descriptor)


class _Sample:
    """A sample: consecutive members with the same key."""

    __slots__ = ("faults", "key", "label", "offset", "other", "place", "shape", "size", "taken", "vector")

    def __init__(self, key: str = "", place: int = -1) -> None:
        self.key = key
        self.place = place  # offset of the first member's payload; -1 before the first member
        self.offset = -1  # of the image's payload; -1 without an image
        self.size = 0
        self.label = -1
        self.shape = -1  # height, width and channels of the image, packed; see _pack
        self.vector = -1  # offset of the first value of the vector; -1 without a vector
        self.faults = 0  # bits, see _BIT
        self.taken = 0  # the parts that have been read, as the bits of their faults
        self.other: list[str] = []  # extensions of members that are no part


class _Part(NamedTuple):
    """A kind of member that is read: image, label or vector.

    Args:
        limit: Maximum size in bytes.
        read: Takes a member, its bytes, and its name for errors; raises a ``ValueError`` for a bad one.
        bad: Fault of a sample whose member cannot be used.
        twice: Fault of a sample with two of them.
    """

    limit: int
    read: Callable[[Member, bytes, str], None]
    bad: str
    twice: str


class _Scanner:
    """A collector of samples, member by member. A tar may have millions, so time and memory per sample matter here."""

    def __init__(self, descriptor: int, shard: str, labels: Labels, *, lenient: bool, vectors: bool) -> None:
        self.descriptor, self.shard, self.labels, self.lenient = descriptor, shard, labels, lenient
        image = _Part(MAX_IMAGE_BYTES, self._read_image, BAD_IMAGE, TWO_IMAGES)
        limit = _MAX_LABEL_BYTES if labels.source == "cls" else _MAX_JSON_BYTES
        self.parts = dict.fromkeys(IMAGE_EXTENSIONS, image)
        if labels.extension is not None:
            self.parts[labels.extension] = _Part(limit, self._read_label, BAD_LABEL, TWO_LABELS)
        if vectors:
            self.parts[VECTOR_EXTENSION] = _Part(MAX_VECTOR_BYTES, self._read_vector, BAD_VECTOR, TWO_VECTORS)
        self.vector_kind: VectorKind | None = None  # of the first vector
        self.without_vector = ""
        self.sample = _Sample()
        # Rows of (hash of the key, place, offset, size, label, shape, vector, faults): 64 bytes per sample, an object
        # 500.
        self.table = array("q")
        self.first: dict[str, str] = {}  # fault -> message about the first sample with it
        self.ignored: Counter[str] = Counter()
        self.num_faulty = self.num_ignored = 0

    def take(self, member: Member) -> None:
        """Adds the next member of the tar."""
        if member.kind == "folder":
            return
        # 2. Group by key; a new key closes the sample before it.
        match = _NAME.fullmatch(member.name)
        if match is None:  # no key, as in "._0.png", which macOS adds before 0.png; the sample continues after it
            self._ignore("")
            return
        key, extension = match[1], match[2].lower()
        if key != self.sample.key or self.sample.place < 0:
            self._finish()
            self.sample = _Sample(key, member.offset)
        # 3. Read images, labels and vectors; note the extension of any other member.
        part = self.parts.get(extension)
        if part is None:
            self.sample.other.append(extension)
        elif fault := _member_fault(member):
            self._add_fault(fault, member)
        elif self.sample.taken & _BIT[part.bad]:
            self._add_fault(part.twice, member)
        else:
            self._read(member, part)

    def has_no_faults(self) -> bool:
        """Returns whether there are samples and none has a fault; call it after the last member."""
        self._finish()
        return bool(self.table) and not self.num_faulty

    def result(self, size: int, digest: str, damage: str) -> ShardScan:
        """Returns the result of the scan; call it after the last member.

        Args:
            size: Length of the file in bytes.
            digest: Hash of the file, or empty.
            damage: The reason if the tar is damaged, or empty.
        """
        if not damage:  # else the last sample may lack members
            self._finish()
        # A view, since a copy of millions of samples costs memory; NumPy does not take an empty buffer.
        table = np.frombuffer(self.table or array("q", [0]), np.int64)[: len(self.table)].reshape(-1, _COLUMNS)
        keys, _, offsets, sizes, labels, shapes, vectors, bits = table.T  # each (n,) int64
        # 5. Find repeated keys; samples with a fault get no row.
        bits, repeated = self._mark_repeated(keys, bits, table)
        whole = bits == 0
        rows = np.zeros(int(whole.sum()), INDEX_DTYPE)
        for name, column in (("offset", offsets), ("size", sizes), ("label", labels)):
            rows[name] = column[whole]
        return ShardScan(
            bytes=size,
            sha256=digest,
            rows=rows,
            images=_image_range(shapes[whole]),
            num_keys=len(np.unique(keys[offsets >= 0])),
            faults=self._count(bits, table) | repeated,
            ignored=dict(self.ignored),
            vectors=vectors[whole],
            vector_kind=self.vector_kind,
            without_vector=self.without_vector,
            damage=damage,
        )

    def _read(self, member: Member, part: _Part) -> None:
        self.sample.taken |= _BIT[part.bad]
        if not 0 < member.size <= part.limit:
            self._add_fault(part.bad, member, f"size must be 1 to {part.limit} bytes, got {member.size}")
            return
        try:
            part.read(member, os.pread(self.descriptor, member.size, member.offset), self._member_label(member))
        except ValueError as error:
            self._add_fault(part.bad, member, str(error))

    def _read_image(self, member: Member, data: bytes, name: str) -> None:
        self.sample.offset, self.sample.size = member.offset, member.size
        self.sample.shape = _pack(parse_image_header(data, name=name))

    def _read_label(self, member: Member, data: bytes, name: str) -> None:
        self.sample.label = self.labels.read(data, name=name)

    def _read_vector(self, member: Member, data: bytes, name: str) -> None:
        kind, start = parse_vector(data, name=name)
        if kind != (self.vector_kind or kind):
            raise ValueError(f"vector {name} must have {self.vector_kind} as those before it, got {kind}")
        self.sample.vector, self.vector_kind = member.offset + start, kind

    def _finish(self) -> None:
        """Closes the current sample and adds its row."""
        sample = self.sample
        if sample.place < 0:
            return
        self.sample = _Sample()
        if not self._count_ignored(sample):
            return
        if self.labels.extension is None:
            sample.label = 0
        # 4. Missing members are reported only for samples without another fault.
        if not sample.faults:
            sample.faults = (_BIT[NO_LABEL] if sample.label < 0 else 0) | (_BIT[NO_IMAGE] if sample.offset < 0 else 0)
        self.num_faulty += sample.faults != 0
        if sample.vector < 0 and not sample.faults and not self.without_vector:
            self.without_vector = self._member_label_at(sample.place)
        if self.num_faulty > _MAX_FAULTY and not self.lenient:
            first = next(iter(self.first.values()), printable(sample.key))
            raise DamagedTarError(f"more than {_MAX_FAULTY} samples have a fault (first {first})")
        # Hashes are compared within this process only.
        key = hash(sample.key)
        position = (key, sample.place, sample.offset, sample.size)
        self.table.extend((*position, sample.label, sample.shape, sample.vector, sample.faults))

    def _count_ignored(self, sample: _Sample) -> bool:
        """Counts the members that are not read, and returns whether the others are a sample."""
        is_sample = sample.offset >= 0 or sample.label >= 0 or bool(sample.faults)
        if sample.vector >= 0 and not is_sample:
            sample.other.append(VECTOR_EXTENSION)
        # Captions and metadata beside an image are normal; all other members are counted as ignored.
        for extension in sample.other:
            if not is_sample or extension not in ("txt", "json", "cls"):
                self._ignore(extension)
        return is_sample

    def _ignore(self, extension: str) -> None:
        self.ignored[f".{extension}"] += 1
        self.num_ignored += 1
        if self.num_ignored > _MAX_IGNORED:
            raise DamagedTarError(f"more than {_MAX_IGNORED} members are not images: {format_counts(self.ignored)}")

    def _add_fault(self, fault: str, member: Member, reason: str = "") -> None:
        self.sample.faults |= _BIT[fault]
        if fault not in self.first:
            called = self._member_label(member)
            self.first[fault] = called if not reason else reason if called in reason else f"{called}: {reason}"

    def _member_label(self, member: Member) -> str:
        return f"{self.shard}:{printable(member.name)}"

    def _mark_repeated(
        self, keys: npt.NDArray[np.int64], bits: npt.NDArray[np.int64], table: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], dict[str, Fault]]:
        """Marks keys that occur more than once.

        If every occurrence is a complete sample, the key is repeated. If one lacks its image or its label, the parts of
        one sample are apart in the tar: its members are not consecutive.

        Args:
            keys: (n,) int64, hash of each sample's key.
            bits: (n,) int64, faults of each sample.
            table: (n, 8) int64, all columns.

        Returns:
            The faults with these marks, (n,) int64, and a count of each kind; a key counts once.
        """
        if len(np.unique(keys)) == len(keys):  # the usual case, at the price of one sort
            return bits, {}
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        many = counts[inverse] > 1
        halves = _BIT[NO_IMAGE] | _BIT[NO_LABEL]
        in_parts = np.zeros(len(counts), bool)  # by key
        in_parts[inverse[many & (bits & halves != 0)]] = True
        parts = in_parts[inverse]  # by sample
        # "no image" of one part and "no label" of the other are one fault
        bits = np.where(parts, bits & ~halves | _BIT[INTERLEAVED], bits)
        bits = np.where(many & ~parts, bits | _BIT[REPEATED], bits)
        found = {}
        for fault, chosen in ((REPEATED, many & ~parts), (INTERLEAVED, parts)):
            if chosen.any():
                found[fault] = Fault(
                    len(np.unique(keys[chosen])), self._member_label_at(int(table[chosen.argmax(), 1]))
                )
        return bits, found

    def _count(self, bits: npt.NDArray[np.int64], table: npt.NDArray[np.int64]) -> dict[str, Fault]:
        found = {}
        for fault in _FAULTS:
            chosen = bits & _BIT[fault] != 0
            if chosen.any() and fault not in (REPEATED, INTERLEAVED):  # _mark_repeated counts those, once per key
                first = self.first.get(fault) or self._member_label_at(int(table[chosen.argmax(), 1]))
                found[fault] = Fault(int(chosen.sum()), first)
        return found

    def _member_label_at(self, place: int) -> str:
        """Returns ``SHARD:MEMBER`` of a sample's first member."""
        return member_label(self.shard, os.pread(self.descriptor, BLOCK, place - BLOCK), place)


def _pack(header: ImageHeader) -> int:
    """Packs height, width and channels into one integer: channels in 3 bits, width in 27, height above.

    An image has at most 64 million pixels, so a side has at most 26 bits.
    """
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

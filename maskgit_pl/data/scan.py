"""Scan of one tar: the position of each image, its label, and a count of each kind of fault.

Used by ``index``, which writes manifests from scans.

1. Walk the members of the tar; see ``tar.read_members``.
2. Group consecutive members by key, as webdataset does: the key is the name up to the first dot of its last
   component. Members without a key are passed over.
3. Read the header of each image and each label, within limits on their size; no other member is read.
4. Note the faults of each sample as bits.
5. At the end, find keys that occur more than once, and count the faults.

Names are used as keys only, never as paths.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.images import parse_image_header
from maskgit_pl.data.manifest import INDEX_DTYPE, ImageRange
from maskgit_pl.data.samples import Labels
from maskgit_pl.data.tar import BLOCK, DamagedTarError, Member, member_label, read_members
from maskgit_pl.files import open_regular, sha256_of
from maskgit_pl.text import printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MAX_LABEL_BYTES = 64  # a .cls member has one number
_MAX_JSON_BYTES = 2**20
_MAX_FAULTY = 100_000  # more than this is a wrong file, not a few bad samples
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f]|^/|(?:^|/)\.\.(?:/|$)")  # control characters, paths out of a folder
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

# Faults of a sample, after a count in messages. Keys of ``left_out``: a manifest's fingerprint depends on these words,
# so that TWICE still names vectors, which earlier versions read.
NO_IMAGE, NO_LABEL = "without an image", "without a label"
TWICE = "with two images, labels or vectors"
REPEATED = "of a key that comes twice, or whose members do not lie side by side"
BAD_IMAGE, BAD_LABEL = "with an image that cannot be read", "with a label that is no class"
BAD_NAME, BAD_KIND = "with an unsafe member name", "with a link or a device"
_FAULTS = (NO_IMAGE, NO_LABEL, TWICE, REPEATED, BAD_IMAGE, BAD_LABEL, BAD_NAME, BAD_KIND)
_BIT = {fault: 1 << number for number, fault in enumerate(_FAULTS)}  # a sample's faults are one integer

# Columns of the table of a scan; -1 is a missing value. FIRST is the offset of the payload of the first member.
_KEY, _FIRST, _OFFSET, _SIZE, _SHAPE, _LABEL, _BITS = range(7)
_EMPTY_ROW = [0, 0, -1, 0, -1, -1, 0]


class Fault(NamedTuple):
    """The number of samples with a kind of fault, and the name of the first of them, with a reason if there is one."""

    samples: int
    first: str


@dataclass(frozen=True)
class ShardScan:
    """The result of scanning one tar."""

    bytes: int  # length of the file
    sha256: str  # of the whole file, hex; empty if the tar is damaged
    rows: npt.NDArray[np.void]  # (n,) INDEX_DTYPE, the samples without a fault; ``shard`` is 0
    images: ImageRange | None  # of these samples; None without any
    faults: dict[str, Fault]  # of the other samples
    damage: str = ""  # the reason if the file is not a complete tar


def scan_shard(path: Path, labels: Labels) -> ShardScan:
    """Scans a tar: reads its labels and image headers, and hashes it.

    Args:
        path: The tar.
        labels: Source of the labels.
    """
    with open(open_regular(path), "rb") as file:
        scan, damage, digest = _Scan(file.fileno(), path.name, labels), "", ""
        try:
            for key, members in groupby(scan.named_members(), lambda named: named[0]):  # 2.
                scan.add(key, members)
                if scan.num_faulty > _MAX_FAULTY:
                    first = next(iter(scan.first.values()), printable(key))
                    raise DamagedTarError(f"more than {_MAX_FAULTY} samples have a fault (first {first})")
            digest = sha256_of(file.fileno())
        except DamagedTarError as error:
            damage = str(error)
        return scan.result(digest, damage)


class _Part(NamedTuple):
    """A kind of member that is read: image or label."""

    column: int  # first column of its values in the table
    limit: int  # bytes
    read: Callable[[Member, bytes, str], tuple[int, ...]]  # the values, from a member, its bytes and its name
    bad: str  # fault of a sample whose member cannot be used


class _Scan:
    """A collector of samples. A tar may have millions, so time and memory per sample matter here."""

    def __init__(self, descriptor: int, shard: str, labels: Labels) -> None:
        self.descriptor, self.shard, self.labels = descriptor, shard, labels
        image = _Part(_OFFSET, MAX_IMAGE_BYTES, self._read_image, BAD_IMAGE)
        limit = _MAX_LABEL_BYTES if labels.source == "cls" else _MAX_JSON_BYTES
        self.parts = dict.fromkeys(IMAGE_EXTENSIONS, image)
        if labels.extension is not None:
            self.parts[labels.extension] = _Part(_LABEL, limit, self._read_label, BAD_LABEL)
        self.table = array("q")  # a row is 56 bytes, an object would be 500
        self.first: dict[str, str] = {}  # fault -> message about the first sample with it
        self.num_faulty = 0

    def named_members(self) -> Iterator[tuple[str, str, Member]]:
        """Yields key, extension and member of the members that have a key."""
        for member in read_members(self.descriptor):  # 1.
            # Without a key: as "._0.png", which macOS adds before 0.png; the sample continues after it.
            if member.kind != "folder" and (match := _NAME.fullmatch(member.name)):
                yield match[1], match[2].lower(), member

    def add(self, key: str, members: Iterable[tuple[str, str, Member]]) -> None:
        """Reads the parts of a sample, and adds its row to the table."""
        row, bits = _EMPTY_ROW.copy(), 0
        row[_KEY] = hash(key)  # compared within this process only
        for _, extension, member in members:
            row[_FIRST] = row[_FIRST] or member.offset
            if part := self.parts.get(extension):
                bits |= self._read_part(part, member, row)
        if row[_OFFSET] < 0 and row[_LABEL] < 0 and not bits:  # no sample
            return
        if self.labels.extension is None:
            row[_LABEL] = 0
        # 4. Missing members are reported only for samples without another fault.
        if not bits:
            bits = (_BIT[NO_LABEL] if row[_LABEL] < 0 else 0) | (_BIT[NO_IMAGE] if row[_OFFSET] < 0 else 0)
        row[_BITS] = bits
        self.num_faulty += bits != 0
        self.table.extend(row)

    def result(self, digest: str, damage: str) -> ShardScan:
        """Returns the result of the scan, after the last member, with the hash and the damage of the file, if any."""
        # A view, since a copy of millions of samples costs memory; NumPy does not take an empty buffer.
        table = np.frombuffer(self.table or array("q", [0]), np.int64)[: len(self.table)]
        columns = table.reshape(-1, len(_EMPTY_ROW)).T  # each (n,) int64
        bits = _mark_repeated(columns[_KEY], columns[_BITS])  # 5.
        whole = bits == 0
        rows = np.zeros(int(whole.sum()), INDEX_DTYPE)
        for name, column in (("offset", _OFFSET), ("size", _SIZE), ("label", _LABEL)):
            rows[name] = columns[column, whole]
        faults = {}
        for fault, bit in _BIT.items():
            chosen = columns[:, bits & bit != 0]
            if chosen.size:
                first = self.first.get(fault) or self._label_at(int(chosen[_FIRST, 0]))
                faults[fault] = Fault(len(np.unique(chosen[_KEY])), first)
        return ShardScan(
            bytes=os.fstat(self.descriptor).st_size,
            sha256=digest,
            rows=rows,
            images=_image_range(columns[_SHAPE, whole]),
            faults=faults,
            damage=damage,
        )

    def _read_part(self, part: _Part, member: Member, row: list[int]) -> int:
        """Writes the values of a part to the row of its sample, or returns the bit of its fault."""
        if _UNSAFE.search(member.name):
            return self._note(BAD_NAME, member)
        if member.kind != "file":
            return self._note(BAD_KIND, member)
        if row[part.column] >= 0:
            return self._note(TWICE, member)
        try:
            if not 0 < member.size <= part.limit:
                raise ValueError(f"size must be 1 to {part.limit} bytes, got {member.size}")
            data = os.pread(self.descriptor, member.size, member.offset)
            values = part.read(member, data, f"{self.shard}:{printable(member.name)}")
        except ValueError as error:
            return self._note(part.bad, member, str(error))
        row[part.column : part.column + len(values)] = values
        return 0

    def _read_image(self, member: Member, data: bytes, name: str) -> tuple[int, ...]:
        header = parse_image_header(data, name=name)
        # An image has at most 64 million pixels: channels in 3 bits, width in 27, height above.
        return member.offset, member.size, header.height << 30 | header.width << 3 | header.channels

    def _read_label(self, member: Member, data: bytes, name: str) -> tuple[int, ...]:
        return (self.labels.read(data, name=name),)

    def _note(self, fault: str, member: Member, reason: str = "") -> int:
        """Keeps the message of the first sample with a fault, and returns the bit of the fault."""
        if fault not in self.first:
            name = f"{self.shard}:{printable(member.name)}"
            self.first[fault] = name if not reason else reason if name in reason else f"{name}: {reason}"
        return _BIT[fault]

    def _label_at(self, offset: int) -> str:
        """Returns ``SHARD:MEMBER`` of the member whose payload begins at an offset."""
        return member_label(self.shard, os.pread(self.descriptor, BLOCK, offset - BLOCK), offset)


def _mark_repeated(keys: npt.NDArray[np.int64], bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the faults of samples, with those of keys that occur more than once.

    One that lacks its image or its label may be a part of a sample whose other part is elsewhere in the tar.
    """
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    lacking = _BIT[NO_IMAGE] | _BIT[NO_LABEL]
    return np.where(counts[inverse] > 1, bits & ~lacking | _BIT[REPEATED], bits)


def _image_range(shapes: npt.NDArray[np.int64]) -> ImageRange | None:
    if not len(shapes):
        return None
    heights, widths, channels = shapes >> 30, shapes >> 3 & (1 << 27) - 1, np.unique(shapes & 7)
    return ImageRange(
        height=(int(heights.min()), int(heights.max())),
        width=(int(widths.min()), int(widths.max())),
        channels=tuple(channels.tolist()),
    )

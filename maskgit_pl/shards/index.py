"""From ordinary WebDataset tars to a manifest: a walk that reads headers and labels and trusts neither.

Used by ``maskgit data index`` for shards made elsewhere and by the writer for its own. Members are never extracted,
their names are never paths, nothing is decompressed or unpickled. What would lose samples in silence is refused.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from maskgit_pl.shards.images import read_header
from maskgit_pl.shards.manifest import INDEX_DTYPE, ImageRange, Manifest, Shard, Split, save_manifest

__all__ = ["IMAGE_EXTENSIONS", "find_shards", "index_shards", "parse_label"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 * 2**20  # no photo within the pixel limit needs more
MAX_LABEL_BYTES = 64
_LABEL = re.compile(rb"\s*(0|[1-9][0-9]{0,8})\s*")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # webdataset's rule: the key ends at the first dot of the base name
_log = logging.getLogger(__name__)


def find_shards(folder: str | Path, pattern: str) -> list[Path]:
    """The tars that a pattern names inside a folder, sorted.

    Args:
        folder: The data folder.
        pattern: A glob, or one with WebDataset's braces: ``train-*.tar``, ``{00000..00012}.tar``, ``{a,b}-*.tar``.

    Raises:
        ValueError: The pattern leaves the folder, names no file, or a brace form names a file that is not there.
    """
    folder = Path(folder)
    found: set[Path] = set()
    for one in _expand_braces(pattern):
        if "/" in one or one.startswith("."):
            raise ValueError(f"shard pattern {pattern!r}: file names inside {folder} are needed, not paths")
        matches = sorted(folder.glob(one))
        if not matches:
            raise ValueError(f"shard pattern {pattern!r}: nothing in {folder} matches {one!r}")
        found.update(matches)
    return sorted(found)


def _expand_braces(pattern: str) -> list[str]:
    import webdataset

    return list(webdataset.shardlists.expand_urls(pattern))


def index_shards(
    folder: str | Path,
    shards: Mapping[Split, Sequence[Path]],
    *,
    classes: Sequence[str] | None = None,
    on_shard: Callable[[Split], object] = lambda split: None,
) -> dict[Split, Manifest]:
    """Walk the shards of every split and write their manifests beside them.

    Args:
        folder: Where the shards lie and the manifests go.
        shards: The tars of each split, in the order in which samples are to be numbered.
        classes: Class names; without, the labels' own numbers up to the largest.
        on_shard: Told the split of each shard that is done (for a progress bar).

    Raises:
        ValueError: A shard is damaged, a label is not a class, a sample is incomplete or doubled.
    """
    drafts = {split: _draft(Path(folder), split, paths, classes, on_shard) for split, paths in shards.items()}
    if classes is None:
        largest = max(int(rows["label"].max()) for _, rows in drafts.values())
        classes = [str(label) for label in range(largest + 1)]
    manifests = {}
    for split, (draft, rows) in drafts.items():
        manifests[split] = replace(draft, classes=tuple(classes))
        save_manifest(manifests[split], rows)
    return manifests


def parse_label(data: bytes, *, name: str, num_classes: int | None = None) -> int:
    """A class number from the bytes of a ``.cls`` member; ``int()`` would take ``1_000`` and ``-1``.

    Raises:
        ValueError: Not a decimal number, or not below ``num_classes``; ``name`` says where.
    """
    match = _LABEL.fullmatch(data)
    if match is None:
        raise ValueError(f"label {name}: a decimal class number is needed, got {data!r}")
    label = int(match[1])
    if num_classes is not None and label >= num_classes:
        raise ValueError(f"label {name}: a class below {num_classes} is needed, got {label}")
    return label


@dataclass
class _Sample:
    offset: int = -1
    size: int = 0
    image_name: str = ""
    label: int = -1


@dataclass
class _Walk:
    """What the walk over one split's shards has gathered."""

    num_classes: int | None
    sizes: set[tuple[int, int, int]] = field(default_factory=set)  # (height, width, channels) seen
    ignored: Counter[str] = field(default_factory=Counter)


def _draft(
    folder: Path,
    split: Split,
    paths: Sequence[Path],
    classes: Sequence[str] | None,
    on_shard: Callable[[Split], object],
) -> tuple[Manifest, npt.NDArray[np.void]]:
    walk = _Walk(None if classes is None else len(classes))
    shards, parts = [], []
    for number, path in enumerate(paths):
        rows, digest = _walk_shard(path, walk)
        rows["shard"] = number
        shards.append(Shard(name=path.name, bytes=path.stat().st_size, samples=len(rows), sha256=digest))
        parts.append(rows)
        on_shard(split)
    if walk.ignored:
        _log.warning("%s, split %s: members not read: %s", folder, split, dict(walk.ignored))
    index = np.concatenate(parts)
    images = _image_range(walk.sizes)
    digest = hashlib.sha256(index.tobytes()).hexdigest()
    return Manifest(folder, split, tuple(shards), tuple(classes or ()), images, digest), index


def _image_range(sizes: set[tuple[int, int, int]]) -> ImageRange:
    heights, widths, channels = (sorted(set(column)) for column in zip(*sizes, strict=True))
    return ImageRange((heights[0], heights[-1]), (widths[0], widths[-1]), tuple(channels))


def _walk_shard(path: Path, walk: _Walk) -> tuple[npt.NDArray[np.void], str]:
    samples: dict[str, _Sample] = {}
    with open(path, "rb") as file:
        for member in _members(file, path.name):
            _take_member(file, member, samples, walk, shard=path.name)
        digest = _sha256(file)
    _refuse_half_samples(samples, path.name, walk.ignored)
    rows = [(0, sample.offset, sample.size, sample.label) for sample in samples.values()]
    return np.array(rows, INDEX_DTYPE), digest


def _members(file: IO[bytes], shard: str) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar; what ``tarfile`` passes over in silence is an error here."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # keeps memory flat over a million members
            yield member
    except (tarfile.TarError, OSError, OverflowError, EOFError) as error:
        raise ValueError(f"shard {shard}: not a whole, uncompressed tar ({error})") from error
    _check_end(file, archive.offset, shard)


def _check_end(file: IO[bytes], offset: int, shard: str) -> None:
    """After the last member come zeros alone, two blocks at least; else a header is damaged or the end is cut."""
    file.seek(offset)
    zeros = 0
    while block := file.read(2**20):
        if block.count(0) != len(block):
            raise ValueError(f"shard {shard}: damaged member header at byte {offset}")
        zeros += len(block)
    if zeros < 1024:
        raise ValueError(f"shard {shard}: cut off at byte {offset}, the end of the archive is missing")


def _take_member(
    file: IO[bytes], member: tarfile.TarInfo, samples: dict[str, _Sample], walk: _Walk, *, shard: str
) -> None:
    name = f"{shard}:{member.name}"
    match = _NAME.fullmatch(member.name)
    key, extension = (match[1], match[2].lower()) if match else (member.name, "")
    if extension not in (*IMAGE_EXTENSIONS, "cls"):
        if not member.isdir() and extension not in ("json", "txt"):
            walk.ignored[f".{extension}"] += 1
        return
    if not member.isreg() or member.sparse is not None:
        raise ValueError(f"member {name}: a regular file is needed, got a link, a device or a sparse file")
    sample = samples.setdefault(key, _Sample())
    if extension == "cls":
        _take_label(file, member, sample, walk, name=name)
    else:
        _take_image(file, member, sample, walk, name=name)


def _take_label(file: IO[bytes], member: tarfile.TarInfo, sample: _Sample, walk: _Walk, *, name: str) -> None:
    if sample.label >= 0:
        raise ValueError(f"label {name}: the key has two labels")
    data = _payload(file, member, MAX_LABEL_BYTES, name=name)
    sample.label = parse_label(data, name=name, num_classes=walk.num_classes)


def _take_image(file: IO[bytes], member: tarfile.TarInfo, sample: _Sample, walk: _Walk, *, name: str) -> None:
    if sample.offset >= 0:
        raise ValueError(f"image {name}: the key has two images, the other is {sample.image_name}")
    header = read_header(_payload(file, member, MAX_IMAGE_BYTES, name=name), name=name)
    walk.sizes.add((header.height, header.width, header.channels))
    sample.offset, sample.size, sample.image_name = member.offset_data, member.size, member.name


def _payload(file: IO[bytes], member: tarfile.TarInfo, most: int, *, name: str) -> bytes:
    if member.size > most:
        raise ValueError(f"member {name}: at most {most} bytes are read, got {member.size}")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) != member.size:
        raise ValueError(f"member {name}: {member.size} bytes expected, the file ends after {len(data)}")
    return data


def _refuse_half_samples(samples: dict[str, _Sample], shard: str, ignored: Counter[str]) -> None:
    for missing, halves in (
        ("image", [key for key, sample in samples.items() if sample.offset < 0]),
        ("label (.cls)", [sample.image_name for sample in samples.values() if sample.label < 0]),
    ):
        if halves:
            raise ValueError(
                f"shard {shard}: {len(halves)} samples have no {missing}, the first is {shard}:{halves[0]}"
            )
    if not samples:
        seen = f"only {dict(ignored)}" if ignored else "no members"
        raise ValueError(f"shard {shard}: no image samples ({', '.join(IMAGE_EXTENSIONS)} with cls), {seen}")


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()

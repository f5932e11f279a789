"""Options of ``generate_many``, and the plan of all images, which each part and the file carry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maskgit_pl.old_names import rename_decoding
from maskgit_pl.pipeline.classes import Classes

__all__ = ["BulkOptions", "BulkPlan", "check_same", "read_plan"]

_FORMAT, _VERSION = "maskgit_pl.samples", 1
_SEEDS = 2**32
_LONGEST_COMMENT = 65535  # of a zip file


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """Options of ``generate_many`` beside the settings of decoding.

    Args:
        num_images: Number of images, at least 1.
        classes: Indices or names, over which the images are spread evenly; all classes by default.
        seed: Seed of the first image; image i has seed + i.
        negative_class: Class that guidance pushes away from, an index or a name; by default "no class".
        part_size: Images of a part, which are in memory at once.
        batch_size: Images decoded at a time. A resumed run may have another: tokens do not depend on it, pixels up to
            rounding.
        rank: Number of this process: it makes the parts rank, rank + world_size, ...
        world_size: Number of processes that share the work. They need no connection, only the folder.

    Raises:
        ValueError: if a number is out of range.
    """

    num_images: int
    classes: Classes | None = None
    seed: int = 0
    negative_class: int | str | None = None
    part_size: int = 500
    batch_size: int = 100
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_images", "part_size", "batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: at least 1 is needed, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank: a number in [0, {self.world_size}) is needed, the world's size, got {self.rank}")
        if self.seed < 0 or self.seed + self.num_images > _SEEDS:
            last = self.seed + self.num_images - 1
            raise ValueError(f"seed: seeds in [0, 2**32) are needed, got {self.seed} to {last}; begin lower")


@dataclass(frozen=True)
class BulkPlan:
    """A description of all images, so that a part is never taken for one of other images.

    Args:
        count: Number of images, at least 1.
        seed: Seed of the first image.
        part_size: Images of a part, at least 1; the last one may have fewer.
        classes: Labels, each at most once; the images are spread over them evenly, class by class.
        negative_class: The label that guidance pushes away from; None is "no class".
        decoding: ``DecodingConfig`` in plain values.
        mask_schedule: Mask schedule of the model.
        image: Height, width and channels.
        tokenizer: Digest of the tokenizer's weights.
        transformer: Digest of the transformer's weights.

    Raises:
        ValueError: if a class is named twice, or there are too many for the file.
    """

    count: int
    seed: int
    part_size: int
    classes: tuple[int, ...]
    negative_class: int | None
    decoding: Mapping[str, Any]
    mask_schedule: str
    image: tuple[int, int, int]
    tokenizer: str
    transformer: str

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: each at most once, since images are spread evenly, got one several times")
        if len(self.text) > _LONGEST_COMMENT:
            raise ValueError(f"classes: fewer are needed, got {len(self.classes)}; make several files")

    @cached_property
    def text(self) -> bytes:
        """As JSON: the content of ``plan.json``, and the comment of the finished file."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}).encode()

    @property
    def digest(self) -> str:
        """The sha256 that stands in each of the parts."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return -(-self.count // self.part_size)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image in a part."""
        return self.image[0] * self.image[1] * self.image[2]

    def rows(self, part: int) -> range:
        """Returns the numbers of the images of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.count))

    def label(self, row: int) -> int:
        """Returns the label of an image."""
        return self.classes[row * len(self.classes) // self.count]


def read_plan(text: bytes) -> dict[str, Any] | None:
    """Parses a plan of this version; None if it is something else."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    known = isinstance(content, dict) and (content.get("format"), content.get("version")) == (_FORMAT, _VERSION)
    return rename_decoding(content) if known else None


def check_same(place: Path, known: Mapping[str, Any], plan: BulkPlan) -> None:
    """Refuses to mix images of two plans.

    Raises:
        ValueError: if they differ. The message lists each difference as ``key old -> new``.
    """
    old, new = dict(_flat(known)), dict(_flat(json.loads(plan.text)))
    changed = [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in sorted({*old, *new})
               if old.get(key) != new.get(key)]  # fmt: skip
    if changed:
        raise ValueError(
            f"{place}: it holds other images, got {', '.join(changed)}; set them back, name another file, or take it "
            "away"
        )


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:24]}..."

"""Options of ``generate_many``, and the plan of all images, which every part and the file contain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maskgit_pl.checks import check_integer, plain_number
from maskgit_pl.files import parse_json
from maskgit_pl.pipeline.classes import Classes

__all__ = ["BulkOptions", "BulkPlan", "check_same", "read_plan"]

_FORMAT, _VERSION = "maskgit_pl.samples", 1
_SEEDS = 2**32  # number of seeds
_LONGEST_COMMENT = 65535  # bytes of the comment of a zip file, which holds the plan


@dataclass(frozen=True, kw_only=True)
class BulkOptions:
    """Options of ``generate_many`` besides the decoding settings.

    Args:
        num_images: Number of images, at least 1.
        classes: Indices or names. The images are spread evenly over them. All classes by default.
        seed: Seed of the first image; image i has seed + i.
        negative_class: Index or name of the class that guidance moves away from; "no class" by default.
        part_size: Number of images of a part, which are in memory at the same time.
        batch_size: Number of images decoded at a time. A resumed run may use another: tokens do not depend on it, and
            pixels differ by rounding only.
        rank: Index of this process in [0, world_size). It generates the parts rank, rank + world_size, ...
        world_size: Number of processes that share the work. They share a folder and need no network.

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
        for name in ("num_images", "part_size", "batch_size", "world_size", "rank", "seed"):
            least = 0 if name in ("rank", "seed") else 1
            number = check_integer(name, plain_number(getattr(self, name)), f"[{least}, inf)")
            object.__setattr__(self, name, number)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), the world size, got {self.rank}")
        # The last image has the largest seed.
        if self.seed + self.num_images > _SEEDS:
            last = self.seed + self.num_images - 1
            raise ValueError(f"seed and all seeds after it must be in [0, 2**32), got {self.seed} to {last}")


@dataclass(frozen=True)
class BulkPlan:
    """A description of all images. Parts and files carry it, so that images of different plans are never mixed.

    Args:
        count: Number of images, at least 1.
        seed: Seed of the first image.
        part_size: Number of images of a part, at least 1. The last part may have fewer.
        classes: Labels, each at most once. The images are spread evenly over them, class by class.
        negative_class: Label that guidance moves away from; None is "no class".
        decoding: ``DecodingConfig`` in plain values.
        mask_schedule: ``repr`` of the mask schedule of the model.
        image: (H, W, C) of an image.
        tokenizer: SHA-256 of the weights of the tokenizer.
        transformer: SHA-256 of the weights of the transformer.
        negative_model: SHA-256 of the weights of the model that guidance moves away from; None without one.
        accept_rate: Fraction of the candidates that are kept; None without rejection sampling.
        classifier: SHA-256 of the classifier that ranks candidates; None without rejection sampling.
        vectors: SHA-256 of the vectors of the images; None for a model without vectors.

    Raises:
        ValueError: if a class is given twice, or there are too many classes for the file.
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
    negative_model: str | None = None
    accept_rate: float | None = None
    classifier: str | None = None
    vectors: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be different, because the images are spread evenly over them, got one twice")
        if len(self.text) > _LONGEST_COMMENT:
            raise ValueError(f"classes must be fewer for one file, got {len(self.classes)}; write several files")

    @cached_property
    def text(self) -> bytes:
        """The plan as JSON: the content of ``plan.json`` and the comment of the finished file."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of ``text``, which every part contains."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def num_parts(self) -> int:
        """The number of parts."""
        return -(-self.count // self.part_size)

    @property
    def image_bytes(self) -> int:
        """The number of bytes of an image in a part."""
        return self.image[0] * self.image[1] * self.image[2]

    def rows(self, part: int) -> range:
        """Returns the indices of the images of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.count))

    def label(self, row: int) -> int:
        """Returns the label of an image."""
        # Image i belongs to class floor(i * classes / images): class by class, evenly.
        return self.classes[row * len(self.classes) // self.count]


def read_plan(text: bytes) -> dict[str, Any] | None:
    """Parses a plan of this version; returns None for any other text."""
    try:
        content = parse_json(text, "plan")
    except ValueError:
        return None
    if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        return None
    return content


def check_same(place: Path, known: Mapping[str, Any], plan: BulkPlan) -> None:
    """Raises if two plans differ, so that their images are not mixed.

    Raises:
        ValueError: if they differ. The message lists each difference as ``key old -> new``.
    """
    # JSON turns tuples into lists, so the new plan is converted too before the comparison.
    old, new = dict(_flat(known)), dict(_flat(json.loads(plan.text)))
    changed = [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in sorted({*old, *new})
               if old.get(key) != new.get(key)]  # fmt: skip
    if changed:
        raise ValueError(
            f"{place} holds images of other settings: {', '.join(changed)}. Use the same settings, name another file, "
            "or delete it"
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

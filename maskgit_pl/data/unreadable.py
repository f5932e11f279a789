"""Unreadable images during training: they are replaced, counted and listed, and too many of them end the run.

An unreadable image is replaced by the next readable one of its split (index + 1, + 2, ... modulo n), with its label.
The replacement is thus a function of the data and the index: equal on all ranks and workers, and after a resume.
Workers report replacements; the training process counts them. Imports neither torch nor PIL. Used by ``data``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from maskgit_pl.checks import check_number
from maskgit_pl.data.image_bytes import Reason
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.files import write_text

__all__ = [
    "ALWAYS_ALLOWED",
    "MAX_IN_A_ROW",
    "Unreadable",
    "UnreadableImages",
    "check_budget",
    "write_unreadable",
]

ALWAYS_ALLOWED = 10  # different images; so few never end a run, even with little data
MAX_IN_A_ROW = 100  # so many consecutive images mean that a shard is damaged
_MAX_LISTED = 20  # images in an error message; the JSON file lists all


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

    Raises:
        ValueError: if the budget is out of range.
    """

    def __init__(self, explain: Callable[[int], Unreadable], *, num_samples: int, budget: float) -> None:
        check_budget(budget)
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
            for number in range(drawn, drawn + length):
                self._note(number % self.num_samples)
        # 2.
        if longest >= min(MAX_IN_A_ROW, self.num_samples):
            raise DataBudgetError(self._text(f"{longest} images in a row cannot be read"))
        # 3.
        allowed = ALWAYS_ALLOWED if self.budget > 0 else 0
        if len(self.images) > allowed and self.count > self.budget * self.seen:
            raise DataBudgetError(
                self._text(
                    f"unreadable images must be at most {self.budget:g} of all images, or {allowed} in total, "
                    f"got {len(self.images)} ({self.count} times in {self.seen} images)"
                )
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
        return {
            "seen": self.seen,
            "unreadable": self.count,
            "shards": self.by_shard(),
            "reasons": self.by_reason(),
            "images": images,
        }

    def _note(self, index: int) -> None:
        self.times[index] += 1
        if index not in self.images:
            self.images[index] = self._explain(index)

    def _count_by(self, key: Callable[[Unreadable], str]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for index, times in self.times.items():
            counts[key(self.images[index])] += times
        return dict(counts.most_common())

    def _text(self, rule: str) -> str:
        lines = [f"{image.name}: {image.reason}: {image.error}" for _, image in sorted(self.images.items())]
        more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
        listed = "\n  ".join([*lines[:_MAX_LISTED], *more])
        return (
            f"data budget: {rule}:\n  {listed}\n"
            "repair or leave out these images and make the shards again, or raise data.unreadable_budget"
        )


def check_budget(budget: float) -> None:
    """Checks that a budget is a fraction.

    Raises:
        ValueError: if it is not in [0, 1].
    """
    check_number("data.unreadable_budget", budget, "[0, 1]")


def write_unreadable(path: Path, splits: dict[str, UnreadableImages]) -> None:
    """Writes the counts and lists of all splits as JSON, atomically.

    Args:
        path: The JSON file; its folder is made if it is missing.
        splits: Counters by the names of their splits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: images.as_json() for name, images in splits.items()}
    write_text(path, json.dumps(content, indent=1) + "\n")

"""Images that cannot be read while they are needed: they are counted and listed, and too many end the run.

An unreadable image is replaced by the next of its split (index + 1 modulo n, again and again), with that one's label.
Which one is shown is thus a function of the data and the index: equal on every rank and worker and after a resume. The
process that trains counts; workers only say what they replaced. Imports neither torch nor PIL.
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
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.files import write_text
from maskgit_pl.shards.image_bytes import Reason

__all__ = [
    "ALWAYS_ALLOWED",
    "MAX_IN_A_ROW",
    "Unreadable",
    "UnreadableImages",
    "check_budget",
    "write_unreadable",
]

ALWAYS_ALLOWED = 10  # different images; so few end no run, however small the data
MAX_IN_A_ROW = 100  # so many neighbours are no accident: a shard is spoilt
_MAX_LISTED = 20  # of an error; the file lists all


class Unreadable(NamedTuple):
    """An image that cannot be read.

    Args:
        index: Number of the sample in its split.
        shard: File name of its tar.
        name: ``SHARD:MEMBER``.
        reason: The kind of fault.
        error: What the decoder said.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    shard: str
    name: str
    reason: Reason
    error: str


class UnreadableImages:
    """Counts the images of a split that could not be read, and ends the run when they are too many.

    Args:
        explain: From a sample's number to what is wrong with it; asked once an image.
        num_samples: Samples of the split, n.
        budget: Share of the samples seen that may be unreadable, in [0, 1]. Above 0, 10 different images are always
            allowed; 0 allows none. Counts begin with the process: a resumed run begins from none.

    Raises:
        ValueError: The budget is out of range.
    """

    def __init__(self, explain: Callable[[int], Unreadable], *, num_samples: int, budget: float) -> None:
        check_budget(budget)
        self.budget = budget
        self.num_samples = num_samples
        self.seen = 0
        self.times: Counter[int] = Counter()  # index -> how often it was met
        self.images: dict[int, Unreadable] = {}
        self._explain = explain

    @property
    def count(self) -> int:
        """The number of times that a sample was replaced or could not be; a sample met in two epochs counts twice."""
        return sum(self.times.values())

    def add(self, index: npt.NDArray[np.int64], replacement: npt.NDArray[np.int64]) -> None:
        """Counts a batch.

        Args:
            index: (B,) int64, the samples that were asked for.
            replacement: (B,) int64, the samples shown in their place, -1 where they are shown themselves.

        Raises:
            DataBudgetError: That was one too many; the text lists them.
        """
        self.seen += len(index)
        row = np.flatnonzero(replacement >= 0)
        if not len(row):
            return
        longest = 0
        for asked, shown in zip(index[row].tolist(), replacement[row].tolist(), strict=True):
            length = (shown - asked) % self.num_samples or self.num_samples
            longest = max(longest, length)
            for number in range(asked, asked + length):
                self._note(number % self.num_samples)
        if longest >= min(MAX_IN_A_ROW, self.num_samples):
            raise DataBudgetError(self._text(f"{longest} images in a row cannot be read"))
        allowed = ALWAYS_ALLOWED if self.budget > 0 else 0
        if len(self.images) > allowed and self.count > self.budget * self.seen:
            raise DataBudgetError(
                self._text(
                    f"at most {self.budget:g} of the images and {allowed} in all may be unreadable, "
                    f"got {len(self.images)} ({self.count} times in {self.seen} images)"
                )
            )

    def by_shard(self) -> dict[str, int]:
        """Times that images of a shard could not be read, the worst shard first."""
        return self._count_by(lambda image: image.shard)

    def by_reason(self) -> dict[str, int]:
        """Times that images could not be read for a reason, the most frequent first."""
        return self._count_by(lambda image: image.reason)

    def as_json(self) -> dict[str, Any]:
        """Counts and the whole list, as plain values."""
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
            "mend or leave out these images and make the shards again, or raise data.unreadable_budget"
        )


def check_budget(budget: float) -> None:
    """Checks that a budget is a share.

    Raises:
        ValueError: if it is not in [0, 1].
    """
    check_number("data.unreadable_budget", budget, "[0, 1]")


def write_unreadable(path: Path, splits: dict[str, UnreadableImages]) -> None:
    """Writes counts and lists of splits as JSON, replacing the file when all of it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: images.as_json() for name, images in splits.items()}
    write_text(path, json.dumps(content, indent=1) + "\n")

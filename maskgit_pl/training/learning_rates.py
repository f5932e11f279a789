"""The learning rate of a run: a warm-up to a peak, and a registered schedule after it. Used by both stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.registry import Registry, derives_from, describe

__all__ = [
    "ConstantRate",
    "CosineRate",
    "InverseSquareRootRate",
    "LearningRate",
    "LearningRateSchedule",
    "LinearRate",
    "learning_rate_schedules",
]


class LearningRateSchedule:
    """The base of registered schedules: a frozen dataclass that maps steps after the warm-up to a factor.

    A schedule is a function of the step only, so that a resumed run continues it exactly.

    Attributes:
        has_end: True if the schedule depends on the last step of the run.
    """

    has_end: ClassVar[bool] = True

    def __call__(self, step: int, *, warmup_steps: int, max_steps: int) -> float:
        """Computes the factor of a step, in [0, 1]; 1 is the peak.

        Args:
            step: Number of steps before this one, >= ``warmup_steps``.
            warmup_steps: w, number of warm-up steps, >= 0.
            max_steps: Steps of the whole run.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step, *, warmup_steps, max_steps)")


def _check_learning_rate_schedule(name: str, schedule: LearningRateSchedule) -> None:
    """Checks that a schedule starts at a factor in (0, 1] and stays in [0, 1].

    Raises:
        ValueError: if it does not. The message names the step.
    """
    derives_from(LearningRateSchedule)(name, schedule)
    for step in (10, 11, 55, 99, 100, 200):
        factor = schedule(step, warmup_steps=10, max_steps=100)
        if not (0 <= factor <= 1 and (factor > 0 or step > 10)):
            raise ValueError(
                f"learning rate schedule {name!r} must be in [0, 1], and above 0 after the warm-up, got {factor} at "
                f"step {step} of 100 with 10 steps of warm-up"
            )


learning_rate_schedules: Registry[LearningRateSchedule] = Registry(
    "learning rate schedule", "maskgit_pl.learning_rate_schedules", check=_check_learning_rate_schedule
)


def _progress(step: int, warmup_steps: int, max_steps: int) -> float:
    """Returns p = (step - w) / (max_steps - w), at most 1."""
    return min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))


@learning_rate_schedules.register("constant")
@dataclass(frozen=True)
class ConstantRate(LearningRateSchedule):
    """1: the peak until the end."""

    has_end: ClassVar[bool] = False

    def __call__(self, step: int, *, warmup_steps: int, max_steps: int) -> float:
        return 1.0


@learning_rate_schedules.register("cosine")
@dataclass(frozen=True)
class CosineRate(LearningRateSchedule):
    """(1 + cos(pi p)) / 2. Source: arXiv:1608.03983, without restarts."""

    def __call__(self, step: int, *, warmup_steps: int, max_steps: int) -> float:
        return (1 + math.cos(math.pi * _progress(step, warmup_steps, max_steps))) / 2


@learning_rate_schedules.register("linear")
@dataclass(frozen=True)
class LinearRate(LearningRateSchedule):
    """1 - p."""

    def __call__(self, step: int, *, warmup_steps: int, max_steps: int) -> float:
        return 1 - _progress(step, warmup_steps, max_steps)


@learning_rate_schedules.register("inverse_sqrt")
@dataclass(frozen=True)
class InverseSquareRootRate(LearningRateSchedule):
    """sqrt(w / (step + 1)), with w >= 1: independent of the last step. Source: arXiv:1706.03762, section 5.3."""

    has_end: ClassVar[bool] = False

    def __call__(self, step: int, *, warmup_steps: int, max_steps: int) -> float:
        warmup = max(1, warmup_steps)
        return math.sqrt(warmup / max(warmup, step + 1))


@dataclass(frozen=True)
class LearningRate:
    """A learning rate: linear warm-up to a peak, then a schedule.

    The learning rate belongs to one global batch. Devices and micro-batches divide the global batch, so the rate is not
    rescaled by their number. With another ``data.global_batch``, choose another peak.

    Args:
        peak: Maximum learning rate, > 0.
        warmup_steps: Steps of the linear warm-up, >= 0.
        decay: Name or mapping of a registered learning rate schedule, such as ``constant``, ``cosine`` or ``linear``.
        final_fraction: Lowest learning rate of the schedule as a fraction of the peak, in [0, 1].

    Raises:
        ValueError: if a number is out of range or the schedule is unknown.
    """

    peak: float
    warmup_steps: int = 0
    decay: str | Mapping[str, Any] = "constant"
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_number("peak", self.peak, "(0, inf)")
        check_integer("warmup_steps", self.warmup_steps, "[0, 9e18]")
        _ = self.schedule  # raises if it is unknown
        check_number("final_fraction", self.final_fraction, "[0, 1]")

    @cached_property
    def schedule(self) -> LearningRateSchedule:
        """The schedule after the warm-up, which is built once and not in each step."""
        return learning_rate_schedules.build(self.decay)

    def factor(self, step: int, max_steps: int) -> float:
        """Computes the multiplier of the peak, in [0, 1].

        With w warm-up steps, fraction f = ``final_fraction`` and the schedule g:

            (step + 1) / w              while step < w
            f + (1 - f) g(step)         then

        Args:
            step: Number of steps before this one, >= 0.
            max_steps: Steps of the whole run.

        Raises:
            ValueError: if the schedule depends on the last step and ``max_steps`` is below 1.
        """
        if self.schedule.has_end and max_steps < 1:
            name = describe(self.decay)
            raise ValueError(f"learning_rate.decay {name!r}: trainer.max_steps must be >= 1, got {max_steps}")
        # Step 0 already has a rate above 0.
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        factor = self.schedule(step, warmup_steps=self.warmup_steps, max_steps=max_steps)
        return 1.0 if factor == 1 else self.final_fraction + (1 - self.final_fraction) * factor

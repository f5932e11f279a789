"""Guidance schedules: how strongly the class pulls at which decoding step.

Convention: guided = conditional + scale (conditional - unconditional), on logits. Scale 0 is no guidance, and costs no
second forward. Used by ``decoding.GuidedPredictor``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from maskgit_pl.registry import Registry

__all__ = ["GuidanceSchedule", "guidance_scales", "guidance_schedules"]


class GuidanceSchedule(ABC):
    """Scale as a function of where decoding stands. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, position: float) -> float:
        """The scale at a step: ``position`` is 0 at the first step and 1 at the last."""


def check_guidance_schedule(name: str, schedule: GuidanceSchedule) -> None:
    """Refuses, by name, a schedule whose scales are not finite and at least 0.

    Raises:
        ValueError: With the name, the rule and what was seen.
    """
    for position in (0.0, 0.25, 0.5, 0.75, 1.0):
        scale = schedule(position)
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"guidance schedule {name!r}: scales must be finite and >= 0, got {scale} at {position}")


def guidance_scales(schedule: GuidanceSchedule, num_steps: int) -> tuple[float, ...]:
    """The scale of each of ``num_steps`` decoding steps; a single step is both first and last, and counts as last."""
    return tuple(schedule(step / (num_steps - 1) if num_steps > 1 else 1.0) for step in range(num_steps))


guidance_schedules: Registry[GuidanceSchedule] = Registry(
    "guidance schedule", "maskgit_pl.guidance_schedules", check=check_guidance_schedule
)


@guidance_schedules.register("constant")
@dataclass(frozen=True)
class Constant(GuidanceSchedule):
    """The same scale at every step.

    Args:
        scale: At least 0.
    """

    scale: float = 0.0

    def __call__(self, position: float) -> float:
        return self.scale


@guidance_schedules.register("linear")
@dataclass(frozen=True)
class Linear(GuidanceSchedule):
    """From 0 at the first step to ``scale`` at the last: variety first, then the class.

    Args:
        scale: At least 0.

    Source: MUSE, arXiv:2301.00704; xyfJASON/maskgit-pytorch.
    """

    scale: float = 1.0

    def __call__(self, position: float) -> float:
        return self.scale * position

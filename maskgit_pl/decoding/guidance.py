"""Guidance schedules: the scale of classifier-free guidance as a function of the decoding step.

Used by ``decoding.GuidedPredictor``. Convention: guided = conditional + scale (conditional - unconditional), on logits.
Scale 0 is no guidance and needs no second forward pass; in diffusers, TiTok and others the scale s is 1 + ours. A
softmax follows, so the guided distribution p_c^(1 + scale) p_u^(-scale) / Z is normalised at each position.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from maskgit_pl.checks import check_number
from maskgit_pl.registry import Registry

_SCALES = "[0, 10000]"  # so that guided logits are finite
_CHECKED_POINTS = 257


class GuidanceSchedule(ABC):
    """The guidance scale as a function of the progress of decoding. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Returns the scale of a step, in [0, 10000]; ``progress`` is 0 at the first step and 1 at the last."""


def _check_guidance_schedule(name: str, schedule: GuidanceSchedule) -> None:
    """Checks that a schedule has scales in [0, 10000] at 257 values of progress from 0 to 1."""
    for point in range(_CHECKED_POINTS):
        progress = point / (_CHECKED_POINTS - 1)
        check_number(f"guidance schedule {name!r}: the scale at progress {progress:g}", schedule(progress), _SCALES)


def step_progress(step: float, num_steps: int) -> float:
    """Returns t / (T - 1): 0 at the first step and 1 at the last. A single step counts as the last one."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


def guidance_scales(schedule: GuidanceSchedule, num_steps: int) -> tuple[float, ...]:
    """Returns the scale of each of ``num_steps`` decoding steps; a single step counts as the last one."""
    return tuple(schedule(step_progress(step, num_steps)) for step in range(num_steps))


def check_guidance(scales: Sequence[float], *, has_negative_class: bool) -> None:
    """Checks that guidance has a class to push images away from.

    Args:
        scales: Guidance scale of each step, >= 0.
        has_negative_class: True if the model has a null class, or negative classes are named.
    """
    if not has_negative_class and any(scale > 0 for scale in scales):
        raise ValueError(
            "guidance must have scale 0 for a model that has no null class (trained with class_dropout 0), got a "
            f"scale of {max(scales):g}; use scale 0, or name negative classes"
        )


guidance_schedules: Registry[GuidanceSchedule] = Registry(
    "guidance schedule",
    "maskgit_pl.guidance_schedules",
    check=_check_guidance_schedule,
)


@dataclass(frozen=True)
class _Scaled(GuidanceSchedule):
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("scale", self.scale, _SCALES)


@guidance_schedules.register("constant")
@dataclass(frozen=True)
class Constant(_Scaled):
    """The same scale at every step.

    Args:
        scale: Guidance scale, in [0, 10000].
    """

    scale: float = 0.0

    def __call__(self, progress: float) -> float:
        return self.scale


@guidance_schedules.register("linear")
@dataclass(frozen=True)
class Linear(_Scaled):
    """scale * progress: from 0 at the first step, for variety, to ``scale`` at the last.

    Args:
        scale: Guidance scale of the last step, in [0, 10000].

    Source: MUSE, arXiv:2301.00704; xyfJASON/maskgit-pytorch.
    """

    def __call__(self, progress: float) -> float:
        return self.scale * progress


@guidance_schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(_Scaled):
    """scale (1 - cos(pi progress^power)) / 2: from 0 to ``scale``; a larger ``power`` rises later.

    Args:
        scale: Guidance scale of the last step, in [0, 10000].
        power: Exponent of progress, in [0.001, 1000]; MDT and TiTok have 4.

    Source: MaskBit, arXiv:2409.16211 (power 1); MDT, arXiv:2303.14389; TiTok, arXiv:2406.07550.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("power", self.power, "[0.001, 1000]")

    def __call__(self, progress: float) -> float:
        return self.scale * (1 - math.cos(math.pi * progress**self.power)) / 2


@guidance_schedules.register("interval")
@dataclass(frozen=True)
class Interval(_Scaled):
    """``scale`` for progress in [start, stop], else 0. Steps with scale 0 need no second forward pass.

    Args:
        scale: Guidance scale, in [0, 10000].
        start: Progress of the first step with guidance, in [0, 1].
        stop: Progress of the last step with guidance, in [start, 1].

    Source: Kynkäänniemi et al., arXiv:2404.07724.
    """

    start: float = 0.25
    stop: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("start", self.start, "[0, 1]")
        check_number("stop", self.stop, f"[{self.start}, 1]")

    def __call__(self, progress: float) -> float:
        return self.scale if self.start <= progress <= self.stop else 0.0

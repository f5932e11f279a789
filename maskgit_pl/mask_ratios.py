"""Distributions of the mask ratio in training. The default is that of the mask schedule, gamma(u).

Used by ``masking.MaskSampler``. Each distribution is a function of a uniform number u, usually its inverse cumulative
distribution: the u of a global batch are stratified, so the ratios are stratified too. Your own distribution is a
registered frozen dataclass::

    @mask_ratios.register("quarter")
    @dataclass(frozen=True)
    class Quarter(MaskRatio):
        def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
            return 0.75 + 0.25 * u
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from maskgit_pl.checks import check_number, shorten
from maskgit_pl.registry import Registry
from maskgit_pl.schedules import MaskSchedule, compute_ratios, mask_schedules

__all__ = ["MaskRatio", "mask_ratios"]

_CHECKED_POINTS = 257  # with the quarters of [0, 1]
_LEAST_MASS = 1e-6  # probability of the interval that a normal distribution is truncated to
_BETA_POINTS = 16384  # intervals of the table of a beta distribution


class MaskRatio(ABC):
    """A distribution of the mask ratio, as a monotone function of a uniform number. Subclasses are frozen dataclasses.

    Attributes:
        follows_schedule: True if the ratio is that of the mask schedule.
    """

    follows_schedule: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        """Computes the mask ratio.

        Args:
            u: (B,) float32, uniform on [0, 1].
            mask_schedule: gamma: the schedule object that the decoder holds too.
            num_tokens: N, tokens per image.

        Returns:
            (B,) float32 in [0, 1]. The objective ``elbo`` differentiates it with respect to ``u``.
        """


def check_mask_ratio(name: str, mask_ratio: MaskRatio) -> None:
    """Checks the contract of a distribution: finite ratios in [0, 1] that never rise or never fall.

    Raises:
        ValueError: if the distribution breaks the contract. The message has the name, the rule and the value.
    """
    if not isinstance(mask_ratio, MaskRatio):
        raise ValueError(f"mask ratio {name!r} must be a MaskRatio, got {shorten(mask_ratio)}")
    u = torch.linspace(0, 1, _CHECKED_POINTS)
    ratio = mask_ratio(u, mask_schedules.build("cosine"), 256)
    if not isinstance(ratio, Tensor) or ratio.shape != u.shape or ratio.dtype != u.dtype:
        seen = f"{ratio.dtype} {tuple(ratio.shape)}" if isinstance(ratio, Tensor) else shorten(ratio)
        raise ValueError(f"mask ratio {name!r}: it must return a float32 tensor in the shape of u, got {seen}")
    if not bool(ratio.isfinite().all() and (ratio >= 0).all() and (ratio <= 1).all()):
        raise ValueError(
            f"mask ratio {name!r}: its values must lie in [0, 1], got {float(ratio.min()):g} to {float(ratio.max()):g}"
        )
    steps = ratio.diff()
    if bool((steps < -1e-6).any() and (steps > 1e-6).any()):
        raise ValueError(f"mask ratio {name!r}: it must never rise or never fall with u, got both")


mask_ratios: Registry[MaskRatio] = Registry("mask ratio", "maskgit_pl.mask_ratios", check=check_mask_ratio)


@mask_ratios.register("schedule")
@dataclass(frozen=True)
class ScheduleRatio(MaskRatio):
    """gamma(u), the mask schedule that decoding follows too. Source: paper, training objective."""

    follows_schedule: ClassVar[bool] = True

    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        return compute_ratios(mask_schedule, u, num_tokens)


@mask_ratios.register("uniform")
@dataclass(frozen=True)
class UniformRatio(MaskRatio):
    """The uniform distribution on [low, high]: low + (high - low) u.

    Args:
        low: Smallest ratio, in [0, 1).
        high: Largest ratio, in (low, 1].

    Raises:
        ValueError: if a number is out of range.

    Source: on [0, 1], masked diffusion with a linear noise schedule, MDLM, arXiv:2406.07524.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_number("low", self.low, "[0, 1)")
        check_number("high", self.high, f"({self.low}, 1]")

    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        return (self.low + (self.high - self.low) * u).clamp(0.0, 1.0)


@mask_ratios.register("truncated_normal")
@dataclass(frozen=True)
class TruncatedNormalRatio(MaskRatio):
    """The normal distribution, truncated to [low, high].

    ratio = mean + std Phi^-1(Phi(a) + u (Phi(b) - Phi(a))), a = (low - mean) / std, b = (high - mean) / std

    Args:
        mean: Mean before the truncation, in [-1, 2].
        std: Standard deviation before the truncation, in [0.01, 10].
        low: Smallest ratio, in [0, 1).
        high: Largest ratio, in (low, 1].

    Raises:
        ValueError: if a number is out of range, or [low, high] has a probability below 1e-6.

    Source: MAGE, arXiv:2211.09117, section 3 (mean 0.55, std 0.25, truncated to [0.5, 1]).
    """

    mean: float = 0.55
    std: float = 0.25
    low: float = 0.5
    high: float = 1.0

    def __post_init__(self) -> None:
        check_number("mean", self.mean, "[-1, 2]")
        check_number("std", self.std, "[0.01, 10]")
        check_number("low", self.low, "[0, 1)")
        check_number("high", self.high, f"({self.low}, 1]")
        below, above = self._bounds()
        if above - below < _LEAST_MASS:
            raise ValueError(
                f"mean must be so close to [low, high] that its probability is at least {_LEAST_MASS:g}, got "
                f"{above - below:.2g} for {self}; move mean towards [low, high], or raise std"
            )

    def _bounds(self) -> tuple[float, float]:
        """Returns Phi(a) and Phi(b)."""
        below, above = (0.5 * math.erfc((self.mean - end) / self.std / math.sqrt(2)) for end in (self.low, self.high))
        return below, above

    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        below, above = self._bounds()
        probability = below + (above - below) * u.double()  # float32 has no digits left near probability 1
        ratio: Tensor = self.mean + self.std * torch.special.ndtri(probability)
        return ratio.float().clamp(self.low, self.high)


@mask_ratios.register("beta")
@dataclass(frozen=True)
class BetaRatio(MaskRatio):
    """The beta distribution, with the density r^(a - 1) (1 - r)^(b - 1) up to a factor.

    Its inverse cumulative distribution is interpolated linearly in a table of 16,384 intervals.

    Args:
        a: First parameter, in [0.5, 100]; the mean is a / (a + b).
        b: Second parameter, in [0.5, 100].

    Raises:
        ValueError: if a number is out of range.

    Source: none; ``a=2, b=1`` has the mean 2 / 3, like the schedule ``square``.
    """

    a: float = 2.0
    b: float = 1.0

    def __post_init__(self) -> None:
        check_number("a", self.a, "[0.5, 100]")
        check_number("b", self.b, "[0.5, 100]")

    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        ratios, cumulative = (each.to(u.device) for each in _beta_table(self.a, self.b))
        wanted = u.double()
        right = torch.searchsorted(cumulative, wanted.detach(), right=True).clamp(1, len(cumulative) - 1)
        left = right - 1
        width = cumulative[right] - cumulative[left]
        share = (wanted - cumulative[left]) / width.clamp(min=1e-300)
        return (ratios[left] + share * (ratios[right] - ratios[left])).float().clamp(0.0, 1.0)


@lru_cache(maxsize=16)
def _beta_table(a: float, b: float) -> tuple[Tensor, Tensor]:
    """Returns ratios in [0, 1] and the cumulative distribution there, two float64 tensors."""
    # r = sin^2(angle) keeps the density finite at both ends: 2 sin^(2a - 1) cos^(2b - 1), integrated by midpoints.
    edges = torch.linspace(0, math.pi / 2, _BETA_POINTS + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = ((2 * a - 1) * middle.sin().log() + (2 * b - 1) * middle.cos().log()).exp()
    cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    return edges.sin().square(), cumulative / cumulative[-1].clone()

"""Mask schedules: the share of tokens that is masked at each progress. The heart of MaskGIT.

One object serves training (``masking.MaskSampler`` draws its mask ratios from it) and inference
(``decoding.ParallelDecoder`` reads from it how many tokens stay masked after each step), so the two cannot disagree.
Rounding happens in one place, ``num_masked``. torch is imported by the functions that need it, so that the command line
refuses an unknown name at once.

A schedule of your own is a frozen dataclass under a name::

    @mask_schedules.register("sine")
    @dataclass(frozen=True)
    class Sine(MaskSchedule):
        def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
            return 1 - torch.sin(progress * math.pi / 2)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from maskgit_pl.checks import check_number
from maskgit_pl.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MaskSchedule", "Rounding", "check_mask_schedule", "mask_schedules", "num_masked"]

Rounding = Literal["ceil", "floor"]

_CHECKED_NUM_TOKENS = (2, 16, 49, 256, 1024)
_CHECKED_POINTS = 257
_MIN_RATIO = 1e-6  # released code: gamma is clipped to [1e-6, 1]


class MaskSchedule(ABC):
    """A function of progress in [0, 1] to a mask ratio that falls from 1 to 0. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        """Computes the mask ratio.

        Args:
            progress: Any shape, float32, in [0, 1]. Training draws it uniformly; decoding passes (t + 1) / T.
            num_tokens: Tokens of an image; ``exp`` and ``log`` depend on it.

        Returns:
            Shape and dtype of ``progress``, in [0, 1].
        """


def num_masked(ratio: Tensor, num_tokens: int | Tensor, *, rounding: Rounding) -> Tensor:
    """Counts the tokens that a mask ratio masks: the only place where a ratio becomes a count.

    count = ceil or floor of clip(ratio, 1e-6, 1) * num_tokens, in float32 as in the released code (cos(pi / 3) is
    0.49999997 there, so that 256 tokens give 127 under floor).

    Args:
        ratio: Any shape, float, in [0, 1].
        num_tokens: Tokens that could be masked; an integer or a tensor that broadcasts with ``ratio``.
        rounding: ``"ceil"`` in training (paper), ``"floor"`` in decoding (released code).

    Returns:
        int64, in [0, num_tokens].

    Raises:
        ValueError: if the rounding is unknown.

    Source: paper, section on mask scheduling (ceil); google-research/maskgit, ``parallel_decode.py`` (floor).
    """
    scaled = ratio.float().clamp(_MIN_RATIO, 1.0) * num_tokens
    if rounding == "ceil":
        return scaled.ceil().long()
    if rounding == "floor":
        return scaled.floor().long()
    raise ValueError(f"rounding: 'ceil' or 'floor' is needed, got {rounding!r}")


def check_mask_schedule(name: str, schedule: MaskSchedule) -> None:
    """Checks that a schedule keeps the contract of mask schedules.

    At 2, 16, 49, 256 and 1024 tokens its values must be finite, in [0, 1], of the shape of progress, never rise, and
    go from 1 to 0 within 1 / num_tokens.

    Raises:
        ValueError: if it does not, with the name, the rule and what was seen.
    """
    import torch

    progress = torch.linspace(0.0, 1.0, _CHECKED_POINTS)
    for num_tokens in _CHECKED_NUM_TOKENS:
        try:
            ratio = schedule(progress, num_tokens)
        except Exception as error:
            raise ValueError(f"mask schedule {name!r}: it raised at {num_tokens} tokens: {error!r}") from error
        broken = _find_broken_rule(ratio, progress, tolerance=1.0 / num_tokens + _MIN_RATIO)
        if broken is not None:
            raise ValueError(f"mask schedule {name!r}: {broken} (at {num_tokens} tokens)")


def _find_broken_rule(ratio: object, progress: Tensor, *, tolerance: float) -> str | None:
    from torch import Tensor

    if not isinstance(ratio, Tensor) or ratio.shape != progress.shape or not ratio.is_floating_point():
        seen = f"{ratio.dtype} {tuple(ratio.shape)}" if isinstance(ratio, Tensor) else type(ratio).__name__
        return f"it must return a float tensor in the shape of progress {tuple(progress.shape)}, got {seen}"
    rules = (
        (bool(ratio.isfinite().all()), "its values must be finite"),
        (bool((ratio >= 0).all() and (ratio <= 1).all()), "its values must lie in [0, 1]"),
        (bool((ratio.diff() <= 1e-6).all()), "it must never rise"),
        (float(ratio[0]) >= 1 - tolerance, f"it must start at 1, got {float(ratio[0]):.4g} at progress 0"),
        (float(ratio[-1]) <= tolerance, f"it must end at 0, got {float(ratio[-1]):.4g} at progress 1"),
    )
    return next((rule for holds, rule in rules if not holds), None)


mask_schedules: Registry[MaskSchedule] = Registry(
    "mask schedule", "maskgit_pl.mask_schedules", check=check_mask_schedule
)


@mask_schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(MaskSchedule):
    """cos(pi r / 2): the paper's best. Source: paper, Table 3."""

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return (progress * (math.pi / 2)).cos().clamp(0.0, 1.0)


@mask_schedules.register("arccos")
@dataclass(frozen=True)
class Arccos(MaskSchedule):
    """2 / pi acos(r): the mean of cosine, less spread. Source: Halton-MaskGIT, TiTok, MaskBit."""

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return progress.acos() * (2 / math.pi)


@mask_schedules.register("pow")
@dataclass(frozen=True)
class Pow(MaskSchedule):
    """1 - r^exponent. Source: paper, Table 3 (the released code names them ``pow2``, ``pow3``, ``pow0.5``).

    Args:
        exponent: In [0.001, 1000]; above 1 concave (more tokens stay masked for longer), below 1 convex.
    """

    exponent: float

    def __post_init__(self) -> None:
        check_number("exponent", self.exponent, "[0.001, 1000]")

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return 1 - progress.pow(self.exponent)


def _make_power(exponent: float) -> Callable[[], Pow]:
    return lambda: Pow(exponent)


for _name, _exponent in (("linear", 1.0), ("square", 2.0), ("cubic", 3.0), ("sqrt", 0.5)):  # paper, Table 3
    mask_schedules.register(_name)(_make_power(_exponent))


@mask_schedules.register("exp")
@dataclass(frozen=True)
class Exponential(MaskSchedule):
    """1 - 2^(-log2(N) (1 - r)). Source: paper, Table 3 (exponential); formula of the released code."""

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return 1 - (-math.log2(num_tokens) * (1 - progress)).exp2()


@mask_schedules.register("log")
@dataclass(frozen=True)
class Logarithmic(MaskSchedule):
    """-log2(r) / log2(N). Source: paper, Table 3 (logarithmic); formula of the released code."""

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return (-progress.log2() / math.log2(num_tokens)).clamp(0.0, 1.0)

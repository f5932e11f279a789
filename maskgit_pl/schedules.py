"""Mask schedules: the fraction of tokens that is masked, as a function of progress.

One object serves training (``masking.MaskSampler`` draws mask ratios from it) and inference
(``decoding.ParallelDecoder`` computes from it how many tokens stay masked after each step), so the two cannot differ.
Rounding happens in one place, ``num_masked``. ``halton_order`` gives the order that training and decoding can visit the
positions in. Functions import torch where they need it, so the command line can refuse an unknown name immediately.

Your own schedule is a registered frozen dataclass::

    @mask_schedules.register("sine")
    @dataclass(frozen=True)
    class Sine(MaskSchedule):
        def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
            import torch

            return 1 - torch.sin(progress * math.pi / 2)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from maskgit_pl.checks import check_number
from maskgit_pl.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MaskSchedule",
    "Rounding",
    "check_mask_schedule",
    "halton_order",
    "mask_schedules",
    "num_masked",
]

Rounding = Literal["ceil", "floor"]
_CHECKED_NUM_TOKENS = (2, 16, 49, 256, 1024)  # the grids of the recipes, and small ones
_CHECKED_POINTS = 257  # with the quarters of [0, 1]
_MIN_RATIO = 1e-6  # released code: gamma is clipped to [1e-6, 1]


class MaskSchedule(ABC):
    """A function gamma of progress in [0, 1] that falls from 1 to 0. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        """Computes the mask ratio.

        Args:
            progress: float32 of any shape, in [0, 1]. Training draws it uniformly; decoding passes (t + 1) / T.
            num_tokens: N, tokens per image; ``exp`` and ``log`` depend on it.

        Returns:
            Mask ratios in [0, 1], with the shape and dtype of ``progress``.
        """


mask_schedules: Registry[MaskSchedule] = Registry(
    "mask schedule", "maskgit_pl.mask_schedules", check=lambda name, made: check_mask_schedule(name, made)
)


@mask_schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(MaskSchedule):
    """cos(pi r / 2), the best schedule of the paper. Source: paper, Table 3."""

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return (progress * (math.pi / 2)).cos().clamp(0.0, 1.0)


@mask_schedules.register("arccos")
@dataclass(frozen=True)
class Arccos(MaskSchedule):
    """2 / pi acos(r): the same mean as cosine, with less variance. Source: Halton-MaskGIT, TiTok, MaskBit."""

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return progress.acos() * (2 / math.pi)


@mask_schedules.register("pow")
@dataclass(frozen=True)
class Pow(MaskSchedule):
    """1 - r^exponent. Source: paper, Table 3 (the released code names them ``pow2``, ``pow3``, ``pow0.5``).

    Args:
        exponent: Exponent in [0.001, 1000]. Above 1 the schedule is concave (more tokens stay masked for
            longer), below 1 convex.
    """

    exponent: float

    def __post_init__(self) -> None:
        check_number("exponent", self.exponent, "[0.001, 1000]")

    def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
        return 1 - progress.pow(self.exponent)


@mask_schedules.register("linear")
def _linear() -> Pow:
    """1 - r. Source: paper, Table 3."""
    return Pow(1.0)


@mask_schedules.register("square")
def _square() -> Pow:
    """1 - r^2. Source: paper, Table 3."""
    return Pow(2.0)


@mask_schedules.register("cubic")
def _cubic() -> Pow:
    """1 - r^3. Source: paper, Table 3."""
    return Pow(3.0)


@mask_schedules.register("sqrt")
def _sqrt() -> Pow:
    """1 - r^0.5. Source: paper, Table 3."""
    return Pow(0.5)


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


def num_masked(ratio: Tensor, num_tokens: int | Tensor, *, rounding: Rounding) -> Tensor:
    """Computes the number of tokens that a mask ratio masks: the only place where a ratio becomes a count.

    count = ceil or floor of clip(ratio, 1e-6, 1) * num_tokens

    The product is in float32 as in the released code: cos(pi / 3) is 0.49999997 there, so floor gives 127 for
    256 tokens.

    Args:
        ratio: float of any shape, in [0, 1].
        num_tokens: Number of tokens that could be masked: an integer, or a tensor that broadcasts with ``ratio``.
        rounding: ``"ceil"`` in training (paper), ``"floor"`` in decoding (released code).

    Returns:
        int64 in [0, num_tokens].

    Source: paper, section on mask scheduling (ceil); google-research/maskgit, ``parallel_decode.py`` (floor).
    """
    scaled = ratio.float().clamp(_MIN_RATIO, 1.0) * num_tokens
    return (scaled.ceil() if rounding == "ceil" else scaled.floor()).long()


def check_mask_schedule(name: str, schedule: MaskSchedule) -> None:
    """Checks the contract of a mask schedule at 2, 16, 49, 256 and 1024 tokens.

    Its values must be in [0, 1], in the shape of progress, never rise, and go from 1 to 0 up to 1 / num_tokens.

    Raises:
        ValueError: if the schedule breaks the contract. The message has the name, the rule and the value.
    """
    import torch

    progress = torch.linspace(0.0, 1.0, _CHECKED_POINTS)
    for num_tokens in _CHECKED_NUM_TOKENS:
        ratio = schedule(progress, num_tokens)
        broken = _find_broken_rule(ratio, progress, tolerance=1.0 / num_tokens + _MIN_RATIO)
        if broken is not None:
            raise ValueError(f"mask schedule {name!r}: {broken} (at {num_tokens} tokens)")


def _find_broken_rule(ratio: Any, progress: Tensor, *, tolerance: float) -> str | None:
    """Returns the first rule that the values break; None if they keep all rules."""
    if not (isinstance(ratio, type(progress)) and ratio.shape == progress.shape and ratio.is_floating_point()):
        seen = f"{ratio.dtype} {tuple(ratio.shape)}" if isinstance(ratio, type(progress)) else type(ratio).__name__
        return f"it must return a float tensor in the shape of progress {tuple(progress.shape)}, got {seen}"
    rules = (
        (bool((ratio >= 0).all() and (ratio <= 1).all()), "its values must lie in [0, 1]"),
        (bool((ratio.diff() <= 1e-6).all()), "it must never rise"),
        (float(ratio[0]) >= 1 - tolerance, f"it must start at 1, got {float(ratio[0]):.4g} at progress 0"),
        (float(ratio[-1]) <= tolerance, f"it must end at 0, got {float(ratio[-1]):.4g} at progress 1"),
    )
    return next((rule for holds, rule in rules if not holds), None)


def halton_order(grid: tuple[int, ...]) -> list[int]:
    """Returns the positions of a grid of 1 to 3 axes in the order of a Halton sequence, of bases 2, 3 and 5.

    Consecutive positions are far apart. Used by ``masking`` and by ``decoding.selectors``.

    Source: Besnier et al., arXiv:2503.17076, for two axes.
    """
    order: dict[int, None] = {}  # a dictionary keeps the order of the first visits, and ignores later ones
    point = 0
    while len(order) < math.prod(grid):
        point += 1
        position = 0
        # Bases without a common factor make the coordinates independent of each other.
        for size, base in zip(grid, (2, 3, 5), strict=False):
            position = position * size + int(_radical_inverse(point, base) * size)
        order[position] = None
    return list(order)


def _radical_inverse(number: int, base: int) -> float:
    """Returns the digits of a number in a base, mirrored at the radix point: a number in [0, 1)."""
    mirrored, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        mirrored, scale = mirrored * base + digit, scale * base
    return mirrored / scale

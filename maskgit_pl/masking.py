"""The masks of training: how many tokens of an image are masked, and which. Section 3.1 of the paper.

``MaskSampler`` draws them for ``mvtm.MaskedTokenModel``. It holds the mask schedule that decoding follows
too, a ``MaskRatio`` (by default gamma(u), the ratio of that schedule) and ``MaskPositions`` (by default
uniform). ``evaluation.likelihood`` draws masks with ``UniformPositions``.

A mask ratio is a function of a uniform number u, usually its inverse cumulative distribution: the u of a global batch
are stratified, so the ratios are stratified too. Your own ratios and positions are registered frozen dataclasses::

    @mask_ratios.register("quarter")
    @dataclass(frozen=True)
    class Quarter(MaskRatio):
        def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
            return 0.75 + 0.25 * u

    @mask_positions.register("top")
    @dataclass(frozen=True)
    class Top(MaskPositions):
        def order(self, num_tokens, *, grid, seed, index, epoch):
            return torch.arange(num_tokens, device=index.device).expand(len(index), -1)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.schedules import MaskSchedule, halton_order, mask_schedules, num_masked

__all__ = [
    "Draws",
    "MaskPositions",
    "MaskRatio",
    "MaskSampler",
    "UniformPositions",
    "mask_positions",
    "mask_ratios",
    "true_positions",
]

Grid = tuple[int, ...]

_CHECKED_POINTS = 257  # with the quarters of [0, 1]


@dataclass(frozen=True)
class MaskSampler:
    """A sampler of the masks of masked visual token modeling.

    The steps for each sample:

    1. Draw u, uniform on [0, 1). The u of a global batch of G samples are stratified: u = (pi(slot) + v) / G,
       with a random permutation pi for each step and v uniform on (0, 1). Together they cover [0, 1) evenly,
       which lowers the variance of the gradient.
    2. Compute the mask ratio gamma(u), or with another distribution.
    3. Mask ceil(ratio N) positions, chosen uniformly or by another rule.

    The masks depend on (seed, sample, epoch, position) only, so they are equal for every number of ranks.

    Args:
        mask_schedule: gamma: the schedule object that the decoder holds too.
        seed: Seed in [0, 2**32).
        mask_ratio: The distribution of the ratio.
        mask_positions: The rule that chooses the positions.

    Source: paper, training objective.
    """

    mask_schedule: MaskSchedule
    seed: int
    mask_ratio: MaskRatio = field(default_factory=lambda: ScheduleRatio())
    mask_positions: MaskPositions = field(default_factory=lambda: UniformPositions())

    def mask(
        self,
        num_tokens: int,
        *,
        index: Tensor,
        epoch: Tensor,
        position: Tensor,
        global_batch: int,
        grid: Grid | None = None,
    ) -> Tensor:
        """Draws the masks of a batch.

        Args:
            num_tokens: N, tokens per image.
            index: (B,) int64 in [0, 2**32): global sample index.
            epoch: (B,) int64 in [0, 2**32): epoch of each sample.
            position: (B,) int64: position in the training stream, step * global_batch + slot.
            global_batch: G, samples per step over all ranks.
            grid: Sizes of the 1 to 3 axes of the token grid, for rules that depend on the place.

        Returns:
            (B, N) bool, True = masked; each row has 1 to N masked positions.
        """
        ratio = self.ratio(num_tokens, index=index, epoch=epoch, position=position, global_batch=global_batch)
        count = num_masked(ratio, num_tokens, rounding="ceil")  # 3.
        return self.mask_positions.mask(count, num_tokens, grid=grid, seed=self.seed, index=index, epoch=epoch)

    def ratio(self, num_tokens: int, *, index: Tensor, epoch: Tensor, position: Tensor, global_batch: int) -> Tensor:
        """Draws mask ratios, (B,) float32 in [0, 1]; see ``mask`` for the arguments."""
        stratum = self._draw_stratum(position, global_batch)  # 1.
        jitter = random_uniform("mask-ratio", seed=self.seed, index=index, epoch=epoch)[:, 0]
        u = ((stratum + jitter) / global_batch).clamp(max=1.0)  # (B,) float32 in [0, 1]
        return self.mask_ratio(u, self.mask_schedule, num_tokens)  # 2.

    def _draw_stratum(self, position: Tensor, global_batch: int) -> Tensor:
        """Returns pi(slot), (B,) int64 in [0, G): the number of random keys of the step below the key of the slot."""
        # Each rank computes all G keys of the step, so ranks agree on pi without communication.
        step, slot = position // global_batch, position % global_batch
        words = random_bits("mask-ratio/stratum", seed=self.seed, index=0, epoch=step, count=global_batch)
        # The slot as the last digit makes the keys distinct: equal words would otherwise share a stratum.
        keys = words * global_batch + torch.arange(global_batch, device=words.device)  # (B, G)
        return (keys < keys.gather(1, slot.unsqueeze(1))).sum(1)


class MaskRatio(ABC):
    """A distribution of the mask ratio: a monotone function of a uniform number. Subclasses are frozen dataclasses."""

    @abstractmethod
    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        """Computes the mask ratio.

        Args:
            u: (B,) float32, uniform on [0, 1].
            mask_schedule: gamma: the schedule object that the decoder holds too.
            num_tokens: N, tokens per image.

        Returns:
            (B,) float32 in [0, 1].
        """


def _check_mask_ratio(name: str, mask_ratio: MaskRatio) -> None:
    """Checks that the ratios of a distribution are finite and in [0, 1]."""
    derives_from(MaskRatio)(name, mask_ratio)
    ratio = mask_ratio(torch.linspace(0, 1, _CHECKED_POINTS), mask_schedules.build("cosine"), 256)
    if not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError(
            f"mask ratio {name!r}: its values must lie in [0, 1], got {float(ratio.min()):g} to {float(ratio.max()):g}"
        )


mask_ratios: Registry[MaskRatio] = Registry("mask ratio", "maskgit_pl.mask_ratios", check=_check_mask_ratio)


@mask_ratios.register("schedule")
@dataclass(frozen=True)
class ScheduleRatio(MaskRatio):
    """gamma(u), the mask schedule that decoding follows too. Source: paper, training objective."""

    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        return mask_schedule(u, num_tokens)


@mask_ratios.register("uniform")
@dataclass(frozen=True)
class UniformRatio(MaskRatio):
    """The uniform distribution on [low, high]: low + (high - low) u.

    Args:
        low: Smallest ratio, in [0, 1).
        high: Largest ratio, in (low, 1].

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

    def __call__(self, u: Tensor, mask_schedule: MaskSchedule, num_tokens: int) -> Tensor:
        # Phi(a) and Phi(b).
        below, above = (0.5 * math.erfc((self.mean - end) / self.std / math.sqrt(2)) for end in (self.low, self.high))
        probability = below + (above - below) * u.double()  # float32 has no digits left near probability 1
        ratio: Tensor = self.mean + self.std * torch.special.ndtri(probability)
        return ratio.float().clamp(self.low, self.high)


class MaskPositions(ABC):
    """A rule that chooses the masked positions of each image. Subclasses are frozen dataclasses."""

    @abstractmethod
    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        """Returns the order in which positions are masked: a permutation of range(N) for each row, (B, N) int64.

        It must be a function of (seed, index, epoch) only.

        Args:
            num_tokens: N, tokens per image.
            grid: Sizes of the axes of the token grid; None if not given.
            seed: Seed in [0, 2**32).
            index: (B,) int64 in [0, 2**32): sample index.
            epoch: (B,) int64 or an integer, in [0, 2**32).
        """

    def mask(
        self,
        count: Tensor,
        num_tokens: int,
        *,
        grid: Grid | None = None,
        seed: int,
        index: Tensor,
        epoch: Tensor | int = 0,
    ) -> Tensor:
        """Draws masks with exactly ``count`` (B,) int64 positions; see ``order`` for the other arguments.

        Returns:
            (B, N) bool, True = masked.
        """
        order = self.order(num_tokens, grid=grid, seed=seed, index=index, epoch=epoch)  # (B, N)
        is_first = torch.arange(num_tokens, device=order.device) < count.unsqueeze(1)  # (B, N): columns in that order
        return torch.zeros_like(is_first).scatter(1, order, is_first)


def _check_mask_positions(name: str, positions: MaskPositions) -> None:
    """Checks that a rule gives a permutation of the positions of a grid of 2 x 3 tokens, for each row."""
    derives_from(MaskPositions)(name, positions)
    index = torch.arange(3)
    order = positions.order(6, grid=(2, 3), seed=0, index=index, epoch=torch.zeros_like(index))
    if not torch.equal(order.sort(dim=1).values, torch.arange(6).expand(3, 6)):
        raise ValueError(f"mask positions {name!r}: each row must hold all positions once, got {order.tolist()}")


mask_positions: Registry[MaskPositions] = Registry(
    "mask positions", "maskgit_pl.mask_positions", check=_check_mask_positions
)


@mask_positions.register("uniform")
@dataclass(frozen=True)
class UniformPositions(MaskPositions):
    """All sets of positions are equally likely. Source: paper, training objective."""

    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        # Sorting random keys gives a uniformly random order of the positions. A stable sort breaks ties by
        # position, so the mask is bit-exact on every device.
        keys = random_bits("mask", seed=seed, index=index, epoch=epoch, count=num_tokens)  # (B, N)
        return keys.argsort(dim=1, stable=True)


@mask_positions.register("halton")
@dataclass(frozen=True)
class HaltonPositions(MaskPositions):
    """The masks that decoding with the token selector ``halton`` sees: the end of a Halton order, randomly rolled.

    The visible tokens are consecutive in the order, so that they are spread evenly over the image.

    Source: Besnier et al., arXiv:2503.17076, for the order and its roll; their training masks uniformly.
    """

    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        assert grid is not None, "MaskSampler.mask(grid=(h, w))"
        order = _halton_tensor(grid, index.device)  # (N,)
        shift = random_bits("mask/halton", seed=seed, index=index, epoch=epoch)[:, :1] % num_tokens  # (B, 1)
        # Decoding begins with the visible tokens, so the masked ones are the last of its order.
        backwards = torch.arange(num_tokens - 1, -1, -1, device=order.device)
        return order[(backwards + shift) % num_tokens]


@lru_cache(maxsize=16)
def _halton_tensor(grid: Grid, device: torch.device) -> Tensor:
    return torch.tensor(halton_order(grid)).to(device)


class Draws(NamedTuple):
    """The random draws of a micro-batch of B images of N tokens, a function of its samples.

    They are made on the host, before the batch is copied to the device: there the number of masked tokens is known, so
    that no operation on the device has a size that depends on values, for which the host would wait.

    Args:
        labels: (B,) int64: the labels, some of them replaced by the null label.
        mask: (B, N) bool, True = masked.
        positions: (M,) int64 in [0, B N): the tokens that the network predicts, by their places in the batch,
            rising.
    """

    labels: Tensor
    mask: Tensor
    positions: Tensor

    @property
    def rows(self) -> Tensor:
        """The image of each predicted token, (M,) int64 in [0, B)."""
        return self.positions // self.mask.shape[1]

    @property
    def is_masked(self) -> Tensor:
        """The predicted tokens that the network does not see, (M,) bool."""
        return self.mask.flatten()[self.positions]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Draws:
        """Returns a copy on a device; see ``torch.Tensor.to``."""
        return Draws(*(part.to(device, non_blocking=non_blocking) for part in self))

    def pin_memory(self) -> Draws:
        """Returns a copy in pinned memory, from which copies to a GPU do not wait."""
        return Draws(*(part.pin_memory() for part in self))


def true_positions(mask: Tensor) -> Tensor:
    """Returns the places (M,) int64, rising, where a mask (B, N) bool is True; see ``Draws.positions``."""
    return mask.flatten().nonzero().squeeze(1)

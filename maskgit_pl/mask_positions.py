"""The positions that a training mask covers, given their number: uniform, blocks or a Halton order.

Used by ``masking.MaskSampler``. Your own rule is a registered frozen dataclass::

    @mask_positions.register("top")
    @dataclass(frozen=True)
    class Top(MaskPositions):
        def order(self, num_tokens, *, grid, seed, index, epoch):
            return torch.arange(num_tokens, device=index.device).expand(len(index), -1)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from maskgit_pl.checks import check_number, shorten
from maskgit_pl.halton import halton_order
from maskgit_pl.randomness import random_bits, random_uniform
from maskgit_pl.registry import Registry

__all__ = ["Grid", "MaskPositions", "mask_positions", "random_mask"]

Grid = tuple[int, int]

_NUM_BLOCKS = 32  # blocks drawn per image; positions that none of them covers are masked last


class MaskPositions(ABC):
    """A rule that chooses the masked positions of each image. Subclasses are frozen dataclasses."""

    @abstractmethod
    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        """Returns the order in which positions are masked: a permutation of range(N) for each row, (B, N) int64.

        It must be a function of (seed, index, epoch) only.

        Args:
            num_tokens: N, tokens per image.
            grid: Rows and columns of tokens; None if not given.
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

        Raises:
            ValueError: if the rule requires a grid and ``grid`` is None or does not hold N tokens.
        """
        order = self.order(num_tokens, grid=grid, seed=seed, index=index, epoch=epoch)  # (B, N)
        is_first = torch.arange(num_tokens, device=order.device) < count.unsqueeze(1)  # (B, N): columns in that order
        return torch.zeros_like(is_first).scatter(1, order, is_first)


def _check_grid(name: str, grid: Grid | None, num_tokens: int) -> Grid:
    if grid is None or math.prod(grid) != num_tokens:
        raise ValueError(
            f"mask positions {name} require the grid (rows, columns) of the {num_tokens} tokens, got {grid}; call "
            "MaskSampler.mask(grid=(rows, columns))"
        )
    return grid


def check_mask_positions(name: str, positions: MaskPositions) -> None:
    """Checks the contract of a rule on a grid of 2 x 3 tokens: a permutation of the positions for each row.

    Raises:
        ValueError: if the rule breaks the contract. The message has the name, the rule and the value.
    """
    if not isinstance(positions, MaskPositions):
        raise ValueError(f"mask positions {name!r} must be MaskPositions, got {shorten(positions)}")
    index = torch.arange(3)
    order = positions.order(6, grid=(2, 3), seed=0, index=index, epoch=torch.zeros_like(index))
    if not isinstance(order, Tensor) or order.shape != (3, 6) or order.dtype != torch.int64:
        seen = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else shorten(order)
        raise ValueError(f"mask positions {name!r}: the order must be an int64 tensor (B, N), got {seen}")
    if not torch.equal(order.sort(dim=1).values, torch.arange(6).expand(3, 6)):
        raise ValueError(f"mask positions {name!r}: each row must hold all positions once, got {order.tolist()}")


mask_positions: Registry[MaskPositions] = Registry(
    "mask positions", "maskgit_pl.mask_positions", check=check_mask_positions
)


@mask_positions.register("uniform")
@dataclass(frozen=True)
class UniformPositions(MaskPositions):
    """All sets of positions are equally likely. Source: paper, training objective."""

    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        # Sorting random keys gives a uniformly random order of the positions. A stable sort breaks ties by position, so
        # the mask is bit-exact on every device.
        keys = random_bits("mask", seed=seed, index=index, epoch=epoch, count=num_tokens)  # (B, N)
        return keys.argsort(dim=1, stable=True)


def random_mask(count: Tensor, num_tokens: int, *, seed: int, index: Tensor, epoch: Tensor | int = 0) -> Tensor:
    """Draws uniformly random masks with a given number of positions, a function of (seed, index, epoch) only.

    Args:
        count: (B,) int64 in [0, N]: masked positions of each row.
        num_tokens: N, tokens per image.
        seed: Seed in [0, 2**32).
        index: (B,) int64 in [0, 2**32): sample index.
        epoch: (B,) int64 or an integer, in [0, 2**32); each epoch gives other masks.

    Returns:
        (B, N) bool, True = masked.
    """
    return UniformPositions().mask(count, num_tokens, seed=seed, index=index, epoch=epoch)


@mask_positions.register("blocks")
@dataclass(frozen=True)
class BlockPositions(MaskPositions):
    """Rectangles of random size and place, one after another, until the count is reached; the last one is cut.

    Height and width of a rectangle are independent: uniform on the integers between ``min_side * max_side`` and
    ``max_side`` times the rows and columns, rounded up. Its place is uniform. At most 32 rectangles are drawn per
    image. Positions outside of all rectangles are masked last, in random order.

    Args:
        max_side: Largest side as a fraction of the grid's side, in (0, 1].
        min_side: Smallest side as a fraction of the largest one, in (0, 1].

    Raises:
        ValueError: if a number is out of range.

    Source: the idea is that of blockwise masking, BEiT, arXiv:2106.08254; the sizes are not.
    """

    max_side: float = 0.5
    min_side: float = 0.5

    def __post_init__(self) -> None:
        check_number("max_side", self.max_side, "(0, 1]")
        check_number("min_side", self.min_side, "(0, 1]")

    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        grid = _check_grid("blocks", grid, num_tokens)
        uniform = random_uniform("mask/blocks", seed=seed, index=index, epoch=epoch, count=4 * _NUM_BLOCKS)
        u = uniform.view(-1, _NUM_BLOCKS, 4, 1)  # (B, blocks, numbers, 1)
        place = torch.arange(num_tokens, device=u.device)
        rows, columns = place // grid[1], place % grid[1]  # (N,)
        inside = self._covers(u[:, :, 0], u[:, :, 1], rows, grid[0]) & self._covers(
            u[:, :, 2], u[:, :, 3], columns, grid[1]
        )  # (B, blocks, N)
        # The first block that covers a position; argmax of equal values returns any of them, so blocks are weighted.
        weights = torch.arange(_NUM_BLOCKS, 0, -1, device=u.device).view(-1, 1)
        first = _NUM_BLOCKS - (inside * weights).amax(1)  # (B, N) in [0, blocks]
        # Blocks in turn, and raster order within a block, so that a cut block stays in one piece.
        rest = random_bits("mask", seed=seed, index=index, epoch=epoch, count=num_tokens)  # (B, N) in [0, 2**32)
        keys = (first << 32) + rest.where(first == _NUM_BLOCKS, place)
        return keys.argsort(dim=1, stable=True)

    def _covers(self, u_size: Tensor, u_place: Tensor, places: Tensor, side: int) -> Tensor:
        """Returns (B, blocks, N) bool: True where an interval of random size and place covers ``places`` (N,)."""
        # Products of a float32 and an integer, rounded down: bit-exact on every device.
        least, most = (math.ceil(fraction * side) for fraction in (self.min_side * self.max_side, self.max_side))
        size = least + (u_size * (most - least + 1)).floor().long().clamp(max=most - least)  # (B, blocks, 1)
        start = (u_place * (side - size + 1)).floor().long().clamp(min=0).minimum(side - size)
        return (places >= start) & (places < start + size)


@mask_positions.register("halton")
@dataclass(frozen=True)
class HaltonPositions(MaskPositions):
    """The masks that decoding with the token selector ``halton`` sees: the end of a Halton order, randomly rolled.

    The visible tokens are consecutive in the order, so that they are spread evenly over the image.

    Source: Besnier et al., arXiv:2503.17076, for the order and its roll; their training masks uniformly.
    """

    def order(self, num_tokens: int, *, grid: Grid | None, seed: int, index: Tensor, epoch: Tensor | int) -> Tensor:
        order = _halton_tensor(_check_grid("halton", grid, num_tokens), index.device)  # (N,)
        shift = random_bits("mask/halton", seed=seed, index=index, epoch=epoch)[:, :1] % num_tokens  # (B, 1)
        # Decoding begins with the visible tokens, so the masked ones are the last of its order.
        backwards = torch.arange(num_tokens - 1, -1, -1, device=order.device)
        return order[(backwards + shift) % num_tokens]


@lru_cache(maxsize=16)
def _halton_tensor(grid: Grid, device: torch.device) -> Tensor:
    return torch.tensor(halton_order(grid)).to(device)

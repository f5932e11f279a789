"""Rotary positions: queries and keys are rotated by angles that grow with their position. Used by ``adaln``.

A pair of numbers (a, b) at a place t turns by the angle t w into (a cos - b sin, b cos + a sin), so that the product of
a query and a key depends on the difference of their places only.

Source: RoFormer, arXiv:2104.09864; rows and columns: EVA-02, arXiv:2303.11331, and LlamaGen, arXiv:2406.06525.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["Positions", "rotate", "rotation_table"]

Positions = Literal["learned", "rotary", "rotary-raster"]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates pairs of neighbouring numbers.

    Args:
        x: (..., S, D) float, D even.
        table: (..., S, D / 2, 2) float: cosine and sine of each pair.

    Returns:
        (..., S, D) in the dtype of x.
    """
    first, second = rearrange(x.float(), "... (pairs two) -> two ... pairs", two=2)  # (..., S, D / 2)
    cos, sin = table.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).type_as(x)


def rotation_table(
    kind: Positions, grid: tuple[int, int], length: int, size: int, base: float, device: torch.device
) -> Tensor:
    """Computes the cosines and sines of a sequence: the tokens of a grid, then a class token and registers.

    ``rotary`` rotates the first half of each head by the row of the token, the second half by its column; all other
    positions are not rotated. ``rotary-raster`` follows the released MaskGIL code: position t of the sequence is
    rotated by t - 1, and the first one has a table of zeros, so that its query and key vanish.

    Args:
        kind: ``rotary`` or ``rotary-raster``.
        grid: Rows and columns of the tokens.
        length: S, positions of the sequence.
        size: D, size of a head.
        base: Base of the wavelengths: pair i of P has the frequency base^(-i / P).
        device: Device that computes the table. It is cheap and not kept: a tensor that a fake or an inference mode made
            would fail in training.

    Returns:
        (S, D / 2, 2) float32.
    """
    if kind == "rotary-raster":
        table = _cos_sin(_angles(torch.arange(length, device=device) - 1, size, base))
        table[0] = 0
        return table
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    angles = torch.cat([_angles(places.flatten(), size // 2, base) for places in (rows, columns)], dim=1)
    # Angle 0 leaves class token and registers as they are.
    return _cos_sin(torch.cat([angles, angles.new_zeros(length - len(angles), angles.shape[1])]))


def _angles(places: Tensor, size: int, base: float) -> Tensor:
    """Returns the angles (places, size / 2) of ``size`` numbers."""
    return torch.outer(places.float(), base ** (-torch.arange(0, size, 2, device=places.device).float() / size))


def _cos_sin(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)

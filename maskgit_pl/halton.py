"""The Halton order of a grid, which visits the positions so that consecutive ones are far apart.

Used by ``mask_positions`` in training and by ``decoding.selectors`` in decoding.
"""

from __future__ import annotations

__all__ = ["halton_order"]


def halton_order(grid: tuple[int, int]) -> list[int]:
    """Returns the positions of a grid (rows, columns) in the order of a Halton sequence of bases 2 and 3.

    Source: Besnier et al., arXiv:2503.17076.
    """
    rows, columns = grid
    order: dict[int, None] = {}  # a dictionary keeps the order of the first visits, and ignores later ones
    point = 0
    while len(order) < rows * columns:
        point += 1
        # Bases without a common factor make the two coordinates independent of each other.
        row, column = int(_radical_inverse(point, 2) * rows), int(_radical_inverse(point, 3) * columns)
        order[row * columns + column] = None
    return list(order)


def _radical_inverse(number: int, base: int) -> float:
    """Returns the digits of a number in a base, mirrored at the radix point: a number in [0, 1)."""
    mirrored, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        mirrored, scale = mirrored * base + digit, scale * base
    return mirrored / scale

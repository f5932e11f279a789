"""The MLP of a block, in parts whose hidden values stay in the cache.

``PackingLinear`` makes bfloat16 products so fast that the second layer waits for hidden values that have left the
cache. In parts, some of the hidden values are computed and multiplied at once, and the products are added.
``benchmarks/feed_forward.py`` compares both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from maskgit_pl.devices import has_amx
from maskgit_pl.networks.kernels import PackingLinear, add_output

__all__ = ["feed_forward"]

# Bytes of hidden values per thread above which two parts, or parts of at least 1024 values, are faster.
_HALVED, _SPLIT = 2_000_000, 4_000_000
_SMALLEST_PART = 1024

_has_amx = cache(has_amx)

_Gate = Callable[[Tensor, Tensor], Tensor]


def feed_forward(
    x: Tensor, inner: nn.Module, outer: nn.Module, gate: _Gate | None = None, *, to: Tensor | None = None
) -> Tensor:
    """Returns the output of an MLP, ``outer(inner(x))``.

    With packed bfloat16 weights and many rows, it is the sum of parts, which is the same to rounding.

    Args:
        x: (..., D).
        inner: Layer (..., D) -> (..., H) with the activation; (..., D) -> (..., 2 H) with ``gate``.
        outer: Layer (..., H) -> (..., E).
        gate: Function of both halves of the output of ``inner``, (..., H) each, to hidden values (..., H). It works
            value by value.
        to: (..., E), to which the output is added; None for zero.

    Returns:
        (..., E).
    """
    # Other layers, such as those with 8-bit weights, have no parts.
    if isinstance(inner, PackingLinear) and isinstance(outer, PackingLinear):
        num_parts = 1
        if x.dtype == torch.bfloat16 and inner.packs_for(x):
            num_parts = _count_parts(x.numel() // x.shape[-1], outer.in_features)
        for layer in (inner, outer):
            layer.set_num_parts(num_parts)
        if num_parts > 1:
            return _sum_parts(x, inner, outer, gate, to, num_parts)
    hidden: Tensor = inner(x)
    if gate is not None:
        hidden = gate(*hidden.chunk(2, dim=-1))
    out: Tensor = outer(hidden) if to is None else add_output(to, outer, hidden)
    return out


def _sum_parts(
    x: Tensor, inner: PackingLinear, outer: PackingLinear, gate: _Gate | None, to: Tensor | None, num_parts: int
) -> Tensor:
    hidden_dim = outer.in_features
    for first, last in pairwise(range(0, hidden_dim + 1, hidden_dim // num_parts)):
        hidden = inner.part(x, first, last)
        if gate is not None:
            hidden = gate(hidden, inner.part(x, hidden_dim + first, hidden_dim + last))
        to = outer.add_part(to, hidden, first, last)
    assert to is not None
    return to


def _count_parts(num_rows: int, hidden_dim: int) -> int:
    """Returns the number of equal parts of bfloat16 hidden values (num_rows, hidden_dim)."""
    if not _has_amx():  # the products are too slow to wait for the cache
        return 1
    num_bytes = 2 * num_rows * hidden_dim / torch.get_num_threads()
    most = hidden_dim // _SMALLEST_PART
    wanted = most if num_bytes > _SPLIT else min(2, most) if num_bytes > _HALVED else 1
    return next((parts for parts in range(wanted, 1, -1) if hidden_dim % parts == 0), 1)

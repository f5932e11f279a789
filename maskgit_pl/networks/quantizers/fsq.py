"""Finite scalar quantization: each channel of a feature is bounded and rounded to a few levels, without a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.checks import check_integer, shorten
from maskgit_pl.networks.quantizers.base import (
    Quantizer,
    QuantizerOutput,
    quantizer_output,
    quantizers,
    rows_of,
    straight_through,
)

__all__ = ["FSQ", "FSQSpec"]

_MARGIN = 1e-3  # keeps tanh from reaching the outermost half levels; source: arXiv:2309.15505, appendix A.1
_MAX_CODES = 2**24


class FSQ(Quantizer):
    """A quantizer that rounds each channel of a feature; see ``FSQSpec``. It has no parameters and no buffers."""

    def __init__(self, spec: FSQSpec) -> None:
        super().__init__(codebook_size=math.prod(spec.levels), code_dim=len(spec.levels))
        self.spec = spec

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place: the mixed-radix number of its levels.

        Args:
            features: (B, D, h, w) float.

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        return self._tokens(self._bound(rows_of(features).float()).round()).view(features.shape[0], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32 in [-1, 1]."""
        levels, basis = self._constants(tokens, torch.int64)
        return (tokens.unsqueeze(-1) // basis % levels - levels // 2).float() / (levels // 2)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is 0, and the gradient passes the rounding and not the bound."""
        rows = rows_of(features).float()
        bounded = self._bound(rows)
        rounded = bounded.round()
        levels, _ = self._constants(rows, torch.int64)
        quantized = straight_through(bounded, rounded) / (levels // 2)
        return quantizer_output(features, quantized, self._tokens(rounded.detach()), rows.new_zeros(()))

    def _bound(self, rows: Tensor) -> Tensor:
        """Maps rows (M, D) to the interval whose rounding has L integers, -(L // 2) and up, in each channel."""
        levels, _ = self._constants(rows, torch.float32)
        half = (levels - 1) * (1 - _MARGIN) / 2
        # An even number of levels is not symmetric about 0: half a level down.
        offset = (1 - levels % 2) / 2
        return torch.tanh(rows + torch.tan(offset / half)) * half - offset

    def _tokens(self, rounded: Tensor) -> Tensor:
        """Returns the tokens (M,) of rounded rows (M, D)."""
        levels, basis = self._constants(rounded, torch.int64)
        return ((rounded.long() + levels // 2) * basis).sum(-1)

    def _constants(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the levels and the basis of the tokens, (D,) each, filled on the device without a copy."""
        levels = self.spec.levels
        basis = [math.prod(levels[:place]) for place in range(len(levels))]
        made = [_filled(values, like, dtype) for values in (levels, basis)]
        return made[0], made[1]


def _filled(values: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.full((), value, dtype=dtype, device=like.device) for value in values])


@quantizers.register("fsq")
@dataclass(frozen=True)
class FSQSpec:
    """Finite scalar quantization: channel i is bounded by tanh and rounded to one of L_i levels.

    f(z) = tanh(z + tan(o / h)) h - o,  h = (L - 1) (1 - 0.001) / 2,  o = 1/2 for even L, 0 for odd L
    code = round(f(z)) / (L // 2),  token = sum_i (round(f(z_i)) + L_i // 2) prod_(j < i) L_j

    K = prod_i L_i and D is the number of channels. There is no loss and nothing to collapse: all codes are in use.

    Attributes:
        levels: The number of levels of each channel, in [2, 4096] each. The paper takes 5 or more, such as (8, 6, 5)
            for 240 codes, (8, 5, 5, 5) for 1000, (8, 8, 8, 6, 5) for 15360.

    Raises:
        ValueError: if there is no level, one is out of range, or there are over 2^24 codes.

    Source: Mentzer et al., arXiv:2309.15505, section 3 and appendix A.1; levels: table 1.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        if not isinstance(self.levels, list | tuple) or not self.levels:
            raise ValueError(f"levels must be a list of integers, one a channel, got {shorten(self.levels)}")
        for level in self.levels:
            check_integer("levels", level, "[2, 4096]")
        object.__setattr__(self, "levels", tuple(self.levels))
        if (size := math.prod(self.levels)) > _MAX_CODES:
            raise ValueError(
                f"levels must have a product of at most {_MAX_CODES}, got {size} for {shorten(self.levels)}"
            )

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that K is the product of the levels and D their number.

        Raises:
            ValueError: if not.
        """
        size, product = math.prod(self.levels), "*".join(map(str, self.levels))
        if codebook_size != size:
            raise ValueError(
                f"network codebook_size must be {size} = {product} for quantizer 'fsq', got {codebook_size}; "
                "change it, or quantizer.levels"
            )
        if code_dim != len(self.levels):
            raise ValueError(
                f"network code_dim must be {len(self.levels)}, the number of levels {product} of quantizer 'fsq', got "
                f"{code_dim}; change it, or quantizer.levels"
            )

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module.

        Raises:
            ValueError: if K or D does not fit the levels.
        """
        self.check(codebook_size=codebook_size, code_dim=code_dim)
        return FSQ(self)

"""Product quantization: groups of channels with a small codebook each, and one flat token for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_integer
from maskgit_pl.contrib.composite_quantizers import CompositeQuantizer, check_inner, inner_size
from maskgit_pl.networks.quantizers.base import Quantizer, QuantizerOutput, quantizers

__all__ = ["ProductQuantizer", "ProductQuantizerSpec"]

_REFUSED = {
    "product": " again, got 'product'; raise num_groups",
    "residual": ", got 'residual'; take product or residual",
}


class ProductQuantizer(CompositeQuantizer):
    """A quantizer of groups of channels; see ``ProductQuantizerSpec``.

    Args:
        groups: The quantizer of each group, all of one K and D.
    """

    def __init__(self, groups: Sequence[Quantizer]) -> None:
        super().__init__(groups, code_dim=groups[0].code_dim * len(groups))
        self.groups = nn.ModuleList(groups)

    @property
    def parts(self) -> nn.ModuleList:
        """The quantizers of the groups; the first gives the lowest digit of a token."""
        return self.groups

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place: sum_g t_g k^g, t_g the token of group g of k codes.

        Args:
            features: (B, D, h, w) float.

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        parts = zip(self._quantizers, self._split(features), strict=True)
        return self._join([group.nearest(part) for group, part in parts])

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        parts = zip(self._quantizers, self._digits(tokens), strict=True)
        return torch.cat([group.lookup(part) for group, part in parts], dim=-1)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is the mean over groups."""
        outputs = [group(part) for group, part in zip(self._quantizers, self._split(features), strict=True)]
        return QuantizerOutput(
            torch.cat([output.quantized for output in outputs], dim=1),
            self._join([output.tokens for output in outputs]),
            self._mean_loss(outputs),
            features.detach().float(),
        )

    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates each group from its part of a global batch; see ``Quantizer.update``."""
        digits = zip(*(self._digits(part) for part in tokens), strict=True)
        channels = zip(*(self._split(part) for part in features), strict=True)
        for number, (digit, part) in enumerate(zip(digits, channels, strict=True)):
            self._update_part(number, digit, part, seed=seed, step=step)

    def _split(self, features: Tensor) -> tuple[Tensor, ...]:
        """Returns the channels of each group, (B, D / G, h, w)."""
        return features.chunk(len(self.groups), dim=1)


@quantizers.register("product")
@dataclass(frozen=True)
class ProductQuantizerSpec:
    """G groups of D / G channels, with a quantizer of k = K^(1/G) codes each; token = sum_g t_g k^g.

    loss = mean over groups of their losses

    A codebook of K codes costs G k D / G numbers and distances to k codes a group. K must be a power k^G.

    Attributes:
        num_groups: G, in [2, 16].
        quantizer: Name or mapping of the quantizer of each group; not ``product`` again, nor ``residual``.

    Raises:
        ValueError: if a value is out of range, or the quantizer is unknown or does not fit.

    Source: Jegou et al., "Product quantization for nearest neighbor search", PAMI 2011; in tokenizers, for example
    Guo et al., arXiv:2406.02940 (grouped codes).
    """

    num_groups: int = 2
    quantizer: str | Mapping[str, Any] = "gradient"

    def __post_init__(self) -> None:
        check_integer("num_groups", self.num_groups, "[2, 16]")
        check_inner("product", self.quantizer, _REFUSED)

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that K is k^G, D a multiple of G, and that the groups' quantizer can have their sizes.

        Raises:
            ValueError: if not.
        """
        self._size(codebook_size, code_dim)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module.

        Raises:
            ValueError: if K or D does not fit the groups.
        """
        size = self._size(codebook_size, code_dim)
        spec, dim = quantizers.build(self.quantizer), code_dim // self.num_groups
        return ProductQuantizer([spec.create(codebook_size=size, code_dim=dim) for _ in range(self.num_groups)])

    def _size(self, codebook_size: int, code_dim: int) -> int:
        """Returns k, after all checks."""
        groups = self.num_groups
        if code_dim % groups:
            raise ValueError(
                f"network code_dim must be a multiple of {groups} for quantizer 'product' of {groups} groups, got "
                f"{code_dim}; {max(1, round(code_dim / groups)) * groups} fits"
            )
        return inner_size(
            "product",
            self.quantizer,
            parts=(groups, "group"),
            codebook_size=codebook_size,
            code_dim=code_dim // groups,
        )

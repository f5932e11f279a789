"""Product quantization: groups of channels with a quantizer of k codes each, and one flat token for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_integer
from maskgit_pl.networks.quantizers import Quantizer, QuantizerOutput, build_sized, quantizers

__all__ = ["ProductQuantizer", "ProductQuantizerSpec"]

_SEED_STEP = 0x9E3779B9  # odd, so that the seeds of the groups are different


class ProductQuantizer(Quantizer):
    """A quantizer of groups of channels; see ``ProductQuantizerSpec``.

    Args:
        groups: The quantizer of each group, all of one K and D.
    """

    def __init__(self, groups: Sequence[Quantizer]) -> None:
        size, dim = groups[0].codebook_size, groups[0].code_dim
        super().__init__(codebook_size=size ** len(groups), code_dim=dim * len(groups))
        self.groups = nn.ModuleList(groups)
        self._base = size

    @property
    def _quantizers(self) -> list[Quantizer]:
        return [cast(Quantizer, group) for group in self.groups]

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Tells each group which random numbers its next training forward draws; each has a seed of its own."""
        for number, group in enumerate(self._quantizers):
            group.begin_micro_batch(seed=_seed_of(seed, number), step=step, micro_batch=micro_batch)

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place: sum_g t_g k^g, t_g the token of group g of k codes."""
        parts = zip(self._quantizers, self._split(features), strict=True)
        return self._join([group.nearest(part) for group, part in parts])

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        parts = zip(self._quantizers, self._digits(tokens), strict=True)
        return torch.cat([group.lookup(part) for group, part in parts], dim=-1)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is the mean over groups."""
        groups = self._quantizers
        outputs = [group(part) for group, part in zip(groups, self._split(features), strict=True)]
        self.losses = {name: torch.stack([group.losses[name] for group in groups]).mean() for name in groups[0].losses}
        return QuantizerOutput(
            torch.cat([output.quantized for output in outputs], dim=1),
            self._join([output.tokens for output in outputs]),
            torch.stack([output.loss for output in outputs]).mean(),
            features.detach().float(),
        )

    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates each group from its part of a global batch; see ``Quantizer.update``."""
        digits = zip(*(self._digits(part) for part in tokens), strict=True)
        channels = zip(*(self._split(part) for part in features), strict=True)
        for number, (group, digit, part) in enumerate(zip(self._quantizers, digits, channels, strict=True)):
            group.update(digit, part, seed=_seed_of(seed, number), step=step)

    def _split(self, features: Tensor) -> tuple[Tensor, ...]:
        """Returns the channels of each group, (B, D / G, h, w)."""
        return features.chunk(len(self.groups), dim=1)

    def _join(self, digits: Sequence[Tensor]) -> Tensor:
        """Returns the flat tokens of the groups' tokens, the lowest digit first."""
        joined = torch.zeros_like(digits[0])
        for number, digit in enumerate(digits):
            joined = joined + digit * self._base**number
        return joined

    def _digits(self, tokens: Tensor) -> list[Tensor]:
        """Returns the groups' tokens of flat tokens, the lowest digit first."""
        return [tokens // self._base**number % self._base for number in range(len(self.groups))]


def _seed_of(seed: int, group: int) -> int:
    return (seed + group * _SEED_STEP) % 2**32


@quantizers.register("product")
@dataclass(frozen=True)
class ProductQuantizerSpec:
    """G groups of D / G channels, with a quantizer of k = K^(1/G) codes each; token = sum_g t_g k^g.

    loss = mean over groups of their losses

    A codebook of K codes costs G k D / G numbers and distances to k codes a group. K must be a power k^G.

    Attributes:
        num_groups: G, in [2, 16].
        quantizer: Name or mapping of the quantizer of each group; not ``product`` again.

    Raises:
        ValueError: if a value is out of range, or the quantizer is unknown or does not fit.

    Source: Jegou et al., "Product quantization for nearest neighbor search", PAMI 2011; in tokenizers, for
    example Guo et al., arXiv:2406.02940 (grouped codes).
    """

    num_groups: int = 2
    quantizer: str | Mapping[str, Any] = "gradient"

    def __post_init__(self) -> None:
        check_integer("num_groups", self.num_groups, "[2, 16]")
        try:
            inner = quantizers.build(self.quantizer)
        except ValueError as error:
            raise ValueError(f"quantizer must be a registered quantizer and its arguments: {error}") from error
        if isinstance(inner, ProductQuantizerSpec):
            raise ValueError("quantizer must be no 'product' again; take a table of codes, such as 'ema'")

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that K is k^G, D a multiple of G, and that the groups' quantizer can have their sizes."""
        groups, size = self.num_groups, self._group_size(codebook_size)
        if size**groups != codebook_size or code_dim % groups:
            raise ValueError(
                f"network codebook_size must be k^{groups} and code_dim a multiple of {groups} for quantizer 'product' "
                f"of {groups} groups, got {codebook_size} and {code_dim}; {size**groups} = {size}^{groups} and "
                f"{max(1, round(code_dim / groups)) * groups} fit"
            )
        build_sized(self.quantizer, codebook_size=size, code_dim=code_dim // groups)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module."""
        spec, size, dim = quantizers.build(self.quantizer), self._group_size(codebook_size), code_dim // self.num_groups
        return ProductQuantizer([spec.create(codebook_size=size, code_dim=dim) for _ in range(self.num_groups)])

    def _group_size(self, codebook_size: int) -> int:
        """Returns k, if K is a power k^G."""
        size: int = max(2, round(codebook_size ** (1 / self.num_groups)))
        return size

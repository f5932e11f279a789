"""Residual quantization: levels with a small codebook each, every level quantizing what the levels before left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_integer
from maskgit_pl.contrib.composite_quantizers import CompositeQuantizer, check_inner, inner_size
from maskgit_pl.networks.quantizers.base import Quantizer, QuantizerOutput, quantizer_output, quantizers, rows_of
from maskgit_pl.networks.quantizers.estimators import GradientEstimator, estimate

__all__ = ["ResidualQuantizer", "ResidualQuantizerSpec"]

_FIXED = ", whose codes have one fixed scale, got {name!r}; take a table of codes, such as 'ema'"
_DECODED = ", whose codes learn from the decoder's gradient, got {name!r}; take a table of codes, such as 'ema'"
_NESTED = ", got {name!r}; raise num_levels"
_REFUSED = {
    name: reason.format(name=name)
    for names, reason in (
        (("fsq", "lfq", "bsq"), _FIXED),
        (("gumbel", "ibq"), _DECODED),
        (("product", "residual"), _NESTED),
    )
    for name in names
}


class ResidualQuantizer(CompositeQuantizer):
    """A quantizer of residuals; see ``ResidualQuantizerSpec``.

    Args:
        levels: The quantizer of each level, all of one K and D.
        gradient_estimator: Gradient of the sum of the codes to the features.
    """

    def __init__(self, levels: Sequence[Quantizer], *, gradient_estimator: GradientEstimator) -> None:
        super().__init__(levels, code_dim=levels[0].code_dim)
        self.levels = nn.ModuleList(levels)
        self.gradient_estimator: GradientEstimator = gradient_estimator

    @property
    def parts(self) -> nn.ModuleList:
        """The quantizers of the levels; the first gives the highest digit of a token."""
        return self.levels

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place: sum_l t_l k^(L - 1 - l), t_l the token of the residual of level l.

        Args:
            features: (B, D, h, w) float.

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        digits: list[Tensor] = []
        residual = features.float()
        for level in self._quantizers:
            digits.append(level.nearest(residual))
            residual = residual - _codes(level, digits[-1], residual)
        return self._join(digits)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the sums of the levels' codes for int64 tokens in [0, K) of any shape: (..., D) float32."""
        parts = zip(self._quantizers, self._digits(tokens), strict=True)
        return torch.stack([level.lookup(part) for level, part in parts]).sum(0)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is the mean over levels.

        The residual of a level has the gradient of the features, so that every level's commitment draws the features to
        the sum of the codes so far. Only the sum of all codes is passed on to the decoder.
        """
        outputs: list[QuantizerOutput] = []
        residual = features.float()
        for level in self._quantizers:
            outputs.append(level(residual))
            residual = residual - _codes(level, outputs[-1].tokens, residual).detach()
        tokens = self._join([output.tokens for output in outputs])
        quantized = estimate(rows_of(features).float(), self.lookup(tokens.flatten()), self.gradient_estimator)
        return quantizer_output(features, quantized, tokens, self._mean_loss(outputs))

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates the levels one after the other from a global batch; see ``Quantizer.update``.

        1. The first level gets the tokens and features of the step.
        2. Each later one gets the residuals of the codes that the levels before have now, and its tokens for them.
           Otherwise the codes that start from features of the first batch would start from residuals of random codes.
        """
        # 1.
        digits, residuals = [self._digits(part)[0] for part in tokens], list(features)
        for number, level in enumerate(self._quantizers):
            self._update_part(number, digits, residuals, seed=seed, step=step)
            if number + 1 < len(self.levels):
                # 2.
                residuals = [part - _codes(level, level.nearest(part), part) for part in residuals]
                digits = [self._quantizers[number + 1].nearest(part) for part in residuals]

    def _join(self, digits: Sequence[Tensor]) -> Tensor:
        return super()._join(digits[::-1])

    def _digits(self, tokens: Tensor) -> list[Tensor]:
        return super()._digits(tokens)[::-1]


def _codes(level: Quantizer, tokens: Tensor, like: Tensor) -> Tensor:
    """Returns the codes of tokens (B, N) on the grid of features, (B, D, h, w)."""
    return rearrange(level.lookup(tokens), "b (h w) d -> b d h w", h=like.shape[2])


@quantizers.register("residual")
@dataclass(frozen=True)
class ResidualQuantizerSpec:
    """L levels of k = K^(1/L) codes each; level l quantizes z minus the codes of the levels before.

    r_1 = z,  t_l = nearest code of level l to r_l,  r_(l+1) = r_l - c_l[t_l],  q = sum_l c_l[t_l]
    token = sum_l t_l k^(L - l),  loss = mean over levels of their losses on r_l

    The first level has the highest digit of a token: tokens that are close have the same coarse code. A codebook of K
    codes costs L k D numbers and distances to L k codes. K must be a power k^L.

    Attributes:
        num_levels: L, in [2, 16].
        quantizer: Name or mapping of the quantizer of each level: ``ema``, ``gradient``, ``simvq``, or a table of your
            own. Its ``gradient_estimator`` is used once, for the sum of the codes.

    Raises:
        ValueError: if a value is out of range, or the quantizer is unknown or does not fit.

    Source: Zeghidour et al., arXiv:2107.03312, section 3.3, with moving averages for each level; Lee et al.,
    arXiv:2203.01941, section 3.1, equations 2 to 6, and its released code (the mean over levels).
    """

    num_levels: int = 2
    quantizer: str | Mapping[str, Any] = "ema"

    def __post_init__(self) -> None:
        check_integer("num_levels", self.num_levels, "[2, 16]")
        check_inner("residual", self.quantizer, _REFUSED)

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that K is k^L, and that the levels' quantizer can have their sizes.

        Raises:
            ValueError: if not.
        """
        self._size(codebook_size, code_dim)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module.

        Raises:
            ValueError: if K does not fit the levels.
        """
        size, spec = self._size(codebook_size, code_dim), quantizers.build(self.quantizer)
        levels = [spec.create(codebook_size=size, code_dim=code_dim) for _ in range(self.num_levels)]
        return ResidualQuantizer(levels, gradient_estimator=getattr(spec, "gradient_estimator", "straight-through"))

    def _size(self, codebook_size: int, code_dim: int) -> int:
        return inner_size(
            "residual",
            self.quantizer,
            parts=(self.num_levels, "level"),
            codebook_size=codebook_size,
            code_dim=code_dim,
        )

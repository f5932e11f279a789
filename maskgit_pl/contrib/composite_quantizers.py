"""Product and residual quantization: several quantizers of k codes each, and one flat token for all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_integer
from maskgit_pl.networks.quantizers import (
    GradientEstimator,
    Quantizer,
    QuantizerOutput,
    build_sized,
    estimate,
    quantizer_output,
    quantizers,
    rows_of,
)

__all__ = ["ProductQuantizer", "ProductQuantizerSpec", "ResidualQuantizer", "ResidualQuantizerSpec"]

_SEED_STEP = 0x9E3779B9  # odd, so that the seeds of the parts are different


class _CompositeQuantizer(Quantizer):
    """The base of quantizers of several parts with k codes each, K = k^parts.

    A subclass holds its parts in a ``ModuleList`` and says what each of them quantizes.

    Args:
        parts: The quantizers, all of one K and D. The token is the number in base k of theirs.
        code_dim: D, size of a code.
    """

    def __init__(self, parts: Sequence[Quantizer], *, code_dim: int) -> None:
        super().__init__(codebook_size=parts[0].codebook_size ** len(parts), code_dim=code_dim)
        self._base = parts[0].codebook_size

    @property
    @abstractmethod
    def parts(self) -> nn.ModuleList:
        """The quantizers."""

    @property
    def _quantizers(self) -> list[Quantizer]:
        return [cast(Quantizer, part) for part in self.parts]

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Tells each part which random numbers its next training forward draws; each has a seed of its own."""
        for number, part in enumerate(self._quantizers):
            part.begin_micro_batch(seed=_seed_of(seed, number), step=step, micro_batch=micro_batch)

    def _update_part(
        self, number: int, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int
    ) -> None:
        """Updates a part from its tokens and features of a global batch; see ``Quantizer.update``."""
        self._quantizers[number].update(tokens, features, seed=_seed_of(seed, number), step=step)

    def _mean_loss(self, outputs: Sequence[QuantizerOutput]) -> Tensor:
        """Returns the mean loss of the parts, and keeps the means of its parts by name in ``losses``."""
        names = dict.fromkeys(name for part in self._quantizers for name in part.losses)
        losses = [[part.losses[name] for part in self._quantizers if name in part.losses] for name in names]
        # A name that only some parts have counts as 0 in the others.
        self.losses = {
            name: torch.stack(values).sum() / len(outputs) for name, values in zip(names, losses, strict=True)
        }
        return torch.stack([output.loss for output in outputs]).mean()

    def _join(self, digits: Sequence[Tensor]) -> Tensor:
        """Returns the flat tokens of the parts' tokens, the lowest digit first."""
        joined = torch.zeros_like(digits[0])
        for number, digit in enumerate(digits):
            joined = joined + digit * self._base**number
        return joined

    def _digits(self, tokens: Tensor) -> list[Tensor]:
        """Returns the parts' tokens of flat tokens, the lowest digit first."""
        return [tokens // self._base**number % self._base for number in range(len(self.parts))]


def _check_inner(owner: str, quantizer: str | Mapping[str, Any], refused: Collection[str]) -> None:
    """Checks the quantizer of each part of a composite one.

    Raises:
        ValueError: if it is unknown, has wrong arguments, or is one of the names that are refused.
    """
    name = quantizer.get("name") if isinstance(quantizer, Mapping) else quantizer
    if isinstance(name, str) and name in refused:
        raise ValueError(f"quantizer of {owner!r} must not be {name!r}; take a table of codes, such as 'ema'")
    try:
        quantizers.build(quantizer)
    except ValueError as error:
        raise ValueError(f"quantizer must be a registered quantizer and its arguments: {error}") from error


def _inner_size(
    owner: str, quantizer: str | Mapping[str, Any], *, parts: tuple[int, str], codebook_size: int, code_dim: int
) -> int:
    """Returns k, the number of codes of each of the parts, such as ``(2, "group")``: K = k^2.

    Raises:
        ValueError: if K is no such power, or the parts' quantizer cannot have k codes of this size.
    """
    count, noun = parts
    size: int = max(2, round(codebook_size ** (1 / count)))
    if size**count != codebook_size:
        raise ValueError(
            f"network codebook_size must be k^{count} for quantizer {owner!r} of {count} {noun}s, got "
            f"{codebook_size}; {size**count} = {size}^{count} fits"
        )
    try:
        build_sized(quantizer, codebook_size=size, code_dim=code_dim)
    except ValueError as error:
        raise ValueError(f"each {noun} of quantizer {owner!r} has {size} codes: {error}") from error
    return size


def _seed_of(seed: int, part: int) -> int:
    return (seed + part * _SEED_STEP) % 2**32


class ProductQuantizer(_CompositeQuantizer):
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
        """Returns the token of each place: sum_g t_g k^g, t_g the token of group g of k codes."""
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

    Source: Jegou et al., "Product quantization for nearest neighbor search", PAMI 2011; in tokenizers, for
    example Guo et al., arXiv:2406.02940 (grouped codes).
    """

    num_groups: int = 2
    quantizer: str | Mapping[str, Any] = "gradient"

    def __post_init__(self) -> None:
        check_integer("num_groups", self.num_groups, "[2, 16]")
        _check_inner("product", self.quantizer, ("product", "residual"))

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
        return _inner_size(
            "product",
            self.quantizer,
            parts=(groups, "group"),
            codebook_size=codebook_size,
            code_dim=code_dim // groups,
        )


# Their codes have one fixed scale, or learn from the decoder's gradient, or are composite.
_NOT_IN_RESIDUAL = ("fsq", "lfq", "bsq", "gumbel", "ibq", "product", "residual")


class ResidualQuantizer(_CompositeQuantizer):
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
        """Returns the token of each place: sum_l t_l k^(L - 1 - l), t_l the token of the residual of level l."""
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

        The residual of a level has the gradient of the features, so that every level's commitment draws the
        features to the sum of the codes so far. Only the sum of all codes is passed on to the decoder.
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

    The first level has the highest digit of a token: tokens that are close have the same coarse code. A
    codebook of K codes costs L k D numbers and distances to L k codes. K must be a power k^L.

    Attributes:
        num_levels: L, in [2, 16].
        quantizer: Name or mapping of the quantizer of each level: ``ema``, ``gradient``, ``simvq``, or a
            table of your own. Its ``gradient_estimator`` is used once, for the sum of the codes.

    Raises:
        ValueError: if a value is out of range, or the quantizer is unknown or does not fit.

    Source: Zeghidour et al., arXiv:2107.03312, section 3.3, with moving averages for each level; Lee et al.,
    arXiv:2203.01941, section 3.1, equations 2 to 6, and its released code (the mean over levels).
    """

    num_levels: int = 2
    quantizer: str | Mapping[str, Any] = "ema"

    def __post_init__(self) -> None:
        check_integer("num_levels", self.num_levels, "[2, 16]")
        _check_inner("residual", self.quantizer, _NOT_IN_RESIDUAL)

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
        return _inner_size(
            "residual",
            self.quantizer,
            parts=(self.num_levels, "level"),
            codebook_size=codebook_size,
            code_dim=code_dim,
        )

"""Quantizers without a table of codes: signs (LFQ, BSQ), and rounding to a few levels (FSQ), channel by channel.

The signs of lookup-free (LFQ) and binary spherical (BSQ) quantization give K = 2^D codes. Token k has bit i
set where channel i is positive. The distribution over all codes is a product of one distribution a bit, so
the entropies cost no (M, K) table:

- the entropy of a feature's assignment is the sum of the entropies of its bits;
- the mean assignment of LFQ is one matrix product of the distributions over the lower and over the upper
  half of the bits: (2^(D/2), M) x (M, 2^(D/2)), exact.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.networks.quantizers import (
    WEIGHTS,
    Quantizer,
    QuantizerOutput,
    quantizer_output,
    quantizers,
    rows_of,
    straight_through,
)

_MARGIN = 1e-3  # keeps tanh from reaching the outermost half levels; source: arXiv:2309.15505, appendix A.1


class BinaryQuantizer(Quantizer):
    """The base of quantizers of signs: code k is scale (2 bits of k - 1), in {-scale, scale}^D.

    Args:
        spec: Weights of the losses.
        code_dim: D, the number of bits; K = 2^D.
        scale: Length of a code in each channel.
        entropy_weight: Weight of both entropies.
    """

    def __init__(self, spec: BinarySpec, *, code_dim: int, scale: float, entropy_weight: float) -> None:
        super().__init__(codebook_size=2**code_dim, code_dim=code_dim)
        self.spec, self.scale, self.entropy_weight = spec, scale, entropy_weight

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place: bit i is 1 where channel i is positive."""
        return self._tokens(rows_of(features)).view(features.shape[0], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        # Not the operators << and >>, which ONNX exporters do not know.
        bits = torch.bitwise_right_shift(tokens.unsqueeze(-1), torch.arange(self.code_dim, device=tokens.device)) & 1
        return self.scale * (2 * bits - 1).float()

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + entropy."""
        with torch.autocast(features.device.type, enabled=False):
            rows = self._normalize(rows_of(features).float())
            tokens = self._tokens(rows.detach())
            codes = self.lookup(tokens)
            loss = self._loss(rows, codes)
        return quantizer_output(features, straight_through(rows, codes), tokens, loss)

    def _tokens(self, rows: Tensor) -> Tensor:
        return torch.bitwise_left_shift((rows > 0).long(), torch.arange(self.code_dim, device=rows.device)).sum(-1)

    def _normalize(self, rows: Tensor) -> Tensor:
        """Returns the rows that are compared with the codes."""
        return rows

    def _loss(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Returns the weighted sum of the losses of rows (M, D) and their codes (M, D)."""
        commitment, weight = self.spec.commitment * self._distance(rows, codes), self.entropy_weight
        if weight == 0:
            return self._total(commitment=commitment)
        # The softmax of -distance / temperature: the two codes of a bit differ by 4 scale z in squared distance.
        logits = 4 * self.scale * rows / self.spec.entropy_temperature  # (M, D), of a set bit
        return self._total(
            commitment=commitment,
            sample_entropy=weight * _bit_entropy(logits).sum(-1).mean(),
            batch_entropy=-weight * self.spec.diversity * self._batch_entropy(logits),
        )

    @abstractmethod
    def _distance(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Returns the mean squared distance of rows (M, D) to their codes (M, D)."""

    @abstractmethod
    def _batch_entropy(self, logits: Tensor) -> Tensor:
        """Returns the entropy of the mean assignment of the global batch, from the logits (M, D) of the bits."""


class LFQ(BinaryQuantizer):
    """Lookup-free quantization; see ``LFQSpec``."""

    def __init__(self, spec: LFQSpec, *, code_dim: int) -> None:
        super().__init__(spec, code_dim=code_dim, scale=1.0, entropy_weight=spec.entropy_weight)

    def _distance(self, rows: Tensor, codes: Tensor) -> Tensor:
        return F.mse_loss(rows, codes)

    def _batch_entropy(self, logits: Tensor) -> Tensor:
        mean = mean_over_ranks(_mean_of_products(logits))  # (K,)
        return -(mean * (mean + 1e-5).log()).sum()


class BSQ(BinaryQuantizer):
    """Binary spherical quantization; see ``BSQSpec``."""

    def __init__(self, spec: BSQSpec, *, code_dim: int) -> None:
        weight = spec.entropy_weight * spec.entropy_temperature
        super().__init__(spec, code_dim=code_dim, scale=code_dim**-0.5, entropy_weight=weight)

    def _normalize(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1)

    def _distance(self, rows: Tensor, codes: Tensor) -> Tensor:
        return (rows - codes).square().sum(-1).mean()

    def _batch_entropy(self, logits: Tensor) -> Tensor:
        mean = mean_over_ranks(logits.sigmoid().mean(0))  # (D,)
        both = torch.stack([mean, 1 - mean])
        # 1e-8 as in the released code: a bit that is set nowhere would have an infinite gradient.
        return -(both * (both + 1e-8).log()).sum()


def _bit_entropy(logits: Tensor) -> Tensor:
    """Computes the entropy of bits that are set with probability sigmoid(logits), in nats; finite for large logits."""
    # H = -p log p - (1 - p) log(1 - p), with log p = logsigmoid(l) and log(1 - p) = logsigmoid(-l).
    return -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits))


def _mean_of_products(logits: Tensor) -> Tensor:
    """Computes the mean distribution over all 2^D codes of rows of independent bits.

    Args:
        logits: (M, D) float32; bit i of row m is set with probability sigmoid(logits[m, i]).

    Returns:
        (2^D,) float32, summing to 1; entry k is the mean over rows of the probability of code k.
    """
    half = logits.shape[1] // 2
    lower, upper = _products(logits[:, :half]), _products(logits[:, half:])
    return (upper.t() @ lower / len(logits)).flatten()


def _products(logits: Tensor) -> Tensor:
    """Returns the probability of each combination of bits, (M, 2^bits), the first bit being the lowest."""
    products = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        pair = torch.stack([(-bit).sigmoid(), bit.sigmoid()], dim=1)  # clear, set
        products = (pair.unsqueeze(2) * products.unsqueeze(1)).flatten(1)
    return products


@dataclass(frozen=True)
class BinarySpec:
    """The numbers of a quantizer of signs.

    Attributes:
        commitment: Weight of the loss that moves features towards their codes, in [0, 1e6].
        entropy_weight: Weight of the entropy loss, in [0, 1e6].
        entropy_temperature: T, divisor of the distances, in [1e-5, 1e6].
        diversity: Factor of the entropy of the mean assignment, in [0, 1e6].
    """

    name: ClassVar[str]
    module: ClassVar[Any]

    commitment: float = 0.25
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    diversity: float = 1.0

    def __post_init__(self) -> None:
        for field in ("commitment", "entropy_weight", "diversity"):
            check_number(field, getattr(self, field), WEIGHTS)
        check_number("entropy_temperature", self.entropy_temperature, "[0.00001, 1000000]")

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that K = 2^D."""
        bits = codebook_size.bit_length() - 1  # at most 24, as a network has at most 2^24 codes
        if (codebook_size, code_dim) != (1 << bits, bits):
            raise ValueError(
                f"network codebook_size must be 2^code_dim for quantizer {self.name!r}, got {codebook_size} and "
                f"code_dim {code_dim}; {1 << bits} and {bits} fit"
            )

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module."""
        quantizer: Quantizer = self.module(self, code_dim=code_dim)
        return quantizer


@quantizers.register("lfq")
@dataclass(frozen=True)
class LFQSpec(BinarySpec):
    """Lookup-free quantization: the code of a feature is the sign of each channel, K = 2^D; see ``BinarySpec``.

    loss = commitment mean((z - sg(q))^2) + entropy_weight (E[H(p(z))] - diversity H(E[p(z)]))
    p(c | z) = softmax over all codes c of -|z - c|^2 / entropy_temperature

    Both entropies are exact over the K codes; E is over the global batch. The logarithm of the second one has + 1e-5.

    Source: Yu et al., arXiv:2310.05737, section 3.1, equations 3 to 5. The defaults are those of
    lucidrains/vector-quantize-pytorch, ``LFQ``: 0.25, 0.1, 1 / 100, 1.
    """

    name, module = "lfq", LFQ


@quantizers.register("bsq")
@dataclass(frozen=True)
class BSQSpec(BinarySpec):
    """Binary spherical quantization: features on the unit sphere, codes sign(u) / sqrt(D), K = 2^D; see ``BinarySpec``.

    loss = commitment E|u - sg(q)|^2 + entropy_weight T (E[sum_i H(p_i)] - diversity sum_i H(E[p_i]))
    u = z / |z|,  p_i = sigmoid(4 u_i / (sqrt(D) T)), T = entropy_temperature

    The entropy of the mean assignment is the sum over bits, an upper bound of that over codes. E is over the
    global batch.

    Source: Zhao et al., arXiv:2406.07548, section 3, equations 6 to 10. Released code ``BinarySphericalQuantizer``: the
    factor T of the loss (its ``inv_temperature`` is 1 / T), and the scale 4 / sqrt(D).
    """

    name, module = "bsq", BSQ


class FSQ(Quantizer):
    """A quantizer that rounds each channel of a feature; see ``FSQSpec``. It has no parameters and no buffers."""

    def __init__(self, spec: FSQSpec) -> None:
        super().__init__(codebook_size=math.prod(spec.levels), code_dim=len(spec.levels))
        self.spec = spec

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the token of each place: the mixed-radix number of its levels."""
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
        basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
        return _filled(levels, like, dtype), _filled(basis, like, dtype)


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
        levels: The number of levels of each channel, in [2, 4096] each. The paper takes 5 or more, such as
            (8, 6, 5) for 240 codes, (8, 5, 5, 5) for 1000, (8, 8, 8, 6, 5) for 15360.

    Source: Mentzer et al., arXiv:2309.15505, section 3 and appendix A.1; levels: table 1.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        for level in self.levels:
            check_integer("levels", level, "[2, 4096]")
        object.__setattr__(self, "levels", tuple(self.levels))

    def check(self, *, codebook_size: int, code_dim: int) -> None:
        """Checks that K is the product of the levels and D their number."""
        size, dim = math.prod(self.levels), len(self.levels)
        if (codebook_size, code_dim) != (size, dim):
            raise ValueError(
                f"network codebook_size must be {size} = {'*'.join(map(str, self.levels))} and code_dim {dim} for "
                f"quantizer 'fsq', got {codebook_size} and {code_dim}; change them, or quantizer.levels"
            )

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module."""
        return FSQ(self)

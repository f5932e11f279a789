"""The base of all quantizers: the interface, the registry, the nearest code, and the losses and gradients they share.

``VQGAN`` and ``Tokenizer`` use a quantizer through ``Quantizer`` only, so codes need no table: ``lookup``
returns them. The entropy losses ask for sure assignments of each feature, and for even use of all codes in
the global batch. Gradients pass the choice of a code straight through.

Shapes: B images, D size of a code, K codes, h w token grid, N = h w tokens; rows (M, D), M = B h w.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.registry import Registry, has_create

__all__ = [
    "WEIGHTS",
    "CodebookQuantizer",
    "EntropyKind",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerSpec",
    "build_sized",
    "entropy_loss",
    "initial_codes",
    "quantizer_output",
    "quantizers",
    "rows_of",
    "squared_distances",
    "straight_through",
]

EntropyKind = Literal["softmax", "argmax"]

WEIGHTS = "[0, 1000000]"  # the range of the weight of a loss


class QuantizerOutput(NamedTuple):
    """The output of a quantizer in training.

    Attributes:
        quantized: (B, D, h, w) float32 codes with a gradient for the features, such as a straight-through one.
        tokens: (B, N) int64 in [0, K), raster order, N = h w.
        loss: Scalar float32, the weighted sum of the quantizer's losses.
        features: (B, D, h, w) float32, the input of the quantizer, detached.
    """

    quantized: Tensor
    tokens: Tensor
    loss: Tensor
    features: Tensor


class Quantizer(nn.Module, ABC):
    """The base of all quantizers: features of the encoder to tokens, and tokens to codes for the decoder.

    Subclasses define which code is nearest, the codes, and the losses. All codes are ``lookup(torch.arange(K))``.
    Everything kept between steps must be in the state dict, so that a resumed run continues bit-exact.

    Args:
        codebook_size: K, number of codes.
        code_dim: D, size of a code.
    """

    def __init__(self, *, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.losses: dict[str, Tensor] = {}  # detached parts of the last forward's loss by name, with their weights

    @abstractmethod
    def nearest(self, features: Tensor) -> Tensor:
        """Returns the tokens (B, N) int64 in [0, K), raster order, of features (B, D, h, w) float."""

    @abstractmethod
    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""

    @abstractmethod
    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes (B, D, h, w) float features and computes the losses that train encoder and codes."""

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Tells which counter-based numbers the next training forward draws; called before each one.

        Args:
            seed: Seed of the random numbers.
            step: Number of the step.
            micro_batch: Place of the micro-batch in this rank's part of the global batch.
        """

    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates what gradients do not train from a global batch; called once after each optimizer step.

        Args:
            tokens: ``QuantizerOutput.tokens`` of this rank's micro-batches, in order.
            features: ``QuantizerOutput.features`` of the same micro-batches.
            seed: Seed of the counter-based random choices.
            step: Number of the step; each step has choices of its own.
        """

    def _total(self, **losses: Tensor) -> Tensor:
        """Returns the sum of weighted losses, in the order given, and keeps their detached values in ``losses``."""
        self.losses = {name: value.detach() for name, value in losses.items()}
        total, *rest = losses.values()
        for loss in rest:
            total = total + loss
        return total


class CodebookQuantizer(Quantizer):
    """The base of quantizers with a table of codes: the nearest code by squared L2 distance.

    Distances are one float32 matrix product, also under autocast: two codes may differ by less than bfloat16
    resolves. A subclass sets ``codebook``, a parameter, a buffer or a property.

    Args:
        codebook_size: K, number of codes.
        code_dim: D, size of a code.
    """

    codebook: Tensor  # (K, D) float32

    def distances(self, rows: Tensor) -> Tensor:
        """Computes squared distances of (M, D) rows to all codes: (M, K) float32."""
        return squared_distances(rows, self.codebook)

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the id of the nearest code at each place; the lowest of equally near ones."""
        tokens = self.distances(rows_of(features)).argmin(1)
        return tokens.view(features.shape[0], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        return F.embedding(tokens, self.codebook)


class QuantizerSpec(Protocol):
    """A registered quantizer: a frozen dataclass of the values in a recipe, which builds the module.

    One that does not fit every K and D also has a method ``check(*, codebook_size, code_dim)``, which raises
    a ``ValueError`` that names the values that fit. ``VQGANConfig`` calls it.
    """

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the quantizer of K = ``codebook_size`` codes of size D = ``code_dim``."""
        ...


quantizers: Registry[QuantizerSpec] = Registry(
    "quantizer",
    "maskgit_pl.quantizers",
    check=has_create,
    modules=(
        "maskgit_pl.networks.codebooks",
        "maskgit_pl.networks.lookup_free",
        "maskgit_pl.contrib.gumbel_quantizer",
        "maskgit_pl.contrib.product_quantizer",
    ),
)


def build_sized(spec: str | Mapping[str, Any], *, codebook_size: int, code_dim: int) -> QuantizerSpec:
    """Builds the spec of a quantizer and checks that it can have K codes of size D.

    Args:
        spec: Name or mapping of a registered quantizer.
        codebook_size: K.
        code_dim: D.

    Raises:
        ValueError: if the spec is invalid, or K or D does not fit it; the message names the values that fit.
    """
    built = quantizers.build(spec)
    check = getattr(built, "check", None)
    if check is not None:
        check(codebook_size=codebook_size, code_dim=code_dim)
    return built


def squared_distances(rows: Tensor, codes: Tensor) -> Tensor:
    """Computes squared distances |a|^2 - 2 a b + |b|^2 of (M, D) rows to (K, D) codes: (M, K) float32.

    Source: released code, vector quantizer.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows, codes = rows.float(), codes.float()
        # One fused product: |b|^2 - 2 a b, to which |a|^2 is added.
        products = torch.addmm(codes.square().sum(1), rows, codes.t(), alpha=-2)  # (M, K)
        return products + rows.square().sum(1, keepdim=True)


def rows_of(features: Tensor) -> Tensor:
    """Reshapes (B, D, h, w) to (B h w, D); needs no copy in channels-last memory."""
    return rearrange(features, "b d h w -> (b h w) d")


def quantizer_output(features: Tensor, quantized: Tensor, tokens: Tensor, loss: Tensor) -> QuantizerOutput:
    """Returns the output for features (B, D, h, w), from quantized rows (M, D) and tokens (M,)."""
    batch, _, height, width = features.shape
    grid = rearrange(quantized, "(b h w) d -> b d h w", b=batch, h=height, w=width)
    return QuantizerOutput(grid, tokens.view(batch, -1), loss, features.detach().float())


def initial_codes(codebook_size: int, code_dim: int) -> Tensor:
    """Draws codes (K, D) uniform in +-sqrt(3 / K), of variance 1 / K. Source: released code (fan-in K)."""
    bound = math.sqrt(3.0 / codebook_size)
    return torch.empty(codebook_size, code_dim).uniform_(-bound, bound)


def straight_through(rows: Tensor, codes: Tensor) -> Tensor:
    """Returns the codes (M, D), with the gradient of the rows (M, D)."""
    return rows + (codes - rows).detach()


def entropy_loss(affinity: Tensor, *, temperature: float, kind: EntropyKind = "softmax") -> Tensor:
    """Computes the mean entropy of each row's assignment minus the entropy of the mean assignment.

    mean_m H(p_m) - H(mean_m p_m), p = softmax(affinity / temperature): low if each row prefers one code and
    the rows together use all codes. The mean assignment is all-reduced over the ranks, with its gradient.

    Args:
        affinity: (..., K) float, such as negative distances.
        temperature: Divisor of the affinity, > 0.
        kind: ``softmax``: soft assignments; ``argmax``: one-hot ones with the gradient of the soft ones.

    Returns:
        Scalar float32.

    Source: released code, ``entropy_loss``, including the 1e-5 inside the logarithm.
    """
    flat = affinity.float().flatten(0, -2) / temperature  # (M, K)
    log_probabilities = F.log_softmax(flat, dim=-1)
    probabilities = log_probabilities.exp()
    if kind == "argmax":
        one_hot = F.one_hot(flat.argmax(-1), flat.shape[-1]).to(flat.dtype)
        # Straight-through: the value is one-hot, the gradient that of the probabilities.
        probabilities = one_hot + (probabilities - probabilities.detach())
    mean = mean_over_ranks(probabilities.mean(0))
    mean_entropy = -(mean * (mean + 1e-5).log()).sum()
    return -(probabilities * log_probabilities).sum(-1).mean() - mean_entropy

"""Quantizers that train all codes at once: SimVQ by one linear layer, IBQ by a softmax over all codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import check_number
from maskgit_pl.networks.quantizers.base import (
    CodebookQuantizer,
    Quantizer,
    QuantizerOutput,
    quantizer_output,
    quantizers,
    rows_of,
)
from maskgit_pl.networks.quantizers.entropy import (
    WEIGHTS,
    Entropy,
    EntropyKind,
    check_losses,
    entropy_loss,
    nearest_and_entropy,
)
from maskgit_pl.networks.quantizers.estimators import GradientEstimator, check_estimator, estimate

__all__ = ["IBQ", "IBQSpec", "SimVQ", "SimVQSpec"]


class SimVQ(CodebookQuantizer):
    """A quantizer of frozen random codes times one trained matrix; see ``SimVQSpec``."""

    frozen_codes: Tensor  # (K, D) float32

    def __init__(self, spec: SimVQSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.register_buffer("frozen_codes", torch.randn(codebook_size, code_dim) * code_dim**-0.5)
        # A plain parameter, not nn.Linear: weight decay would shrink all codes.
        bound = code_dim**-0.5
        self.projection = nn.Parameter(torch.empty(code_dim, code_dim).uniform_(-bound, bound))
        self.offset = nn.Parameter(torch.empty(code_dim).uniform_(-bound, bound))

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]  # read-only
        """The codes (K, D) float32, computed: a cached product would miss an optimizer step."""
        with torch.autocast(self.projection.device.type, enabled=False):
            return F.linear(self.frozen_codes, self.projection, self.offset)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + codebook + entropy."""
        spec, rows = self.spec, rows_of(features).float()
        entropy = Entropy(spec.entropy_weight, spec.entropy_temperature, spec.entropy_kind)
        tokens, uneven = nearest_and_entropy(self, rows, entropy)
        codes = self.lookup(tokens)
        loss = self._total(
            commitment=spec.commitment * F.mse_loss(rows, codes.detach()),
            codebook=spec.codebook_weight * F.mse_loss(codes, rows.detach()),
            entropy=uneven,
        )
        return quantizer_output(features, estimate(rows, codes, spec.gradient_estimator), tokens, loss)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        return F.embedding(tokens, self.codebook)


@quantizers.register("simvq")
@dataclass(frozen=True)
class SimVQSpec:
    """Codes C W + b of frozen Gaussian C (K, D), and one trained layer W (D, D), b (D), which moves all codes at once.

    loss = commitment |z - sg(q)|^2 + codebook_weight |q - sg(z)|^2 + entropy_weight entropy(-distance / temperature)

    Attributes:
        commitment: Weight of the loss that moves features towards their codes, in [0, 1e6].
        codebook_weight: Weight of the loss that moves codes towards their features, in (0, 1e6].
        entropy_weight: Weight of the entropy loss, in [0, 1e6]; 0 as published.
        entropy_temperature: Temperature of its softmax, in [1e-5, 1e6].
        entropy_kind: ``softmax`` or ``argmax``.
        gradient_estimator: ``straight-through`` or ``rotation``.

    Raises:
        ValueError: if a number is out of range, or a name is unknown.

    Source: Zhu et al., arXiv:2411.02038, section 4.1 and algorithm 1; C is normal with variance 1 / D, and W and b
    start as in torch's Linear.
    """

    commitment: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"
    gradient_estimator: GradientEstimator = "straight-through"

    def __post_init__(self) -> None:
        check_number("codebook_weight", self.codebook_weight, "(0, 1000000]")
        check_losses(self)
        check_estimator(self.gradient_estimator)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module."""
        return SimVQ(self, codebook_size=codebook_size, code_dim=code_dim)


class IBQ(Quantizer):
    """A quantizer of the code with the largest inner product; see ``IBQSpec``."""

    def __init__(self, spec: IBQSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the id of the code with the largest inner product at each place.

        Args:
            features: (B, D, h, w) float.

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        return self._logits(rows_of(features)).argmax(1).view(features.shape[0], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        return F.embedding(tokens, self.codebook)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); all codes get a gradient through the softmax."""
        with torch.autocast(features.device.type, enabled=False):
            rows = rows_of(features).float()
            logits = self._logits(rows)
            tokens = logits.argmax(1)
            soft = logits.softmax(1)
            # Straight-through on the index: the value is one-hot, the gradient that of the softmax.
            index = F.one_hot(tokens, self.codebook_size).to(soft) + (soft - soft.detach())
            quantized = index @ self.codebook
            loss = self._loss(rows, logits, quantized, self.lookup(tokens))
        return quantizer_output(features, quantized, tokens, loss)

    def _logits(self, rows: Tensor) -> Tensor:
        """Computes the inner products of (M, D) rows with all codes: (M, K) float32."""
        with torch.autocast(rows.device.type, enabled=False):
            return rows.float() @ self.codebook.t()

    def _loss(self, rows: Tensor, logits: Tensor, quantized: Tensor, codes: Tensor) -> Tensor:
        """Returns the loss; ``quantized`` and ``codes`` are equal, the first with the gradient of the softmax."""
        spec = self.spec
        losses = {
            "double_quantization": F.mse_loss(quantized, rows),
            "commitment": spec.commitment * F.mse_loss(rows, codes.detach()),
            "codebook": spec.codebook_weight * F.mse_loss(codes, rows.detach()),
        }
        if spec.entropy_weight > 0:
            entropy = entropy_loss(logits, temperature=spec.entropy_temperature, kind=spec.entropy_kind)
            losses["entropy"] = spec.entropy_weight * entropy
        return self._total(**losses)


@quantizers.register("ibq")
@dataclass(frozen=True)
class IBQSpec:
    """Index backpropagation quantization: the index is a straight-through one-hot of a softmax over all codes.

    p = softmax(C z),  i = one_hot(argmax p) + p - sg(p),  q = i^T C
    loss = |q - z|^2 + commitment |sg(c) - z|^2 + codebook_weight |c - sg(z)|^2 + entropy_weight entropy(C z / T)

    c is the chosen code without the gradient of p, T the entropy temperature. The memory is (M, K) numbers.

    Attributes:
        commitment: Weight of the loss that moves features towards their codes, in [0, 1e6].
        codebook_weight: Weight of the loss that moves codes towards their features, in [0, 1e6].
        entropy_weight: Weight of the entropy loss, in [0, 1e6].
        entropy_temperature: Temperature of its softmax, in [1e-5, 1e6].
        entropy_kind: ``softmax`` or ``argmax``.

    Raises:
        ValueError: if a number is out of range.

    Source: Shi et al., arXiv:2412.02692, section 3.2. Released code ``IndexPropagationQuantize``: 1, 0.25 (beta), 0.01,
    and standard normal codes.
    """

    commitment: float = 1.0
    codebook_weight: float = 0.25
    entropy_weight: float = 0.1  # that of the released MaskGIT tokenizer
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"

    def __post_init__(self) -> None:
        check_number("codebook_weight", self.codebook_weight, WEIGHTS)
        check_losses(self)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module."""
        return IBQ(self, codebook_size=codebook_size, code_dim=code_dim)

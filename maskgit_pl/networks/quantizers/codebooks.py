"""Quantizers with a table of codes that learns by gradient or as moving averages of features.

Batch statistics (the mean probability of the entropy loss, the moving averages, the candidates of a restart) are those
of the global batch: they are all-reduced if a process group exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.networks.quantizers.base import (
    CodebookQuantizer,
    Quantizer,
    QuantizerOutput,
    initial_codes,
    quantizer_output,
    quantizers,
    rows_of,
)
from maskgit_pl.networks.quantizers.batch_statistics import code_statistics, global_choice, kmeans
from maskgit_pl.networks.quantizers.entropy import Entropy, EntropyKind, check_losses, nearest_and_entropy
from maskgit_pl.networks.quantizers.estimators import GradientEstimator, check_estimator, estimate

__all__ = ["EMAQuantizer", "EMAQuantizerSpec", "GradientQuantizer", "GradientQuantizerSpec"]

InitialCodes = Literal["random", "kmeans"]

_LEAST_COUNT = 1e-12  # smaller counts and sums lose their digits, and their quotient is not a mean


class GradientQuantizer(CodebookQuantizer):
    """A quantizer whose codes are a parameter that the optimizer trains; see ``GradientQuantizerSpec``."""

    def __init__(self, spec: GradientQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.codebook = nn.Parameter(initial_codes(codebook_size, code_dim))
        self._waits = spec.initial_codes == "kmeans"
        if self._waits:  # no entry in the state dict of others
            self.register_buffer("is_initialized", torch.zeros(()))

    is_initialized: Tensor  # () float32, 1 after k-means

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + codebook + entropy."""
        rows = rows_of(features).float()  # (M, D)
        tokens, entropy = nearest_and_entropy(self, rows, self.spec.entropy)
        codes = self.lookup(tokens)
        # Each loss moves one side only: the commitment the features, the codebook loss the codes.
        commitment = self.spec.commitment * F.mse_loss(rows, codes.detach())
        codebook = self.spec.codebook_weight * F.mse_loss(codes, rows.detach())
        loss = self._total(commitment=commitment, codebook=codebook, entropy=entropy)
        return quantizer_output(features, estimate(rows, codes, self.spec.gradient_estimator), tokens, loss)

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Replaces the codes by the k-means of the first global batch if the spec says so, else does nothing."""
        # The flag is read once, since reading waits for the device: a resumed or pretrained codebook is kept.
        if self._waits and not self.is_initialized.item():
            rows = torch.cat([rows_of(part) for part in features])
            self.codebook.copy_(kmeans(rows, len(features), self.codebook_size, seed=seed, step=step))
            self.is_initialized.fill_(1)
        self._waits = False


class EMAQuantizer(CodebookQuantizer):
    """A quantizer whose codes are moving averages of the features nearest to them; see ``EMAQuantizerSpec``.

    The codebook and its statistics are buffers. All counts start at 0, so nearly every code is dead at the first
    update, and the codebook starts from features of the first global batch.
    """

    counts: Tensor  # (K,) float32: moving average of a code's features in a global batch
    sums: Tensor  # (K, D) float32: moving average of their sum

    def __init__(self, spec: EMAQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.register_buffer("codebook", initial_codes(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + entropy."""
        rows = rows_of(features).float()
        tokens, entropy = nearest_and_entropy(self, rows, self.spec.entropy)
        codes = self.lookup(tokens)
        commitment = self.spec.commitment * F.mse_loss(rows, codes)
        loss = self._total(commitment=commitment, entropy=entropy)
        return quantizer_output(features, estimate(rows, codes, self.spec.gradient_estimator), tokens, loss)

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates the averages from a global batch, then restarts dead codes from its features.

        1. Count the features of each code in the global batch, and sum them.
        2. Move the averages towards these counts and sums.
        3. Draw K features of the global batch, one candidate for each code, and put those of dead codes in their place.
        4. Recompute the codebook.
        """
        # 1.
        rows = torch.cat([rows_of(part) for part in features])  # (A M, D), A micro-batches
        counts, sums = code_statistics(torch.cat([part.flatten() for part in tokens]), rows, self.codebook_size)
        # 2.
        self.counts.lerp_(counts, 1 - self.spec.decay)
        self.sums.lerp_(sums, 1 - self.spec.decay)
        # 3. One candidate for every code: the number of dead ones would have to be fetched from the device.
        share = counts.sum() / self.codebook_size  # features of a code if all were used equally
        candidates = global_choice(rows, len(features), self.codebook_size, seed=seed, step=step)  # (K, D)
        self._restart(candidates, share)
        # 4.
        self.codebook.copy_(self.sums / self.counts.unsqueeze(1))

    def _restart(self, candidates: Tensor, share: Tensor) -> None:
        """Replaces each dead code k by row k of the candidates (K, D), without waiting for the device."""
        threshold = (self.spec.restart_below * share).clamp(min=_LEAST_COUNT)
        dead = self.counts <= threshold
        fresh = threshold.clamp(min=1e-3) * 2  # a small weight: the code reaches its cluster's mean in a few steps
        self.counts.copy_(torch.where(dead, fresh, self.counts))
        self.sums.copy_(torch.where(dead.unsqueeze(1), candidates * fresh, self.sums))


@quantizers.register("gradient")
@dataclass(frozen=True)
class GradientQuantizerSpec:
    """The released code's quantizer: nearest code, straight-through, codebook trained by gradient.

    loss = commitment |sg(q) - z|^2 + codebook_weight |q - sg(z)|^2 + entropy_weight entropy(-distance / temperature)

    Attributes:
        commitment: Weight of the loss that moves features towards their codes, in [0, 1e6].
        codebook_weight: Weight of the loss that moves codes towards their features, in (0, 1e6].
        entropy_weight: Weight of the entropy loss, in [0, 1e6].
        entropy_temperature: Temperature of its softmax, in [1e-5, 1e6].
        entropy_kind: ``softmax`` (released) or ``argmax``.
        gradient_estimator: ``straight-through`` (released) or ``rotation`` (arXiv:2410.06424).
        initial_codes: ``random`` (released): uniform; ``kmeans``: after the first step, the k-means of the features of
            its global batch, which should have well over K features.

    Raises:
        ValueError: if a number is out of range, or a name is unknown.

    Source: released code, config ``vqvae``: 0.25, 1.0, 0.1, 0.01, softmax.
    """

    commitment: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"
    gradient_estimator: GradientEstimator = "straight-through"
    initial_codes: InitialCodes = "random"

    def __post_init__(self) -> None:
        check_number("codebook_weight", self.codebook_weight, "(0, 1000000]")
        check_choice("initial_codes", self.initial_codes, get_args(InitialCodes))
        check_losses(self)
        check_estimator(self.gradient_estimator)

    @property
    def entropy(self) -> Entropy:
        """The entropy loss of these numbers."""
        return Entropy(self.entropy_weight, self.entropy_temperature, self.entropy_kind)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module, with codes uniform in +-sqrt(3 / K)."""
        return GradientQuantizer(self, codebook_size=codebook_size, code_dim=code_dim)


@quantizers.register("ema")
@dataclass(frozen=True)
class EMAQuantizerSpec:
    """Codes that are exponential moving averages of features; dead codes restart from features of the batch.

    counts <- decay counts + (1 - decay) n,  sums <- decay sums + (1 - decay) s,  codebook = sums / counts

    n and s are the number and the sum of the features whose nearest code it is, in the global batch.

    Attributes:
        decay: Decay of the averages, in [0, 1).
        commitment: Weight of the loss that moves features towards their codes, in [0, 1e6].
        restart_below: Fraction in [0, 1) of the count that each code would have if all were used equally; a code with
            at most that count is dead, as is one with at most 1e-12, too few to compute a mean.
        entropy_weight: Weight of the entropy loss on the encoder, in [0, 1e6].
        entropy_temperature: Temperature of its softmax, in [1e-5, 1e6].
        entropy_kind: ``softmax`` or ``argmax``.
        gradient_estimator: ``straight-through`` or ``rotation`` (arXiv:2410.06424).

    Raises:
        ValueError: if a number is out of range, or a name is unknown.

    Source: van den Oord et al., arXiv:1711.00937, appendix A.1; restarts: Dhariwal et al., arXiv:2005.00341, section 3.
    """

    decay: float = 0.99
    commitment: float = 0.25
    restart_below: float = 0.05
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"
    gradient_estimator: GradientEstimator = "straight-through"

    def __post_init__(self) -> None:
        check_number("decay", self.decay, "[0, 1)")
        check_number("restart_below", self.restart_below, "[0, 1)")
        check_losses(self)
        check_estimator(self.gradient_estimator)

    @property
    def entropy(self) -> Entropy:
        """The entropy loss of these numbers."""
        return Entropy(self.entropy_weight, self.entropy_temperature, self.entropy_kind)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module; its codes come from the first global batch."""
        return EMAQuantizer(self, codebook_size=codebook_size, code_dim=code_dim)

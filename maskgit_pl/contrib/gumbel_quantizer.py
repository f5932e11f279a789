"""The Gumbel-softmax quantizer: in training, a soft mixture of codes that sharpens with the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.distributed import rank_and_world
from maskgit_pl.networks.quantizers import (
    WEIGHTS,
    CodebookQuantizer,
    Quantizer,
    QuantizerOutput,
    initial_codes,
    quantizer_output,
    quantizers,
    rows_of,
)
from maskgit_pl.randomness import gumbel, random_uniform

__all__ = ["GumbelQuantizer", "GumbelQuantizerSpec"]

_NUMBERS_AT_ONCE = 2**22  # the generator needs some 100 bytes a number


class GumbelQuantizer(CodebookQuantizer):
    """A quantizer whose codes are mixed by a Gumbel-softmax in training; see ``GumbelQuantizerSpec``."""

    def __init__(self, spec: GumbelQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.codebook = nn.Parameter(initial_codes(codebook_size, code_dim))
        self._seed, self._step, self._micro_batch = 0, 0, 0

    def begin_micro_batch(self, *, seed: int, step: int, micro_batch: int) -> None:
        """Chooses the noise and the temperature of the next training forward."""
        self._seed, self._step, self._micro_batch = seed, step, micro_batch

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w): mixtures of codes in training, the nearest codes in evaluation mode."""
        with torch.autocast(features.device.type, enabled=False):
            rows = rows_of(features).float()
            logits = -self.distances(rows)  # (M, K)
            tokens = logits.argmax(1)
            log_probabilities = logits.log_softmax(1)
            divergence = (log_probabilities.exp() * (log_probabilities + math.log(self.codebook_size))).sum(1).mean()
            loss = self._total(kl=self.spec.kl_weight * divergence)
            quantized = self._mixture(logits) if self.training else self.lookup(tokens)
        return quantizer_output(features, quantized, tokens, loss)

    def _mixture(self, logits: Tensor) -> Tensor:
        """Returns mixtures of codes (M, D) by noisy logits (M, K)."""
        noisy = (logits + self._noise(logits)) / self.spec.temperature_at(self._step)
        return noisy.softmax(1) @ self.codebook

    def _noise(self, logits: Tensor) -> Tensor:
        """Returns Gumbel noise (M, K), a function of seed, step, and place in the global batch."""
        (rank, ranks), (size, codes) = rank_and_world(), logits.shape
        # Row j of micro-batch a on rank r is at (a W + r) M + j, as the data module deals samples out.
        first = (self._micro_batch * ranks + rank) * size
        rows = torch.arange(first, first + size, device=logits.device)
        parts = torch.split(rows, max(1, _NUMBERS_AT_ONCE // codes))
        drawn = [
            random_uniform("gumbel-quantizer", seed=self._seed, index=part, epoch=self._step, count=codes)
            for part in parts
        ]
        return gumbel(torch.cat(drawn))


@quantizers.register("gumbel")
@dataclass(frozen=True)
class GumbelQuantizerSpec:
    """Codes mixed by softmax((-distance + Gumbel noise) / T) in training; the nearest code afterwards.

    q = softmax((-d + g) / T) C,  loss = kl_weight KL(softmax(-d) || uniform) = kl_weight (log K - H(softmax(-d)))

    T falls from ``temperature`` to ``final_temperature`` along half a cosine in ``annealing_steps`` steps. The noise g
    is a function of seed, step, and place in the global batch. The memory is (M, K) numbers, some 30 bytes each.

    Attributes:
        temperature: T of step 0, in [1e-3, 1e6].
        final_temperature: T of the last annealing step and all later ones, in [1e-3, ``temperature``].
        annealing_steps: Number of steps of the schedule, in [1, 1e9].
        kl_weight: Weight of the divergence from the uniform distribution, in [0, 1e6].

    Raises:
        ValueError: if a number is out of range.

    Source: released code, ``GumbelVQ``; Jang et al., arXiv:1611.01144. Schedule: Ramesh et al.,
    arXiv:2102.12092, appendix A.2 (1 to 1/16 in 150,000 steps); 5e-4: CompVis/taming-transformers, ``GumbelQuantize``.
    """

    temperature: float = 1.0
    final_temperature: float = 0.0625
    annealing_steps: int = 150_000
    kl_weight: float = 5e-4

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "[0.001, 1000000]")
        check_number("final_temperature", self.final_temperature, f"[0.001, {self.temperature}]")
        check_integer("annealing_steps", self.annealing_steps, "[1, 1000000000]")
        check_number("kl_weight", self.kl_weight, WEIGHTS)

    def temperature_at(self, step: int) -> float:
        """Returns T of a step, >= 0."""
        fraction = min(step / self.annealing_steps, 1.0)
        span = self.temperature - self.final_temperature
        return self.final_temperature + span * (1 + math.cos(math.pi * fraction)) / 2

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module, with codes uniform in +-sqrt(3 / K)."""
        return GumbelQuantizer(self, codebook_size=codebook_size, code_dim=code_dim)

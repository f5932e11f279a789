"""Quantizers with a table of codes: learnt by gradient, as moving averages of features, by one layer, by a softmax.

Batch statistics (the mean probability of the entropy loss, the moving averages, the candidates of a restart)
are those of the global batch: they are all-reduced if a process group exists, and equal for any number of
ranks and micro-batches. SimVQ trains all codes at once by one linear layer, IBQ by a softmax over all codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import check_number
from maskgit_pl.distributed import rank_and_world, sum_over_ranks
from maskgit_pl.networks.quantizers import (
    WEIGHTS,
    CodebookQuantizer,
    EntropyKind,
    Quantizer,
    QuantizerOutput,
    entropy_loss,
    initial_codes,
    quantizer_output,
    quantizers,
    rows_of,
    straight_through,
)
from maskgit_pl.randomness import random_bits

_LEAST_COUNT = 1e-12  # smaller counts and sums lose their digits, and their quotient is not a mean


@dataclass(frozen=True)
class CodebookSpec:
    """The numbers of the losses that all quantizers with a table of codes have, by default the released code's.

    Attributes:
        commitment: Weight of the loss that moves features towards their codes, in [0, 1e6].
        entropy_weight: Weight of the entropy loss, in [0, 1e6].
        entropy_temperature: T, temperature of its softmax, in [1e-5, 1e6].
        entropy_kind: ``softmax``, or ``argmax`` for one-hot assignments with the gradient of the softmax.
    """

    module: ClassVar[Any]

    commitment: float = 0.25
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"

    def __post_init__(self) -> None:
        check_number("commitment", self.commitment, WEIGHTS)
        check_number("entropy_weight", self.entropy_weight, WEIGHTS)
        check_number("entropy_temperature", self.entropy_temperature, "[0.00001, 1000000]")

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module."""
        quantizer: Quantizer = self.module(self, codebook_size=codebook_size, code_dim=code_dim)
        return quantizer


@dataclass(frozen=True)
class TrainedSpec(CodebookSpec):
    """The numbers of the losses whose gradient moves the codes.

    Attributes:
        codebook_weight: Weight of the loss that moves codes towards their features, in (0, 1e6].
    """

    codebook_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("codebook_weight", self.codebook_weight, "(0, 1000000]")
        super().__post_init__()


class NearestCodeQuantizer(CodebookQuantizer):
    """The base of quantizers of the nearest code, whose codes follow a codebook loss if the spec has its weight."""

    spec: CodebookSpec

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + codebook (of trained codes) + entropy."""
        spec, rows = self.spec, rows_of(features).float()  # (M, D)
        # Weight 0 leaves out the entropy and its graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and spec.entropy_weight > 0):
            distances = self.distances(rows)
        tokens = distances.argmin(1)  # (M,)
        codes = self.lookup(tokens)
        # Each loss moves one side only: the commitment the features, the codebook loss the codes.
        losses = {"commitment": spec.commitment * F.mse_loss(rows, codes.detach())}
        if isinstance(spec, TrainedSpec):
            losses["codebook"] = spec.codebook_weight * F.mse_loss(codes, rows.detach())
        losses["entropy"] = rows.new_zeros(())
        if spec.entropy_weight > 0:
            entropy = entropy_loss(-distances, temperature=spec.entropy_temperature, kind=spec.entropy_kind)
            losses["entropy"] = spec.entropy_weight * entropy
        return quantizer_output(features, straight_through(rows, codes), tokens, self._total(**losses))


class GradientQuantizer(NearestCodeQuantizer):
    """A quantizer whose codes are a parameter that the optimizer trains, at first uniform in +-sqrt(3 / K)."""

    def __init__(self, spec: GradientQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.codebook = nn.Parameter(initial_codes(codebook_size, code_dim))


@quantizers.register("gradient")
@dataclass(frozen=True)
class GradientQuantizerSpec(TrainedSpec):
    """The released code's quantizer: nearest code, straight-through, codebook trained by gradient.

    loss = commitment |sg(q) - z|^2 + codebook_weight |q - sg(z)|^2 + entropy_weight entropy(-distance / temperature)

    ``CodebookSpec`` and ``TrainedSpec`` have the numbers.

    Source: released code, config ``vqvae``: 0.25, 1.0, 0.1, 0.01, softmax.
    """

    module = GradientQuantizer


class EMAQuantizer(NearestCodeQuantizer):
    """A quantizer whose codes are moving averages of the features nearest to them; see ``EMAQuantizerSpec``.

    The codebook and its statistics are buffers. All counts start at 0, so nearly every code is dead at the
    first update, and the codebook starts from features of the first global batch.
    """

    spec: EMAQuantizerSpec
    counts: Tensor  # (K,) float32: moving average of a code's features in a global batch
    sums: Tensor  # (K, D) float32: moving average of their sum

    def __init__(self, spec: EMAQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.register_buffer("codebook", initial_codes(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))

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
        counts, sums = _code_statistics(torch.cat([part.flatten() for part in tokens]), rows, self.codebook_size)
        # 2.
        self.counts.lerp_(counts, 1 - self.spec.decay)
        self.sums.lerp_(sums, 1 - self.spec.decay)
        # 3. One candidate for every code: the number of dead ones would have to be fetched from the device.
        share = counts.sum() / self.codebook_size  # features of a code if all were used equally
        candidates = _global_choice(rows, len(features), self.codebook_size, seed=seed, step=step)  # (K, D)
        threshold = (self.spec.restart_below * share).clamp(min=_LEAST_COUNT)
        dead = self.counts <= threshold
        fresh = threshold.clamp(min=1e-3) * 2  # a small weight: the code reaches its cluster's mean in a few steps
        self.counts.copy_(torch.where(dead, fresh, self.counts))
        self.sums.copy_(torch.where(dead.unsqueeze(1), candidates * fresh, self.sums))
        # 4.
        self.codebook.copy_(self.sums / self.counts.unsqueeze(1))


@quantizers.register("ema")
@dataclass(frozen=True)
class EMAQuantizerSpec(CodebookSpec):
    """Codes that are exponential moving averages of features; dead codes restart from features of the batch.

    counts <- decay counts + (1 - decay) n,  sums <- decay sums + (1 - decay) s,  codebook = sums / counts

    n and s are the number and the sum of the features whose nearest code it is, in the global batch.

    ``CodebookSpec`` has the numbers of commitment and entropy.

    Attributes:
        decay: Decay of the averages, in [0, 1).
        restart_below: Fraction in [0, 1) of the count that each code would have if all were used equally; a
            code with at most that count is dead, as is one with at most 1e-12, too few to compute a mean.

    Source: van den Oord et al., arXiv:1711.00937, appendix A.1; restarts: Dhariwal et al., arXiv:2005.00341, section 3.
    """

    module = EMAQuantizer
    decay: float = 0.99
    restart_below: float = 0.05
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        check_number("decay", self.decay, "[0, 1)")
        check_number("restart_below", self.restart_below, "[0, 1)")
        super().__post_init__()


class SimVQ(NearestCodeQuantizer):
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


@quantizers.register("simvq")
@dataclass(frozen=True)
class SimVQSpec(TrainedSpec):
    """Codes C W + b of frozen Gaussian C (K, D), and one trained layer W (D, D), b (D), which moves all codes at once.

    loss = commitment |z - sg(q)|^2 + codebook_weight |q - sg(z)|^2 + entropy_weight entropy(-distance / temperature)

    ``CodebookSpec`` and ``TrainedSpec`` have the numbers.

    Source: Zhu et al., arXiv:2411.02038, section 4.1 and algorithm 1; C is normal with variance 1 / D, and W
    and b start as in torch's Linear.
    """

    module = SimVQ
    entropy_weight: float = 0.0


class IBQ(Quantizer):
    """A quantizer of the code with the largest inner product; see ``IBQSpec``."""

    def __init__(self, spec: IBQSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the id of the code with the largest inner product at each place."""
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
class IBQSpec(TrainedSpec):
    """Index backpropagation quantization: the index is a straight-through one-hot of a softmax over all codes.

    p = softmax(C z),  i = one_hot(argmax p) + p - sg(p),  q = i^T C
    loss = |q - z|^2 + commitment |sg(c) - z|^2 + codebook_weight |c - sg(z)|^2 + entropy_weight entropy(C z / T)

    c is the chosen code without the gradient of p, T the entropy temperature. The memory is (M, K) numbers.

    ``CodebookSpec`` and ``TrainedSpec`` have the numbers.

    Source: Shi et al., arXiv:2412.02692, section 3.2. Released code ``IndexPropagationQuantize``: 1, 0.25
    (beta), 0.01, and standard normal codes.
    """

    module = IBQ
    commitment: float = 1.0
    codebook_weight: float = 0.25


def _code_statistics(tokens: Tensor, rows: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Returns the number of rows of each code in the global batch, (K,), and their sum, (K, D)."""
    statistics = rows.new_zeros(codebook_size, rows.shape[1] + 1)  # sums and counts: one all-reduce for both
    statistics[:, :-1].index_add_(0, tokens, rows)
    statistics[:, -1] = torch.bincount(tokens, minlength=codebook_size)
    statistics = sum_over_ranks(statistics)
    return statistics[:, -1].clone(), statistics[:, :-1]


def _global_choice(rows: Tensor, micro_batches: int, count: int, *, seed: int, step: int) -> Tensor:
    """Draws rows of the global batch, (count, D), the same for every number of ranks and of micro-batches.

    1. With W ranks and M rows a micro-batch, row j of micro-batch a on rank r is at (a W + r) M + j: the
       order in which the data module deals samples out.
    2. Each rank takes its own rows at these places, and zeros for those of other ranks.
    3. The sum over ranks is the result.
    """
    # 1.
    (rank, ranks), size = rank_and_world(), rows.shape[0] // micro_batches
    chosen = random_bits("restart", seed=seed, index=0, epoch=step, count=count)[0] % (rows.shape[0] * ranks)
    micro_batch, owner, row = chosen // (size * ranks), chosen // size % ranks, chosen % size
    # 2.
    local = rows[(micro_batch * size + row).to(rows.device)]  # (count, D)
    # 3.
    return local if ranks == 1 else sum_over_ranks(local * (owner == rank).to(local).unsqueeze(1))

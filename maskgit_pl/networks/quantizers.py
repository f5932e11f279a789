"""Vector quantizers: features of the encoder to code ids and back, with the losses that train encoder and codes.

``VQGAN`` builds one from a recipe value (``gradient``, or ``{name: ema, decay: 0.99}``); other packages add their own
in the entry point group ``maskgit_pl.quantizers``. Batch statistics (the mean probability of the entropy loss, the
moving averages, the candidates of a restart) are those of the global batch: they are all-reduced if a process group
exists.

Shapes: B images, D size of a code, K codes, h w token grid, N = h w tokens; rows (M, D), M = B h w.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, check_number, shorten
from maskgit_pl.distributed import mean_over_ranks, rank_and_world, sum_over_ranks
from maskgit_pl.randomness import random_bits
from maskgit_pl.registry import Registry

__all__ = [
    "EMAQuantizer",
    "EMAQuantizerSpec",
    "EntropyKind",
    "GradientQuantizer",
    "GradientQuantizerSpec",
    "Quantizer",
    "QuantizerOutput",
    "QuantizerSpec",
    "entropy_loss",
    "quantizers",
]

EntropyKind = Literal["softmax", "argmax"]

_WEIGHTS = "[0, 1000000]"
_LEAST_COUNT = 1e-12  # smaller counts and sums lose their digits, and their quotient is not a mean


class QuantizerOutput(NamedTuple):
    """The output of a quantizer in training.

    Attributes:
        quantized: (B, D, h, w) float32 codes; the gradient passes to ``features`` unchanged (straight-through).
        tokens: (B, N) int64 in [0, K), raster order, N = h w.
        loss: Scalar float32, the weighted sum of the quantizer's losses.
        features: (B, D, h, w) float32, the input of the quantizer, detached.
    """

    quantized: Tensor
    tokens: Tensor
    loss: Tensor
    features: Tensor


class QuantizerSpec(Protocol):
    """A registered quantizer: a frozen dataclass of the values in a recipe, which builds the module."""

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the quantizer of K = ``codebook_size`` codes of size D = ``code_dim``."""
        ...


def check_quantizer(name: str, spec: QuantizerSpec) -> None:
    """Checks that a registered quantizer can build its module.

    Args:
        name: Name in the registry.
        spec: The quantizer.

    Raises:
        ValueError: if it has no method ``create``.
    """
    if not callable(getattr(spec, "create", None)):
        raise ValueError(
            f"quantizer {name!r} must have a method create(*, codebook_size, code_dim), got {shorten(spec)}"
        )


quantizers: Registry[QuantizerSpec] = Registry("quantizer", "maskgit_pl.quantizers", check=check_quantizer)


class Quantizer(nn.Module):
    """The base of all quantizers: the nearest code by squared L2 distance. Subclasses define how the codes learn.

    Distances are one float32 matrix product, also under autocast: two codes may differ by less than bfloat16 resolves.

    Args:
        codebook_size: K, number of codes.
        code_dim: D, size of a code.
    """

    codebook: Tensor  # (K, D) float32

    def __init__(self, *, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.code_dim = code_dim

    def distances(self, rows: Tensor) -> Tensor:
        """Computes squared distances |a|^2 - 2 a b + |b|^2 of (M, D) rows to all codes: (M, K) float32.

        Source: released code, vector quantizer.
        """
        with torch.autocast(rows.device.type, enabled=False):
            rows, codes = rows.float(), self.codebook.float()
            # One fused product: |b|^2 - 2 a b, to which |a|^2 is added.
            products = torch.addmm(codes.square().sum(1), rows, codes.t(), alpha=-2)  # (M, K)
            return products + rows.square().sum(1, keepdim=True)

    def nearest(self, features: Tensor) -> Tensor:
        """Returns the id of the nearest code at each place; the lowest of equally near ones.

        Args:
            features: (B, D, h, w) float.

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        tokens = self.distances(_rows(features)).argmin(1)
        return tokens.view(features.shape[0], -1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Returns the codes of int64 tokens in [0, K) of any shape: (..., D) float32."""
        return F.embedding(tokens, self.codebook)

    @abstractmethod
    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes (B, D, h, w) float features and computes the losses that train encoder and codes."""
        raise NotImplementedError

    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates what gradients do not train from a global batch; called once after each optimizer step.

        Args:
            tokens: ``QuantizerOutput.tokens`` of this rank's micro-batches, in order.
            features: ``QuantizerOutput.features`` of the same micro-batches.
            seed: Seed of the counter-based random choices.
            step: Number of the step; each step has choices of its own.
        """


class GradientQuantizer(Quantizer):
    """A quantizer whose codes are a parameter that the optimizer trains; see ``GradientQuantizerSpec``."""

    def __init__(self, spec: GradientQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.codebook = nn.Parameter(_initial_codes(codebook_size, code_dim))

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + codebook + entropy."""
        rows = _rows(features).float()  # (M, D)
        tokens, entropy = _nearest_and_entropy(self, rows, self.spec.entropy)
        codes = self.lookup(tokens)
        # Each loss moves one side only: the commitment the features, the codebook loss the codes.
        commitment = self.spec.commitment * F.mse_loss(rows, codes.detach())
        codebook = self.spec.codebook_weight * F.mse_loss(codes, rows.detach())
        return _output(features, rows, codes, tokens, commitment + codebook + entropy)


class EMAQuantizer(Quantizer):
    """A quantizer whose codes are moving averages of the features nearest to them; see ``EMAQuantizerSpec``.

    The codebook and its statistics are buffers. All counts start at 0, so nearly every code is dead at the first
    update, and the codebook starts from features of the first global batch.
    """

    counts: Tensor  # (K,) float32: moving average of a code's features in a global batch
    sums: Tensor  # (K, D) float32: moving average of their sum

    def __init__(self, spec: EMAQuantizerSpec, *, codebook_size: int, code_dim: int) -> None:
        super().__init__(codebook_size=codebook_size, code_dim=code_dim)
        self.spec = spec
        self.register_buffer("codebook", _initial_codes(codebook_size, code_dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", torch.zeros(codebook_size, code_dim))

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Quantizes features (B, D, h, w); the loss is commitment + entropy."""
        rows = _rows(features).float()
        tokens, entropy = _nearest_and_entropy(self, rows, self.spec.entropy)
        codes = self.lookup(tokens)
        commitment = self.spec.commitment * F.mse_loss(rows, codes)
        return _output(features, rows, codes, tokens, commitment + entropy)

    @torch.no_grad()
    def update(self, tokens: Sequence[Tensor], features: Sequence[Tensor], *, seed: int, step: int) -> None:
        """Updates the averages from a global batch, then restarts dead codes from its features.

        1. Count the features of each code in the global batch, and sum them.
        2. Move the averages towards these counts and sums.
        3. Draw K features of the global batch, one candidate for each code, and put those of dead codes in their place.
        4. Recompute the codebook.
        """
        # 1.
        rows = torch.cat([_rows(part) for part in features])  # (A M, D), A micro-batches
        counts, sums = _code_statistics(torch.cat([part.flatten() for part in tokens]), rows, self.codebook_size)
        # 2.
        self.counts.lerp_(counts, 1 - self.spec.decay)
        self.sums.lerp_(sums, 1 - self.spec.decay)
        # 3. One candidate for every code: the number of dead ones would have to be fetched from the device.
        share = counts.sum() / self.codebook_size  # features of a code if all were used equally
        candidates = _global_choice(rows, len(features), self.codebook_size, seed=seed, step=step)  # (K, D)
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


@dataclass(frozen=True)
class Entropy:
    """The weight and form of the entropy loss of -distance; see ``entropy_loss``.

    Attributes:
        weight: Factor of the loss, >= 0; 0 omits it.
        temperature: Divisor of the distances before the softmax, > 0.
        kind: ``softmax``: soft assignment; ``argmax``: one-hot assignment with a straight-through gradient.
    """

    weight: float
    temperature: float
    kind: EntropyKind


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

    Raises:
        ValueError: if a number is out of range.

    Source: released code, config ``vqvae``: 0.25, 1.0, 0.1, 0.01, softmax.
    """

    commitment: float = 0.25
    codebook_weight: float = 1.0
    entropy_weight: float = 0.1
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"

    def __post_init__(self) -> None:
        check_number("codebook_weight", self.codebook_weight, "(0, 1000000]")
        _check_losses(self)

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

    Raises:
        ValueError: if a number is out of range.

    Source: van den Oord et al., arXiv:1711.00937, appendix A.1; restarts: Dhariwal et al., arXiv:2005.00341, section 3.
    """

    decay: float = 0.99
    commitment: float = 0.25
    restart_below: float = 0.05
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    entropy_kind: EntropyKind = "softmax"

    def __post_init__(self) -> None:
        check_number("decay", self.decay, "[0, 1)")
        check_number("restart_below", self.restart_below, "[0, 1)")
        _check_losses(self)

    @property
    def entropy(self) -> Entropy:
        """The entropy loss of these numbers."""
        return Entropy(self.entropy_weight, self.entropy_temperature, self.entropy_kind)

    def create(self, *, codebook_size: int, code_dim: int) -> Quantizer:
        """Builds the module; its codes come from the first global batch."""
        return EMAQuantizer(self, codebook_size=codebook_size, code_dim=code_dim)


def entropy_loss(affinity: Tensor, *, temperature: float, kind: EntropyKind = "softmax") -> Tensor:
    """Computes the mean entropy of each row's assignment minus the entropy of the mean assignment.

    mean_m H(p_m) - H(mean_m p_m), p = softmax(affinity / temperature): low if each row prefers one code and the rows
    together use all codes. The mean assignment is all-reduced over the ranks, with its gradient.

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


def _nearest_and_entropy(quantizer: Quantizer, rows: Tensor, entropy: Entropy) -> tuple[Tensor, Tensor]:
    """Returns (M,) nearest codes and the weighted entropy loss; without that loss, distances need no graph."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy.weight > 0):
        distances = quantizer.distances(rows)
    tokens = distances.argmin(1)
    if entropy.weight == 0:
        return tokens, rows.new_zeros(())
    return tokens, entropy.weight * entropy_loss(-distances, temperature=entropy.temperature, kind=entropy.kind)


def _output(features: Tensor, rows: Tensor, codes: Tensor, tokens: Tensor, loss: Tensor) -> QuantizerOutput:
    """Returns the output for features (B, D, h, w), the same as rows (M, D), and their codes (M, D) and tokens (M,)."""
    batch, _, height, width = features.shape
    straight_through = rows + (codes - rows).detach()
    quantized = rearrange(straight_through, "(b h w) d -> b d h w", b=batch, h=height, w=width)
    return QuantizerOutput(quantized, tokens.view(batch, -1), loss, features.detach().float())


def _rows(features: Tensor) -> Tensor:
    """Reshapes (B, D, h, w) to (B h w, D); needs no copy in channels-last memory."""
    return rearrange(features, "b d h w -> (b h w) d")


def _initial_codes(codebook_size: int, code_dim: int) -> Tensor:
    """Draws codes (K, D) uniform in +-sqrt(3 / K), of variance 1 / K. Source: released code (fan-in K)."""
    bound = math.sqrt(3.0 / codebook_size)
    return torch.empty(codebook_size, code_dim).uniform_(-bound, bound)


def _code_statistics(tokens: Tensor, rows: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Returns the number of rows of each code in the global batch, (K,), and their sum, (K, D)."""
    statistics = rows.new_zeros(codebook_size, rows.shape[1] + 1)  # sums and counts: one all-reduce for both
    statistics[:, :-1].index_add_(0, tokens, rows)
    statistics[:, -1] = torch.bincount(tokens, minlength=codebook_size)
    statistics = sum_over_ranks(statistics)
    return statistics[:, -1].clone(), statistics[:, :-1]


def _global_choice(rows: Tensor, micro_batches: int, count: int, *, seed: int, step: int) -> Tensor:
    """Draws ``count`` rows of the global batch, the same for every number of ranks and of micro-batches.

    1. Draw positions in the global batch. With W ranks and M rows a micro-batch, row j of micro-batch a on rank r is at
       (a W + r) M + j: the order in which the data module deals samples out.
    2. Each rank takes its own rows at these positions, and zeros for those of other ranks.
    3. The sum over ranks is the result.
    """
    # 1.
    (rank, ranks), size = rank_and_world(), rows.shape[0] // micro_batches
    total = rows.shape[0] * ranks
    chosen = random_bits("restart", seed=seed, index=0, epoch=step, count=count)[0] % total
    micro_batch, owner, row = chosen // (size * ranks), chosen // size % ranks, chosen % size
    # 2.
    local = rows[(micro_batch * size + row).to(rows.device)]  # (count, D)
    # 3.
    return local if ranks == 1 else sum_over_ranks(local * (owner == rank).to(local).unsqueeze(1))


def _check_losses(spec: GradientQuantizerSpec | EMAQuantizerSpec) -> None:
    check_number("commitment", spec.commitment, _WEIGHTS)
    check_number("entropy_weight", spec.entropy_weight, _WEIGHTS)
    check_number("entropy_temperature", spec.entropy_temperature, "[0.00001, 1000000]")
    check_choice("entropy_kind", spec.entropy_kind, get_args(EntropyKind))

"""The token selectors that score draws: confidence, random, Halton order, margin, entropy and moment.

Used through ``decoding.selectors``. Functions import torch where they need it, so the command line can refuse an
unknown name immediately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from maskgit_pl.checks import check_number, check_seed
from maskgit_pl.decoding.token_selector import Candidates, TokenSelector, token_selectors
from maskgit_pl.halton import halton_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TEMPERATURES", "Confidence", "EntropyBounded", "Halton", "Margin", "Moment", "Random"]

TEMPERATURES = "[0, 1000000]"
"""The range of noise scales. Gumbel noise from 24-bit uniforms is below 17, so scores stay finite in float32."""


@token_selectors.register("confidence")
@dataclass(frozen=True)
class Confidence(TokenSelector):
    """The rule of the paper and of the released code: log p(drawn) + choice_temperature (1 - progress) Gumbel.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0. 0 keeps the most probable tokens; larger values choose more
            randomly, above all in the early steps.

    Source: google-research/maskgit, ``parallel_decode.py`` (default 4.5 in its inference notebook).
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        check_number("choice_temperature", self.choice_temperature, TEMPERATURES)

    def __call__(self, candidates: Candidates) -> Tensor:
        noise_scale = self.choice_temperature * (1 - candidates.progress)  # 0 at the last step
        return candidates.drawn_log_probs.add(candidates.gumbel, alpha=noise_scale)


@token_selectors.register("random")
@dataclass(frozen=True)
class Random(TokenSelector):
    """A baseline that keeps random tokens, without regard to their probability."""

    def __call__(self, candidates: Candidates) -> Tensor:
        return candidates.gumbel


@token_selectors.register("halton")
@dataclass(frozen=True)
class Halton(TokenSelector):
    """A selector that keeps tokens in the order of a Halton sequence, so that the tokens of a step are far apart.

    Distant tokens are nearly independent, so it costs little to draw them independently. The order is the same for all
    images; only the codes are random.

    Args:
        seed: None starts at the beginning of the sequence; a seed in [0, 2**32) rotates it.

    Source: Besnier et al., arXiv:2503.17076 (bases 2 and 3; ``seed`` is their random roll, for all images alike).
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed("seed", self.seed)

    def __call__(self, candidates: Candidates) -> Tensor:
        if candidates.grid is None:
            raise ValueError(
                "token selector halton requires the grid of tokens, got None; call steps(grid=(rows, columns))"
            )
        ranks = _halton_ranks(candidates.grid, self.seed, candidates.positions.device)
        return -ranks[candidates.positions]


@lru_cache(maxsize=16)
def _halton_ranks(grid: tuple[int, int], seed: int | None, device: torch.device) -> Tensor:
    """Returns the rank of each position in the Halton order, (N,) float32 in [0, N)."""
    import torch

    from maskgit_pl.randomness import random_bits

    order = torch.tensor(halton_order(grid))
    if seed is not None:
        order = order.roll(int(random_bits("halton", seed=seed, index=0)) % len(order))
    return order.argsort().float().to(device)  # the inverse of a permutation is its argsort


@token_selectors.register("margin")
@dataclass(frozen=True)
class Margin(TokenSelector):
    """The top probability margin: log(p1 - p2) + choice_temperature (1 - progress) Gumbel.

    p1 >= p2 are the probabilities of the two most likely codes. The score is that of the position, not of the code
    drawn: a position with one dominant code is kept with any draw.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0; the source uses none (0).

    Source: Kim et al., arXiv:2502.06768.
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        check_number("choice_temperature", self.choice_temperature, TEMPERATURES)

    def __call__(self, candidates: Candidates) -> Tensor:
        first, second = _two_likeliest(candidates.log_probs)
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        # The clamp keeps the score finite if both codes are equally likely.
        return (first - second).clamp(min=1e-20).log().add(candidates.gumbel, alpha=noise_scale)


def _two_likeliest(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the probabilities (B, M) of the two most likely codes; the second is 0 if K is 1."""
    likeliest = log_probs.topk(min(2, log_probs.shape[-1]), dim=-1).values.exp()
    first = likeliest[..., 0]
    return first, likeliest[..., 1] if likeliest.shape[-1] > 1 else first.new_zeros(first.shape)


@token_selectors.register("entropy")
@dataclass(frozen=True)
class EntropyBounded(TokenSelector):
    """A selector that keeps as many tokens as an entropy budget allows, in order of rising entropy H.

    A step keeps the largest k with (H_1 + ... + H_k) - max(H_1 ... H_k) <= gamma, a bound on the error of drawing k
    tokens independently. Images with low entropies finish in few steps. T is an upper bound: the last step keeps all
    remaining tokens. The counts depend on the data, so each step waits for the device.

    Args:
        gamma: Budget of a step in nats, >= 0; 0 decides one token per step, or several with entropy 0.

    Source: EB-Sampler, Ben-Hamu et al., arXiv:2505.24857.
    """

    follows_schedule: ClassVar[bool] = False
    gamma: float = 6.0

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, "[0, 1000000]")

    def __call__(self, candidates: Candidates) -> Tensor:
        return -candidates.entropies

    def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> Tensor:
        # Rising entropies; padding comes last with an infinite one, and is not counted.
        ordered = (-scores).masked_fill(~valid, math.inf).sort(dim=1).values
        spent = ordered.cumsum(1) - ordered  # sum without the largest, which is the last one
        return ((spent <= self.gamma) & ordered.isfinite()).sum(1)


@token_selectors.register("moment")
@dataclass(frozen=True)
class Moment(TokenSelector):
    """A selector that scores positions by a moment of their distribution, and sharpens the distribution of their codes.

    With a = choice_temperature (1 - progress) and b = 1 + 1 / a, the score is log sum_x p(x)^b + Gumbel, and codes are
    drawn from p^b / Z. It is the limit of the released rule if few of many tokens are kept, and makes the sharpening of
    that rule explicit. The last step keeps all tokens and draws codes from p, as the released rule does.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0.

    Source: Hayakawa et al., arXiv:2510.04525.
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        check_number("choice_temperature", self.choice_temperature, TEMPERATURES)

    def _exponent(self, progress: float) -> float:
        """Returns b; the bound 1e-4 keeps it finite at temperature 0 and at the last step."""
        return 1 + 1 / max(self.choice_temperature * (1 - progress), 1e-4)

    def sharpness(self, progress: float) -> float:
        return self._exponent(progress) if progress < 1 else 1.0

    def __call__(self, candidates: Candidates) -> Tensor:
        moments = (self._exponent(candidates.progress) * candidates.log_probs).logsumexp(-1)
        return moments + candidates.gumbel

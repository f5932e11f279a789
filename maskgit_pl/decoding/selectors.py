"""The built-in token selectors: those that score draws, and those that correct tokens which earlier steps decided.

The names of ``token_selector`` are here too, since this module fills its registry. Used by ``decoding.DecodingConfig``,
by the evaluation, and by packages that add their own selector. Functions import torch where they need it, so the
command line can refuse an unknown name immediately.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from maskgit_pl.checks import check_choice, check_number, check_seed
from maskgit_pl.decoding.token_selector import Candidates, Decided, TokenSelector, token_selectors
from maskgit_pl.schedules import halton_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Candidates",
    "Confidence",
    "Decided",
    "EntropyBounded",
    "Halton",
    "Margin",
    "Moment",
    "PathPlanning",
    "Random",
    "ReMDM",
    "Remasking",
    "TokenEditing",
    "TokenSelector",
    "token_selectors",
]

Remasking = Literal["cap", "rescale", "confidence", "loop"]

# The range of noise scales. Gumbel noise from 24-bit uniforms is below 17, so scores stay finite in float32.
_TEMPERATURES = "[0, 1000000]"
_LEAST_LOG_PROB = -1e4  # of a decided code whose probability is now 0; finite scores are required
_KEPT = 1e30  # score of a decided token that is never masked again


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
        check_number("choice_temperature", self.choice_temperature, _TEMPERATURES)

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
        check_number("choice_temperature", self.choice_temperature, _TEMPERATURES)

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
        check_number("choice_temperature", self.choice_temperature, _TEMPERATURES)

    def _exponent(self, progress: float) -> float:
        """Returns b; the bound 1e-4 keeps it finite at temperature 0 and at the last step."""
        return 1 + 1 / max(self.choice_temperature * (1 - progress), 1e-4)

    def sharpness(self, progress: float) -> float:
        return self._exponent(progress) if progress < 1 else 1.0

    def __call__(self, candidates: Candidates) -> Tensor:
        moments = (self._exponent(candidates.progress) * candidates.log_probs).logsumexp(-1)
        return moments + candidates.gumbel


@token_selectors.register("remdm")
@dataclass(frozen=True)
class ReMDM(Confidence):
    """A selector that masks decided tokens again, so that later steps can correct errors of earlier steps.

    Candidates are kept by the rule of ``confidence``. Of the D tokens that earlier steps decided, round(sigma D) are
    masked again, and as many more candidates are kept, so that the number of masked tokens follows the schedule. With m
    tokens masked after the step and sigma_max = min(1, m / D), the strategies are

    - ``cap``: sigma = min(eta, sigma_max), random tokens;
    - ``rescale``: sigma = eta sigma_max, random tokens;
    - ``confidence``: sigma = eta sigma_max, random tokens with weights exp(-p), p the probability of a code when drawn;
    - ``loop``: three phases. Until progress ``start`` the mask schedule runs to its progress ``hold``. Then the number
      of masked tokens stays constant with sigma = eta. From progress ``stop`` the schedule runs to its end with
      sigma = 0.

    The source masks each token again independently. Here a fixed number is masked, the expected one, so that shapes are
    known before the loop.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0.
        strategy: ``cap``, ``rescale``, ``confidence`` or ``loop``.
        eta: Strength of the remasking, in [0, 1].
        start: Progress at which the loop begins, in (0, 1).
        stop: Progress at which the loop ends, in (start, 1).
        hold: Progress of the mask schedule during the loop, in (0, 1).

    Raises:
        ValueError: if the strategy is unknown or a number is out of range.

    Source: Wang et al., arXiv:2503.00307 (its loop: start 0.45, stop 0.95, and 0.9 of the tokens decided meanwhile).
    """

    strategy: Remasking = "rescale"
    eta: float = 0.2
    start: float = 0.45
    stop: float = 0.95
    hold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("strategy", self.strategy, get_args(Remasking))
        check_number("eta", self.eta, "[0, 1]")
        check_number("start", self.start, "(0, 1)")
        check_number("stop", self.stop, f"({self.start}, 1)")
        check_number("hold", self.hold, "(0, 1)")

    def schedule_progress(self, progress: Tensor) -> Tensor:
        if self.strategy != "loop":
            return progress
        # Before ``start``: [0, start] -> [0, hold]. After ``stop``: [stop, 1] -> [hold, 1]. The clamp keeps ``hold`` in
        # between.
        rising = progress / self.start * self.hold
        ending = self.hold + (progress - self.stop) / (1 - self.stop) * (1 - self.hold)
        return rising.where(progress < self.start, ending.clamp(min=self.hold)).clamp(max=1.0)

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        if decided == 0:
            return 0
        # sigma_max: with more, the step would mask more tokens than the schedule leaves masked.
        most = min(1.0, planned / decided)
        in_loop = self.start <= progress < self.stop
        sigma = {
            "cap": min(self.eta, most),
            "rescale": self.eta * most,
            "confidence": self.eta * most,
            "loop": self.eta if in_loop else 0.0,
        }[self.strategy]
        return round(sigma * decided)

    def remasking_scores(self, decided: Decided) -> Tensor:
        # Gumbel noise minus p: the largest are a sample without replacement with weights exp(-p).
        return decided.gumbel - decided.confidence if self.strategy == "confidence" else decided.gumbel


@token_selectors.register("p2")
@dataclass(frozen=True)
class PathPlanning(Confidence):
    """A selector that masks decided tokens again if their current probability is low, by the rule of P2.

    Draws and decided tokens compete by log p + choice_temperature (1 - progress) Gumbel, with p the current probability
    of the code at its position. The log p of decided tokens is multiplied by ``penalty``. As many tokens as the
    schedule says are kept, new or old.

    The network sees a decided token when it judges it. One that was trained on masked tokens only has not learnt to do
    so: train it with ``corruption``, or with ``visible_weight`` above 0 (``docs/objectives.md``). Each step computes
    logits at all tokens, which costs more than ``confidence`` in late steps.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0; the source draws codes with noise, and adds none here.
        penalty: Factor of the log-probability of decided tokens, >= 0; above 1 more of them are masked again, 0 keeps
            all.

    Source: Peng et al., arXiv:2502.03540, self-planning; ``penalty`` is its stochasticity eta.
    """

    needs_decided_logits: ClassVar[bool] = True
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("penalty", self.penalty, "[0, 1000000]")

    def __call__(self, candidates: Candidates) -> Tensor:
        log_probs = candidates.drawn_log_probs.clamp(min=_LEAST_LOG_PROB)
        if candidates.is_decided is not None:
            log_probs = (self.penalty * log_probs).where(candidates.is_decided, log_probs)
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        return log_probs.add(candidates.gumbel, alpha=noise_scale)


@token_selectors.register("edit")
@dataclass(frozen=True)
class TokenEditing(Confidence):
    """A selector that replaces decided tokens in place where another code is now very likely.

    Draws are kept by the rule of ``confidence``. A decided token becomes the most likely code of its position if that
    has a probability of at least ``threshold``. See ``p2`` for the training that it requires, and for its cost.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0.
        threshold: Probability from which the most likely code replaces a decided one, in (0, 1].

    Source: token editing of LLaDA2.1, arXiv:2602.08676; for images, NLD-Image, arXiv:2606.29814. The default threshold
    is ours.
    """

    needs_decided_logits: ClassVar[bool] = True
    replaces_decided: ClassVar[bool] = True
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, "(0, 1]")

    def __call__(self, candidates: Candidates) -> Tensor:
        scores = super().__call__(candidates)
        return scores if candidates.is_decided is None else scores.masked_fill(candidates.is_decided, _KEPT)

    def replacements(self, candidates: Candidates) -> Tensor:
        likeliest = candidates.log_probs.max(-1)  # (B, M) values and codes
        is_sure = likeliest.values.exp() >= self.threshold
        return likeliest.indices.where(is_sure, candidates.tokens)

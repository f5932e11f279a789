"""Token selectors: the rules that choose the tokens that a decoding step keeps, and their registry.

The mask schedule sets the number of tokens that stay masked. The selector scores the candidates, and those with the
lowest scores are masked again. A selector may also sharpen the distribution that codes are drawn from, mask tokens that
earlier steps decided, or set the number of tokens to keep. Used by ``decoding.ParallelDecoder``.

Functions import torch where they need it, so the command line can list the names immediately. Your own selector is a
registered frozen dataclass::

    @token_selectors.register("entropy_order")
    @dataclass(frozen=True)
    class EntropyOrder(TokenSelector):
        def __call__(self, candidates: Candidates) -> Tensor:
            return -candidates.entropies
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from maskgit_pl.checks import check_choice, check_integer, check_number, check_seed, shorten
from maskgit_pl.registry import Registry, derives_from
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
    "Random",
    "ReMDM",
    "Remasking",
    "TokenSelector",
    "check_token_selector",
    "token_selectors",
]

Remasking = Literal["cap", "rescale", "confidence", "loop"]

# The range of noise scales. Gumbel noise from 24-bit uniforms is below 17, so scores stay finite in float32.
_TEMPERATURES = "[0, 1000000]"


@dataclass(frozen=True)
class Candidates:
    """The draws of one decoding step, which a selector scores: M positions per row, with padding.

    Args:
        log_probs: (B, M, K) float32: log-softmax of the logits at temperature 1.
        tokens: (B, M) int64 in [0, K): the codes drawn.
        positions: (B, M) int64 in [0, N): the position of each code.
        gumbel: (B, M) float32: standard Gumbel noise, a function of image, step and position.
        progress: (t + 1) / T, in (0, 1].
        grid: Rows and columns of tokens; None if not given.
    """

    log_probs: Tensor
    tokens: Tensor
    positions: Tensor
    gumbel: Tensor
    progress: float
    grid: tuple[int, int] | None = None

    @cached_property
    def drawn_log_probs(self) -> Tensor:
        """The log-probabilities of ``tokens``, (B, M) float32."""
        return self.log_probs.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def entropies(self) -> Tensor:
        """The entropies -sum_k p_k log p_k of the distributions in nats, (B, M) float32."""
        # A code of probability 0 has log p = -inf; the clamp makes 0 log 0 equal to 0 in place of NaN.
        return -(self.log_probs.exp() * self.log_probs.clamp(min=-1e30)).sum(-1)


@dataclass(frozen=True)
class Decided:
    """The tokens that earlier steps decided, which a selector may mask again: all N positions of a row.

    Args:
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was drawn. Undecided
            positions are ignored.
        gumbel: (B, N) float32: standard Gumbel noise, a function of image, step and position.
        progress: (t + 1) / T, in (0, 1].
    """

    confidence: Tensor
    gumbel: Tensor
    progress: float


class TokenSelector(ABC):
    """A rule that scores candidates. The candidates with the highest scores are kept.

    Subclasses are frozen dataclasses. ``__call__`` is enough; the defaults of the other methods do nothing.

    Attributes:
        follows_schedule: True if the mask schedule sets the number of tokens that stay masked. False if the selector
            sets it (``num_kept``): the counts then depend on the data, so each step waits for the device.
    """

    follows_schedule: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Tensor:
        """Returns finite scores (B, M) float32; the tokens with the highest scores are kept.

        Columns that only pad a row are scored too, and ignored.
        """

    def sharpness(self, progress: float) -> float:
        """Returns the positive number by which logits are multiplied before codes are drawn; ``progress`` in (0, 1]."""
        return 1.0

    def schedule_progress(self, progress: Tensor) -> Tensor:
        """Maps the progress of each step to progress of the mask schedule.

        Args:
            progress: (T,) float32 in (0, 1], rising.

        Returns:
            (T,) float32 in (0, 1], never falling.
        """
        return progress

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        """Returns the number of tokens of a row that are masked again although earlier steps decided them.

        It is called on the host before the loop. The decoder clips the result to [0, decided].

        Args:
            decided: Number of tokens of the row that earlier steps decided.
            planned: Number of tokens that the schedule leaves masked after the step.
            progress: (t + 1) / T, in (0, 1].
        """
        return 0

    def remasking_scores(self, decided: Decided) -> Tensor:
        """Returns finite scores (B, N) float32; the decided tokens with the highest scores are masked again."""
        raise TypeError(
            f"token selector {type(self).__name__} must define remasking_scores(), since it masks decided tokens again"
        )

    def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> Tensor:
        """Returns the number of tokens of each row to keep; called if ``follows_schedule`` is False.

        Args:
            candidates: The draws.
            scores: (B, M) float32: this selector's scores.
            valid: (B, M) bool: False where a position only pads its row.

        Returns:
            (B,) int64; the decoder keeps at least 1.
        """
        raise TypeError(f"token selector {type(self).__name__} must define num_kept(), since follows_schedule is False")


def check_token_selector(name: str, selector: TokenSelector) -> None:
    """Checks the contract of a selector at the first, a middle and the last of 8 steps on a grid of 2 x 2 tokens.

    All methods are called that the decoder calls for this selector: their results must have the right types
    and shapes, and be finite or in range.

    Raises:
        TypeError: if a method that the selector needs is not defined.
        ValueError: if the selector breaks the contract. The message has the name, the rule and the value.
    """
    import torch

    derives_from(TokenSelector)(name, selector)
    where = f"token selector {name!r}"
    warped = selector.schedule_progress(torch.arange(1, 9) / 8)
    progress = _check_tensor(f"{where}: schedule_progress", warped, (8,)).tolist()
    if not all(0 < value <= 1 for value in progress) or sorted(progress) != progress:
        raise ValueError(f"{where}: schedule_progress must lie in (0, 1] and never fall, got {shorten(progress)}")
    log_probs = torch.linspace(-3, 3, 24).view(2, 4, 3).log_softmax(-1)
    positions, gumbel = torch.arange(4).expand(2, 4), torch.linspace(-2, 8, 8).view(2, 4)
    for step in (1 / 8, 1 / 2, 1.0):
        candidates = Candidates(log_probs, log_probs.argmin(-1), positions, gumbel, step, (2, 2))
        _check_step(where, selector, candidates)


def _check_step(where: str, selector: TokenSelector, candidates: Candidates) -> None:
    """Checks the results of a selector for the draws of a step, (2, 4) of 3 codes."""
    progress, log_probs = candidates.progress, candidates.log_probs
    check_number(f"{where}: sharpness at progress {progress:g}", selector.sharpness(progress), "(0, inf)")
    scores = _check_tensor(f"{where}: scores", selector(candidates), (2, 4))
    if not selector.follows_schedule:
        kept = selector.num_kept(candidates, scores, candidates.gumbel.new_ones(2, 4).bool())
        _check_tensor(f"{where}: num_kept", kept, (2,), is_integer=True)
        return
    count = selector.num_remasked(decided=2, planned=1, progress=progress)
    if check_integer(f"{where}: num_remasked at progress {progress:g}", count, "(-inf, inf)") > 0:
        decided = Decided(log_probs.exp()[..., 0], candidates.gumbel, progress)
        _check_tensor(f"{where}: remasking_scores", selector.remasking_scores(decided), (2, 4))


def _check_tensor(what: str, values: Any, shape: tuple[int, ...], *, is_integer: bool = False) -> Tensor:
    """Returns ``values`` if they are a finite tensor of this shape, int64 if ``is_integer`` and float otherwise."""
    import torch

    kind = "an int64" if is_integer else "a float"
    if not isinstance(values, torch.Tensor):
        raise ValueError(f"{what} must be {kind} tensor of shape {shape}, got {shorten(values)}")
    is_kind = values.dtype == torch.int64 if is_integer else values.is_floating_point()
    if not is_kind or values.shape != shape:
        raise ValueError(f"{what} must be {kind} tensor of shape {shape}, got {values.dtype} {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what} must be finite, got {shorten(values.tolist())}")
    return values


token_selectors: Registry[TokenSelector] = Registry(
    "token selector", "maskgit_pl.token_selectors", check=check_token_selector
)


@token_selectors.register("confidence")
@dataclass(frozen=True)
class Confidence(TokenSelector):
    """The rule of the paper and of the released code: log p(drawn) + choice_temperature (1 - progress) Gumbel.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0. 0 keeps the most probable tokens; larger values
            choose more randomly, above all in the early steps.

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

    Distant tokens are nearly independent, so it costs little to draw them independently. The order is the
    same for all images; only the codes are random.

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
            raise ValueError("grid must be given for token selector 'halton', got None; pass grid=(rows, columns)")
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
class Margin(Confidence):
    """The top probability margin: log(p1 - p2) + choice_temperature (1 - progress) Gumbel.

    p1 >= p2 are the probabilities of the two most likely codes. The score is that of the position, not of the code
    drawn: a position with one dominant code is kept with any draw.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0; the source uses none (0).

    Source: Kim et al., arXiv:2502.06768.
    """

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

    A step keeps the largest k with (H_1 + ... + H_k) - max(H_1 ... H_k) <= gamma, a bound on the error of
    drawing k tokens independently. Images with low entropies finish in few steps. T is an upper bound: the
    last step keeps all remaining tokens. The counts depend on the data, so each step waits for the device.

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
class Moment(Confidence):
    """A selector that scores positions by a moment of their distribution, and sharpens the distribution of their codes.

    With a = choice_temperature (1 - progress) and b = 1 + 1 / a, the score is log sum_x p(x)^b + Gumbel, and codes are
    drawn from p^b / Z. It is the limit of the released rule if few of many tokens are kept, and makes the sharpening of
    that rule explicit. The last step keeps all tokens and draws codes from p, as the released rule does.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0.

    Source: Hayakawa et al., arXiv:2510.04525.
    """

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

    Candidates are kept by the rule of ``confidence``. Of the D tokens that earlier steps decided, round(sigma
    D) are masked again, and as many more candidates are kept, so that the number of masked tokens follows the
    schedule. With m tokens masked after the step and sigma_max = min(1, m / D), the strategies are

    - ``cap``: sigma = min(eta, sigma_max), random tokens;
    - ``rescale``: sigma = eta sigma_max, random tokens;
    - ``confidence``: sigma = eta sigma_max, random tokens with weights exp(-p), p the probability of a code
      when drawn;
    - ``loop``: three phases. Until progress ``start`` the mask schedule runs to its progress ``hold``. Then
      the number of masked tokens stays constant with sigma = eta. From progress ``stop`` the schedule runs to
      its end with sigma = 0.

    The source masks each token again independently. Here a fixed number is masked, the expected one, so that
    shapes are known before the loop.

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
        # Before ``start``: [0, start] -> [0, hold]. After ``stop``: [stop, 1] -> [hold, 1]. The clamp keeps
        # ``hold`` in between.
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

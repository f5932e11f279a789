"""Token selectors: which of the tokens drawn in a decoding step are kept.

The mask schedule says how many stay masked, the selector says which: it gives each candidate a score, and the
candidates with the lowest scores are masked again. A selector may also sharpen what codes are drawn from, mask tokens
again that earlier steps decided, or decide itself how many to keep. Used by ``decoding.ParallelDecoder``. torch is
imported by the functions that need it, so that the command line refuses an unknown name at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from maskgit_pl.checks import check_choice, check_number, check_seed, shorten
from maskgit_pl.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Candidates", "Decided", "TokenSelector", "halton_order", "token_selectors"]


@dataclass(frozen=True)
class Candidates:
    """The draws of one decoding step, for a selector to score. M positions a row, padding included.

    Args:
        log_probs: (B, M, K) float32, log-softmax of the logits at temperature 1.
        tokens: (B, M) int64, in [0, K): the codes drawn.
        positions: (B, M) int64, in [0, N): where they would go.
        gumbel: (B, M) float32, standard Gumbel noise that belongs to the image, the step and the position.
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
        """(B, M) float32: log p of the codes drawn."""
        return self.log_probs.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def entropies(self) -> Tensor:
        """(B, M) float32, in nats: -sum over codes of p log p."""
        return -(self.log_probs.exp() * self.log_probs.clamp(min=-1e30)).sum(-1)  # 0 log 0 is 0


@dataclass(frozen=True)
class Decided:
    """The tokens that earlier steps decided, for a selector to doubt. All N positions of a row.

    Args:
        confidence: (B, N) float32, in [0, 1]: the probability that each code had when it was drawn. Undecided positions
            are ignored.
        gumbel: (B, N) float32, standard Gumbel noise that belongs to the image, the step and the position.
        progress: (t + 1) / T, in (0, 1].
    """

    confidence: Tensor
    gumbel: Tensor
    progress: float


class TokenSelector(ABC):
    """Scores candidates; the highest are kept. Subclasses are frozen dataclasses.

    One method is enough. The others are for selectors that go beyond an order; their defaults do nothing.

    Attributes:
        follows_schedule: True if the mask schedule says how many stay masked. False for a selector that decides itself
            (``num_kept``): its counts depend on the data, so each step waits for the device.
    """

    follows_schedule: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Tensor:
        """Returns scores (B, M) float32, finite: the higher, the surer a token is kept."""

    def sharpness(self, progress: float) -> float:
        """Returns the positive factor of the logits that codes are drawn from, for the step ending at ``progress``."""
        return 1.0

    def schedule_progress(self, progress: Tensor) -> Tensor:
        """Returns where on the mask schedule each step ends: (T,) float32 in (0, 1], not decreasing -> the same."""
        return progress

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        """Returns how many tokens of a row are masked again that earlier steps decided.

        Asked on the host before the loop; the decoder keeps it within what is decided.

        Args:
            decided: Tokens of the row that earlier steps decided.
            planned: Tokens that the schedule wants masked after the step.
            progress: (t + 1) / T, in (0, 1].
        """
        return 0

    def remasking_scores(self, decided: Decided) -> Tensor:
        """Returns doubts (B, N) float32, finite: of the tokens decided before, the highest are masked again."""
        raise TypeError(
            f"token selector {type(self).__name__}: it masks decided tokens again, and needs remasking_scores()"
        )

    def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> Tensor:
        """Returns how many of each row are kept, if the selector does not follow the schedule.

        Args:
            candidates: The draws.
            scores: (B, M) float32, this selector's scores.
            valid: (B, M) bool: False where a position only pads its row.

        Returns:
            (B,) int64; at least 1 is kept whatever it says.
        """
        raise TypeError(f"token selector {type(self).__name__}: without follows_schedule it needs num_kept()")


_TEMPERATURES = "[0, 1000000]"  # times Gumbel noise of at most about 17, finite in float32


def check_token_selector(name: str, selector: TokenSelector) -> None:
    """Refuses a selector whose scores or sharpness are unusable, by name.

    Scores must be (B, M) float tensors of finite numbers and the sharpness finite and positive, at the first, a middle
    and the last of 8 steps on a grid of 2 x 2 tokens.

    Raises:
        ValueError: With the name, the rule and what was seen.
    """
    if not isinstance(selector, TokenSelector):
        raise ValueError(f"token selector {name!r}: it must be a TokenSelector, got {shorten(selector)}")
    import torch

    for progress in (1 / 8, 1 / 2, 1.0):
        log_probs = torch.linspace(-3, 3, 24).view(2, 4, 3).log_softmax(-1)
        positions = torch.arange(4).expand(2, 4)
        gumbel = torch.linspace(-2, 8, 8).view(2, 4)
        candidates = Candidates(log_probs, log_probs.argmin(-1), positions, gumbel, progress, grid=(2, 2))
        scores, sharpness = selector(candidates), selector.sharpness(progress)
        if not isinstance(scores, torch.Tensor) or scores.shape != (2, 4) or not scores.is_floating_point():
            raise ValueError(
                f"token selector {name!r}: scores must be a float tensor (B, M), got {_describe_result(scores)}"
            )
        if not scores.isfinite().all():
            raise ValueError(f"token selector {name!r}: scores must be finite (at progress {progress:g})")
        check_number(f"token selector {name!r}: sharpness at progress {progress:g}", sharpness, "(0, inf)")


def _describe_result(value: object) -> str:
    from torch import Tensor

    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else shorten(value)


token_selectors: Registry[TokenSelector] = Registry(
    "token selector", "maskgit_pl.token_selectors", check=check_token_selector
)


@token_selectors.register("confidence")
@dataclass(frozen=True)
class Confidence(TokenSelector):
    """log p(drawn) + choice_temperature (1 - progress) Gumbel: the released rule.

    Args:
        choice_temperature: Not negative; 0 keeps the most probable, more lets chance choose, most so in early steps.

    Source: google-research/maskgit, ``parallel_decode.py`` (default 4.5 in its inference notebook).
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        check_number("choice_temperature", self.choice_temperature, _TEMPERATURES)

    def __call__(self, candidates: Candidates) -> Tensor:
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        return candidates.drawn_log_probs.add(candidates.gumbel, alpha=noise_scale)


@token_selectors.register("random")
@dataclass(frozen=True)
class Random(TokenSelector):
    """Keeps tokens at random, whatever their probability: the baseline that shows what confidence is worth."""

    def __call__(self, candidates: Candidates) -> Tensor:
        return candidates.gumbel


@token_selectors.register("halton")
@dataclass(frozen=True)
class Halton(TokenSelector):
    """Keeps tokens in the order of a Halton sequence over the grid, so that each step's tokens lie far apart.

    Tokens that lie apart say little about one another, so drawing them independently costs little. The order is the
    same for every image; chance is left to the codes.

    Args:
        seed: None for the sequence from its start; a number in [0, 2**32) begins elsewhere in it.

    Source: Besnier et al., arXiv:2503.17076 (bases 2 and 3; ``seed`` is their random roll, for all images alike).
    """

    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed("seed", self.seed)

    def __call__(self, candidates: Candidates) -> Tensor:
        if candidates.grid is None:
            raise ValueError(
                "token selector halton: the grid of tokens is needed, got none; call steps(grid=(rows, columns))"
            )
        ranks = _halton_turns(candidates.grid, self.seed, candidates.positions.device)
        return -ranks[candidates.positions]


@lru_cache(maxsize=16)
def _halton_turns(grid: tuple[int, int], seed: int | None, device: torch.device) -> Tensor:
    """(N,) float32: when each position's turn comes."""
    import torch

    from maskgit_pl.randomness import random_bits

    order = torch.tensor(halton_order(grid))
    if seed is not None:
        order = order.roll(int(random_bits("halton", seed=seed, index=0)) % len(order))
    return order.argsort().float().to(device)


def halton_order(grid: tuple[int, int]) -> list[int]:
    """The positions of a grid (rows, columns) in the order in which a Halton sequence of bases 2 and 3 visits them."""
    rows, columns = grid
    order: dict[int, None] = {}  # a dictionary keeps the order of the first visits
    point = 0
    while len(order) < rows * columns:
        point += 1
        row, column = int(_radical_inverse(point, 2) * rows), int(_radical_inverse(point, 3) * columns)
        order[row * columns + column] = None
    return list(order)


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number, mirrored at the point: in [0, 1)."""
    mirrored, scale = 0, 1
    while number:
        number, digit = divmod(number, base)
        mirrored, scale = mirrored * base + digit, scale * base
    return mirrored / scale


@token_selectors.register("margin")
@dataclass(frozen=True)
class Margin(TokenSelector):
    """log(p1 - p2) + choice_temperature (1 - progress) Gumbel, with p1 and p2 the two likeliest codes' probabilities.

    It scores the position, not the code drawn: where one code stands out, any draw is kept.

    Args:
        choice_temperature: Scale of the Gumbel noise, not negative; the source has none (0).

    Source: top probability margin of Kim et al., arXiv:2502.06768.
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        check_number("choice_temperature", self.choice_temperature, _TEMPERATURES)

    def __call__(self, candidates: Candidates) -> Tensor:
        first, second = _two_likeliest(candidates.log_probs)
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        return (first - second).clamp(min=1e-20).log().add(candidates.gumbel, alpha=noise_scale)


def _two_likeliest(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (B, M) of the likeliest and the second likeliest code; the second is 0 where there is one code."""
    likeliest = log_probs.topk(min(2, log_probs.shape[-1]), dim=-1).values.exp()
    first = likeliest[..., 0]
    return first, likeliest[..., 1] if likeliest.shape[-1] > 1 else first.new_zeros(first.shape)


@token_selectors.register("entropy")
@dataclass(frozen=True)
class EntropyBounded(TokenSelector):
    """Keeps as many tokens as an entropy budget allows, those of the lowest entropy H first.

    The most tokens with (H_1 + ... + H_k) - max(H_1 ... H_k) <= gamma: a bound on what is lost by drawing them
    independently. Sure images are done in few steps; T is the most that it may take, and whatever is left then is
    kept at the last one. Counts depend on the data, so each step waits for the device.

    Args:
        gamma: Budget of a step in nats, not negative; 0 decides one token a step (or several that are certain).

    Source: EB-Sampler, Ben-Hamu et al., arXiv:2505.24857.
    """

    follows_schedule: ClassVar[bool] = False
    gamma: float = 6.0

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, "[0, 1000000]")

    def __call__(self, candidates: Candidates) -> Tensor:
        return -candidates.entropies

    def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> Tensor:
        ordered = (-scores).masked_fill(~valid, math.inf).sort(dim=1).values
        spent = ordered.cumsum(1) - ordered  # the largest entropy, the last one's, is free
        return ((spent <= self.gamma) & ordered.isfinite()).sum(1)


@token_selectors.register("moment")
@dataclass(frozen=True)
class Moment(TokenSelector):
    """Chooses places by a moment of their distribution, then draws their codes from its sharpened form.

    With a = choice_temperature (1 - progress) and b = 1 + 1 / a: score log sum_x p(x)^b + Gumbel, codes from p^b. It
    is what the released rule tends to where few of many tokens are kept, with its hidden sharpening in the open. At the
    last step nothing is left to choose, and codes come from p, as the released rule's do.

    Args:
        choice_temperature: Scale of the Gumbel noise, not negative.

    Source: Hayakawa et al., arXiv:2510.04525.
    """

    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        check_number("choice_temperature", self.choice_temperature, _TEMPERATURES)

    def _exponent(self, progress: float) -> float:
        return 1 + 1 / max(self.choice_temperature * (1 - progress), 1e-4)

    def sharpness(self, progress: float) -> float:
        return self._exponent(progress) if progress < 1 else 1.0

    def __call__(self, candidates: Candidates) -> Tensor:
        moments = (self._exponent(candidates.progress) * candidates.log_probs).logsumexp(-1)
        return moments + candidates.gumbel


Remasking = Literal["cap", "rescale", "confidence", "loop"]


@token_selectors.register("remdm")
@dataclass(frozen=True)
class ReMDM(Confidence):
    """Masks tokens again that were decided, so that later steps can mend what earlier ones got wrong.

    Candidates are kept as by ``confidence``. Of the D tokens that earlier steps decided, round(sigma D) are masked
    again, and as many more candidates are kept, so that the number masked follows the schedule. With m tokens to be
    masked after the step and sigma_max = min(1, m / D), the strategies are

    - ``cap``: sigma = min(eta, sigma_max), tokens at random;
    - ``rescale``: sigma = eta sigma_max, tokens at random;
    - ``confidence``: sigma = eta sigma_max, tokens at random with weights exp(-p), p a code's probability when drawn;
    - ``loop``: as fast as the schedule goes to its progress ``hold``, which is reached at progress ``start``; then the
      number masked stands still, with sigma = eta, until ``stop``; then on to the end without masking again.

    The source draws for each token whether it is masked again; here their expected number is, so that shapes are known
    before the loop.

    Args:
        choice_temperature: Scale of the Gumbel noise, not negative.
        strategy: One of the four.
        eta: In [0, 1]: how much is masked again.
        start: Progress at which the loop begins, in (0, 1).
        stop: Progress at which it ends, in (start, 1).
        hold: Progress of the mask schedule at which it stands, in (0, 1).

    Raises:
        ValueError: An unknown strategy or a number out of range.

    Source: Wang et al., arXiv:2503.00307 (its loop: start 0.45, stop 0.95, held where 0.9 is decided).
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
        rising = progress / self.start * self.hold
        ending = self.hold + (progress - self.stop) / (1 - self.stop) * (1 - self.hold)
        return rising.where(progress < self.start, ending.clamp(min=self.hold)).clamp(max=1.0)

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        if decided == 0:
            return 0
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
        return decided.gumbel - decided.confidence if self.strategy == "confidence" else decided.gumbel

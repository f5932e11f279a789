"""Token selectors: the rules that choose the tokens that a decoding step keeps, and their registry.

The mask schedule sets the number of tokens that stay masked. The selector scores the candidates, and those with the
lowest scores are masked again. A selector may also sharpen the distribution that codes are drawn from, mask tokens
that earlier steps decided, set the number of tokens itself (``num_kept``), or ask to see more than the masked tokens
(``sees_previous``, ``sees_decided``). Used by ``decoding.ParallelDecoder``.

Functions import torch where they need it, so the command line can list the names immediately. Your own selector is a
registered frozen dataclass::

    @token_selectors.register("entropy_order")
    @dataclass(frozen=True)
    class EntropyOrder(TokenSelector):
        def __call__(self, candidates: Candidates) -> Tensor:
            import torch

            # entr is 0 for a code of probability 0, where p log p would be NaN.
            scores: Tensor = -torch.special.entr(candidates.log_probs.exp()).sum(-1)
            return scores
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar

from maskgit_pl.checks import check_number
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.schedules import halton_order
from maskgit_pl.text import shorten

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Candidates",
    "Confidence",
    "Decided",
    "Halton",
    "Margin",
    "Moment",
    "Random",
    "ReMDM",
    "TokenSelector",
    "check_token_selector",
    "token_selectors",
]

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
        grid: Sizes of the axes of the token grid: (h, w) of an image; see ``BackboneConfig``.
        previous: (B, M, K) float32: ``log_probs`` of these positions when they were last candidates; None in the
            first step, and unless the selector ``sees_previous``.
        decided: (B, M) int64: the code that an earlier step decided, -1 where the token is masked; None unless the
            selector ``sees_decided``.
    """

    log_probs: Tensor
    tokens: Tensor
    positions: Tensor
    gumbel: Tensor
    progress: float
    grid: tuple[int, ...]
    previous: Tensor | None = None
    decided: Tensor | None = None

    @cached_property
    def drawn_log_probs(self) -> Tensor:
        """The log-probabilities of ``tokens``, (B, M) float32."""
        return self.log_probs.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Decided:
    """The tokens that earlier steps decided, which a selector may mask again: all N positions of a row.

    Args:
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was drawn. Undecided
            positions are ignored.
        gumbel: (B, N) float32: standard Gumbel noise, a function of image, step and position.
    """

    confidence: Tensor
    gumbel: Tensor


class TokenSelector(ABC):
    """A rule that scores candidates. The candidates with the highest scores are kept.

    Subclasses are frozen dataclasses. ``__call__`` is enough; the defaults of the other methods do nothing.

    Attributes:
        sees_previous: True to be given the log-probabilities of the step before, (B, N, K) that stay in memory.
        sees_decided: True if all tokens that were unknown at the start are candidates in each step, those that
            earlier steps decided too: with a low score they are masked again, and ``revise`` may change their codes.
            The network predicts M = all of them each time. Where nothing is masked any more, the steps go on.
    """

    sees_previous: ClassVar[bool] = False
    sees_decided: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Tensor:
        """Returns finite scores (B, M) float32; the tokens with the highest scores are kept.

        Columns that only pad a row are scored too, and ignored.
        """

    def revise(self, candidates: Candidates) -> Tensor:
        """Returns the codes (B, M) int64 in [0, K) that are scored, for a selector that ``sees_decided``.

        By default they are the draws at masked positions, and the code as it was at the others.
        """
        assert candidates.decided is not None
        return candidates.tokens.where(candidates.decided < 0, candidates.decided)

    def num_kept(self, candidates: Candidates, scores: Tensor, planned: Tensor) -> Tensor | None:
        """Returns how many tokens the step decides, (B,) int64, in place of the mask schedule; None follows it.

        The decoder clips the result to [0, masked tokens of the row], and the last step decides all. Decoding ends
        when no token is masked. A number that comes from the logits is unknown to the host, which waits for the
        device once a step.

        Args:
            candidates: The draws.
            scores: (B, M) float32: their scores; -inf in padding.
            planned: (B,) int64: the number of tokens that the schedule decides in this step, >= 0.
        """
        return None

    @property
    def counts_in_loop(self) -> bool:
        """True if the class has a ``num_kept`` of its own, so that the counts of the steps are not known before."""
        return type(self).num_kept is not TokenSelector.num_kept

    def sharpness(self, progress: float) -> float:
        """Returns the positive number by which logits are multiplied before codes are drawn; ``progress`` in (0, 1]."""
        return 1.0

    def num_remasked(self, *, decided: int, planned: int) -> int:
        """Returns the number of tokens of a row that are masked again although earlier steps decided them.

        It is called on the host. The decoder clips the result to [0, decided]. A selector that ``sees_decided`` or has
        a ``num_kept`` is not asked.

        Args:
            decided: Number of tokens of the row that earlier steps decided.
            planned: Number of tokens that the schedule leaves masked after the step.
        """
        return 0

    def remasking_scores(self, decided: Decided) -> Tensor:
        """Returns finite scores (B, N) float32, by default random; the decided tokens with the highest are masked."""
        return decided.gumbel


def check_token_selector(name: str, selector: TokenSelector) -> None:
    """Checks the scores and the sharpness of a selector at the first, a middle and the last of 8 steps.

    Raises:
        ValueError: if scores are no finite float tensor of the right shape, or the sharpness is not positive.
    """
    import torch

    derives_from(TokenSelector)(name, selector)
    log_probs = torch.linspace(-3, 3, 24).view(2, 4, 3).log_softmax(-1)
    positions, gumbel = torch.arange(4).expand(2, 4), torch.linspace(-2, 8, 8).view(2, 4)
    for progress in (1 / 8, 1 / 2, 1.0):
        where = f"token selector {name!r} at progress {progress:g}"
        check_number(f"{where}: sharpness", selector.sharpness(progress), "(0, inf)")
        previous = log_probs.flip(1) if selector.sees_previous and progress > 1 / 8 else None
        decided = (positions - 2).clamp(-1, 0) if selector.sees_decided else None  # two masked, two of code 0
        drawn = log_probs.argmin(-1)
        candidates = Candidates(log_probs, drawn, positions, gumbel, progress, (2, 2), previous, decided)
        if selector.sees_decided:
            candidates = replace(candidates, tokens=selector.revise(candidates))
        scores = selector(candidates)
        is_tensor = isinstance(scores, torch.Tensor) and scores.is_floating_point()
        if not is_tensor or scores.shape != (2, 4) or not bool(scores.isfinite().all()):
            raise ValueError(f"{where}: scores must be a finite float tensor of shape (2, 4), got {shorten(scores)}")
        kept = selector.num_kept(candidates, scores, torch.ones(2, dtype=torch.int64))
        if kept is not None and (kept.shape != (2,) or kept.is_floating_point()):
            raise ValueError(f"{where}: num_kept must be an integer tensor of shape (2,), got {shorten(kept)}")


token_selectors: Registry[TokenSelector] = Registry(
    "token selector",
    "maskgit_pl.token_selectors",
    check=check_token_selector,
    modules=tuple(f"maskgit_pl.contrib.{name}" for name in ("entropy_bound", "klass", "p2")),
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

    Source: Besnier et al., arXiv:2503.17076 (bases 2 and 3, and 5 for a third axis; their random roll is left out).
    """

    def __call__(self, candidates: Candidates) -> Tensor:
        return -_halton_ranks(candidates.grid, candidates.positions.device)[candidates.positions]


@lru_cache(maxsize=16)
def _halton_ranks(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the rank of each position in the Halton order, (N,) float32 in [0, N)."""
    import torch

    # The inverse of a permutation is its argsort.
    return torch.tensor(halton_order(grid)).argsort().float().to(device)


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
        first, second = candidates.log_probs.topk(2, dim=-1).values.exp().unbind(-1)
        noise_scale = self.choice_temperature * (1 - candidates.progress)
        # The clamp keeps the score finite if both codes are equally likely.
        return (first - second).clamp(min=1e-20).log().add(candidates.gumbel, alpha=noise_scale)


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

    Candidates are kept by the rule of ``confidence``. Of the D tokens that earlier steps decided, round(sigma D) random
    ones are masked again, and as many more candidates are kept, so that the number of masked tokens follows the
    schedule. With m tokens masked after the step, sigma = eta min(1, m / D).

    The source masks each token again independently. Here a fixed number is masked, the expected one, so that
    shapes are known before the loop.

    Args:
        choice_temperature: Scale of the Gumbel noise, >= 0.
        eta: Strength of the remasking, in [0, 1].

    Source: Wang et al., arXiv:2503.00307, strategy ``rescale`` (the other ones are left out).
    """

    eta: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta, "[0, 1]")

    def num_remasked(self, *, decided: int, planned: int) -> int:
        if decided == 0:
            return 0
        # With a larger sigma, the step would mask more tokens than the schedule leaves masked.
        return round(self.eta * min(1.0, planned / decided) * decided)

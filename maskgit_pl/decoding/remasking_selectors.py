"""The token selectors that correct tokens which earlier steps decided.

Used through ``decoding.selectors``. Functions import torch where they need it, so the command line can refuse an
unknown name immediately.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from maskgit_pl.checks import check_choice, check_number
from maskgit_pl.decoding.scoring_selectors import Confidence
from maskgit_pl.decoding.token_selector import Candidates, Decided, token_selectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PathPlanning", "ReMDM", "Remasking", "TokenEditing"]

_LEAST_LOG_PROB = -1e4  # of a decided code whose probability is now 0; finite scores are required
_KEPT = 1e30  # score of a decided token that is never masked again

Remasking = Literal["cap", "rescale", "confidence", "loop"]


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

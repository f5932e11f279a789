"""The decoding loop; see ``decoder`` for its steps. ``correction`` holds the loop that looks at decided tokens too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from maskgit_pl.decoding.columns import mark_masked_columns, mask_first, sort_masked_first
from maskgit_pl.decoding.noise import Noise
from maskgit_pl.decoding.plan import StepCounts, step_progress
from maskgit_pl.decoding.predictors import Predictor
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import Candidates, Decided, TokenSelector
from maskgit_pl.decoding.token_selector import CheckedSelector

__all__ = ["DecodingRun", "DecodingStep", "StepRules"]


@dataclass(frozen=True)
class DecodingStep:
    """One step of a decoding run.

    Args:
        step: t, counted from 0.
        tokens: (B, N) int64 in [0, K): all tokens after the draw, before any is masked again.
        was_masked: (B, N) bool, True = masked before the step.
        still_masked: (B, N) bool, True = masked after the step; all False at the last step.
        scores: (B, N) float32: the selector's scores where ``was_masked``, +inf elsewhere.
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was last drawn; 1 for codes
            that were given.
    """

    step: int
    tokens: Tensor
    was_masked: Tensor
    still_masked: Tensor
    scores: Tensor
    confidence: Tensor


class StepRules(Protocol):
    """The settings of a run; ``decoder.ParallelDecoder`` has them."""

    @property
    def token_selector(self) -> TokenSelector:
        """The token selector."""

    @property
    def sampling(self) -> CodeSampling:
        """The sampling of codes."""

    @property
    def num_steps(self) -> int:
        """The number of steps, T."""


class DecodingRun:
    """The state of one decoding run; see ``ParallelDecoder.steps`` for the arguments.

    Attributes:
        tokens: (B, N) int64: codes in [0, K), and ``mask_token_id`` where ``masked``.
        masked: (B, N) bool.
        unknown: (B, N) bool, True = masked at the start. All other tokens were given and are never masked.
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was last drawn; 1 for given
            codes.
        no_scores: (B, N) float32: +inf, the score of a position that a step does not draw.
    """

    def __init__(
        self,
        rules: StepRules,
        predictor: Predictor,
        noise: Noise,
        *,
        mask_token_id: int,
        grid: tuple[int, int] | None,
        tokens: Tensor,
        masked: Tensor,
    ) -> None:
        self.selector = CheckedSelector(rules.token_selector)
        self.sampling, self.num_steps = rules.sampling, rules.num_steps
        self.predictor, self.noise = predictor, noise
        self.mask_token_id, self.grid = mask_token_id, grid
        self.tokens, self.masked, self.unknown = tokens, masked, masked
        self.confidence = torch.ones(tokens.shape, device=tokens.device)
        self.no_scores = torch.full_like(self.confidence, torch.inf)

    def steps(self, plan: Sequence[StepCounts], first_step: int) -> Iterator[DecodingStep]:
        """Runs the loop of the module docstring, with the counts of ``plan`` or of the selector."""
        num_masked = plan[0].before
        positions = sort_masked_first(self.masked, num_masked)  # (B, M)
        for step, counts in enumerate(plan, start=first_step):
            if max(num_masked) == 0:  # a selector may finish early
                return
            # 1. Predict. Softmax and scores are computed in float32 for every dtype of the network.
            logits = self.predictor(self.tokens, positions).float()  # (B, M, K)
            # 2. Draw.
            candidates = self._draw(logits, positions, step)
            drawn, probability = candidates.tokens, candidates.drawn_log_probs.exp()  # (B, M)
            # 3. Score.
            scores = self.selector(candidates)  # (B, M)
            is_masked = mark_masked_columns(num_masked, positions)  # (B, M); None if no row is padded
            if is_masked is not None:  # padding keeps its code and confidence, and +inf sorts it last
                scores = scores.where(is_masked, torch.inf)
                drawn = drawn.where(is_masked, self.tokens.gather(1, positions))
                probability = probability.where(is_masked, self.confidence.gather(1, positions))
            self.selector.check_values(scores)
            self.confidence = self.confidence.scatter(1, positions, probability)
            scores_by_position = self.no_scores.scatter(1, positions, scores)  # (B, N)
            # 4. Count. A selector with its own counts treats the plan as an upper bound.
            if not self.selector.selector.follows_schedule and step < self.num_steps - 1:
                counts = self._count_by_selector(candidates, scores, is_masked, num_masked)
            # 5. Remask. Lowest scores first. The sort is stable, so equal scores give the same result on every device.
            order = scores.argsort(dim=1, stable=True)
            positions = positions.gather(1, order)
            all_drawn = self.tokens.scatter(1, candidates.positions, drawn)  # (B, N)
            was_masked = self.masked
            self.tokens = mask_first(all_drawn, positions, counts.undecided, self.mask_token_id)
            has_remasked = max(counts.remasked) > 0
            if has_remasked:
                self._mask_decided(counts.remasked, step)
            self.masked = self.tokens == self.mask_token_id
            yield DecodingStep(step, all_drawn, was_masked, self.masked, scores_by_position, self.confidence)
            # The columns are sorted by score, so those that stay masked come first: they need no second sort, except
            # when the selector has masked positions that are not among the columns.
            num_masked = counts.after
            positions = sort_masked_first(self.masked, num_masked) if has_remasked else positions[:, : max(num_masked)]

    def _draw(self, logits: Tensor, positions: Tensor, step: int, *, is_decided: Tensor | None = None) -> Candidates:
        """Draws a code for each of ``positions`` (B, M) from ``logits`` (B, M, K), except where ``is_decided``."""
        # Selectors and the mask schedule count progress to the end of the step, in (0, 1]. Sampling temperature and
        # guidance run from 0 at the first step to 1 at the last (``step_progress``).
        progress = (step + 1) / self.num_steps
        drawn = self.sampling.draw(
            logits,
            self.noise,
            positions,
            step=step,
            progress=step_progress(step, self.num_steps),
            sharpness=self.selector.sharpness(progress),
        )
        if is_decided is not None:
            drawn = self.tokens.gather(1, positions).where(is_decided, drawn)
        return Candidates(
            log_probs=logits.log_softmax(-1),
            tokens=drawn,
            positions=positions,
            gumbel=self.noise.gumbel(positions, step),
            progress=progress,
            grid=self.grid,
            is_decided=is_decided,
        )

    def _count_by_selector(
        self, candidates: Candidates, scores: Tensor, is_masked: Tensor | None, num_masked: list[int]
    ) -> StepCounts:
        """Reads the counts that the selector sets from the device; the step waits here, and only here."""
        valid = torch.ones_like(scores, dtype=torch.bool) if is_masked is None else is_masked
        return StepCounts.from_kept(num_masked, self.selector.num_kept(candidates, scores, valid))

    def _mask_decided(self, counts: list[int], step: int) -> None:
        """Masks the ``counts[b]`` tokens of row b with the highest remasking scores that earlier steps decided."""
        # ``self.masked`` still is the mask before this step, so the draws of this step are not among them.
        is_decided = self.unknown & ~self.masked  # (B, N)
        every_position = torch.arange(is_decided.shape[1], device=is_decided.device).expand_as(is_decided)
        scores = self.selector.remasking_scores(
            Decided(
                confidence=self.confidence,
                gumbel=self.noise.gumbel(every_position, step),
                progress=(step + 1) / self.num_steps,
            )
        )  # (B, N)
        order = scores.masked_fill(~is_decided, -torch.inf).argsort(dim=1, descending=True, stable=True)
        self.tokens = mask_first(self.tokens, order, counts, self.mask_token_id)

"""The parallel decoder of MaskGIT: draws every masked token, keeps the surest, masks the others again, T times over.

Each of the T steps does, for all images of the batch at once:

    1. Predict. Ask the predictor for logits (B, M, K) at the positions that are masked.
    2. Draw. Draw a code for each of these positions.
    3. Score. The token selector scores the draws: the higher, the surer a draw is kept.
    4. Count. The mask schedule says how many tokens stay masked (``plan``), or the selector does.
    5. Mask again. The draws with the lowest scores become mask tokens again. A selector may also mask tokens again
       that earlier steps decided.

The last step keeps all of its draws: they are the result.

Shapes: B images, N tokens of an image, K codes, M masked tokens of the image that has the most. The other images are
padded to M with known positions, whose codes, confidence and order never change.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskgit_pl.decoding.limits import check_num_steps, check_token_counts, check_token_sum
from maskgit_pl.decoding.noise import Noise
from maskgit_pl.decoding.plan import StepCounts, count_by_list, count_by_schedule, plan_steps, step_progress
from maskgit_pl.decoding.predictors import Predictor
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import Candidates, Decided, TokenSelector
from maskgit_pl.schedules import MaskSchedule

__all__ = ["DecodingStep", "ParallelDecoder"]


@dataclass(frozen=True)
class DecodingStep:
    """One step of a decoding run.

    Args:
        step: t, counted from 0.
        tokens: (B, N) int64 in [0, K): the step's full draw, before anything is masked again.
        was_masked: (B, N) bool: masked before the step.
        still_masked: (B, N) bool: masked after it; nowhere at the last step.
        scores: (B, N) float32: the selector's scores where ``was_masked``, +inf elsewhere.
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was last drawn; 1 where a code
            was given from the start.
    """

    step: int
    tokens: Tensor
    was_masked: Tensor
    still_masked: Tensor
    scores: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class ParallelDecoder:
    """Fills masked tokens in ``num_steps`` parallel steps.

    At step t every masked token is drawn from the predictor's distribution; then
    max(1, min(masked - 1, floor(gamma((t + 1) / T) * masked at the start))) of them, those with the lowest scores, are
    masked again. The result is the last step's draw. A selector may also mask tokens again that were decided before,
    or decide itself how many to keep; at the last step all are kept.

    Args:
        mask_schedule: The schedule object that the mask sampler holds.
        token_selector: Which tokens to keep.
        num_steps: T, at least 1 and at most the number of tokens.
        sampling: Temperature and truncation of the logits that codes are drawn from.
        tokens_per_step: Number of tokens that each step decides, in place of the mask schedule: T numbers of at least
            1 that sum to the number of tokens. If fewer are masked at the start, in proportion, rounded down.

    Raises:
        ValueError: if a number is out of range.
    """

    mask_schedule: MaskSchedule
    token_selector: TokenSelector
    num_steps: int = 8
    sampling: CodeSampling = field(default_factory=CodeSampling)
    tokens_per_step: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        if self.tokens_per_step is not None:
            check_token_counts(self.tokens_per_step, self.num_steps, self.token_selector)

    def count_masked(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[list[int]]:
        """Returns how many tokens of each row are masked before each step, and after the last (0).

        Args:
            at_start: Masked tokens of each row at the start.
            num_tokens: N, tokens of an image.
            first_step: Step to begin at (editing begins late), in [0, num_steps).

        Returns:
            num_steps - first_step + 1 lists of one count a row. If the selector decides how many to keep, the most
            that can be masked.

        Raises:
            ValueError: if there are more steps than tokens, ``first_step`` is out of range, or ``tokens_per_step`` has
                another sum.
        """
        plan = self.plan(at_start, num_tokens, first_step=first_step)
        return [plan[0].before, *(counts.after for counts in plan)]

    def plan(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[StepCounts]:
        """Returns the counts of each step; arguments and errors as in ``count_masked``."""
        check_num_steps(self.num_steps, num_tokens)
        if not 0 <= first_step < self.num_steps:
            raise ValueError(f"first_step: a step in [0, {self.num_steps}) is needed, got {first_step}")
        if self.tokens_per_step is None:
            planned = count_by_schedule(self.mask_schedule, self.token_selector, self.num_steps, at_start, num_tokens)
        else:
            check_token_sum(self.tokens_per_step, num_tokens)
            planned = count_by_list(self.tokens_per_step, at_start, num_tokens)
        return plan_steps(at_start, planned, self.token_selector.num_remasked, first_step=first_step)

    @torch.no_grad()
    def steps(
        self,
        predictor: Predictor,
        tokens: Tensor,
        noise: Noise,
        *,
        mask_token_id: int,
        first_step: int = 0,
        grid: tuple[int, int] | None = None,
        num_masked: Sequence[int] | None = None,
    ) -> Iterator[DecodingStep]:
        """Decodes, one step at a time.

        Args:
            predictor: Gives the logits.
            tokens: (B, N) int64: known codes, and ``mask_token_id`` at unknown positions.
            noise: Source of the random numbers.
            mask_token_id: The id that marks an unknown token.
            first_step: Step to begin at, in [0, num_steps).
            grid: Rows and columns of tokens, for selectors that look at places.
            num_masked: Masked tokens of each row, if the caller knows them; None asks the device, and waits.

        Yields:
            A ``DecodingStep`` for each step; known tokens never change. Nothing, where nothing is masked. A selector
            that decides itself how many to keep may be done before the last step.
        """
        masked = tokens == mask_token_id
        at_start = list(num_masked) if num_masked is not None else masked.sum(1).tolist()
        plan = self.plan(at_start, tokens.shape[1], first_step=first_step)
        run = _Run(self, predictor, noise, mask_token_id=mask_token_id, grid=grid, tokens=tokens, masked=masked)
        yield from run.steps(plan, first_step)

    def decode(
        self, predictor: Predictor, tokens: Tensor, noise: Noise, *, mask_token_id: int, first_step: int = 0
    ) -> Tensor:
        """Returns the tokens (B, N) int64 in [0, K) that ``steps`` ends with; arguments as there."""
        last = tokens
        for step in self.steps(predictor, tokens, noise, mask_token_id=mask_token_id, first_step=first_step):
            last = step.tokens
        return last


class _Run:
    """The state of one decoding run; arguments as in ``ParallelDecoder.steps``.

    Attributes:
        tokens: (B, N) int64: codes, and ``mask_token_id`` where ``masked``.
        masked: (B, N) bool.
        unknown: (B, N) bool: masked at the start. Other tokens were given and are never masked.
        confidence: (B, N) float32: the probability that each code had when it was last drawn; 1 for given codes.
        no_scores: (B, N) float32: +inf, the score of a position that no step has drawn.
    """

    def __init__(
        self,
        decoder: ParallelDecoder,
        predictor: Predictor,
        noise: Noise,
        *,
        mask_token_id: int,
        grid: tuple[int, int] | None,
        tokens: Tensor,
        masked: Tensor,
    ) -> None:
        self.selector, self.sampling, self.num_steps = decoder.token_selector, decoder.sampling, decoder.num_steps
        self.predictor, self.noise = predictor, noise
        self.mask_token_id, self.grid = mask_token_id, grid
        self.tokens, self.masked, self.unknown = tokens, masked, masked
        self.confidence = torch.ones(tokens.shape, device=tokens.device)
        self.no_scores = torch.full_like(self.confidence, torch.inf)

    def steps(self, plan: Sequence[StepCounts], first_step: int) -> Iterator[DecodingStep]:
        """Follows the plan, or the selector if it decides itself how many to keep."""
        num_masked = plan[0].before
        positions = _sort_masked_first(self.masked, num_masked)  # (B, M)
        newly_known = positions[:, :0]  # (B, 0): no step has decided anything
        for step, counts in enumerate(plan, start=first_step):
            if max(num_masked) == 0:
                return
            # 1. Predict.
            logits = self.predictor(self.tokens, positions, newly_known).float()  # (B, M, K)
            # 2. Draw.
            candidates = self._draw(logits, positions, step)
            drawn, probability = candidates.tokens, candidates.drawn_log_probs.exp()  # (B, M)
            # 3. Score.
            scores = self.selector(candidates)  # (B, M)
            is_masked = _mark_masked_columns(num_masked, positions)  # (B, M), None if no row is padded
            if is_masked is not None:  # padding keeps code and confidence; +inf sorts it behind what is masked
                scores = scores.where(is_masked, torch.inf)
                drawn = drawn.where(is_masked, self.tokens.gather(1, positions))
                probability = probability.where(is_masked, self.confidence.gather(1, positions))
            self.confidence = self.confidence.scatter(1, positions, probability)
            scores_by_position = self.no_scores.scatter(1, positions, scores)  # (B, N)
            # 4. Count.
            if not self.selector.follows_schedule and step < self.num_steps - 1:
                counts = self._selector_counts(candidates, scores, is_masked, num_masked)  # the plan is a bound
            # 5. Mask again: columns in order of score, the least sure first and padding last.
            order = scores.argsort(dim=1, stable=True)
            positions = positions.gather(1, order)
            all_drawn = self.tokens.scatter(1, candidates.positions, drawn)  # (B, N)
            was_masked = self.masked
            self.tokens = _mask_first(all_drawn, positions, counts.undecided, self.mask_token_id)
            has_remasked = max(counts.remasked) > 0
            if has_remasked:
                self._mask_decided(counts.remasked, step)
            self.masked = self.tokens == self.mask_token_id
            yield DecodingStep(step, all_drawn, was_masked, self.masked, scores_by_position, self.confidence)
            # For the next step: the columns are in order of score, so the masked positions come first.
            newly_known = _select_decided(num_masked, counts.undecided, positions)
            num_masked = counts.after
            positions = _sort_masked_first(self.masked, num_masked) if has_remasked else positions[:, : max(num_masked)]

    def _draw(self, logits: Tensor, positions: Tensor, step: int) -> Candidates:
        """Draws a code for each of ``positions`` (B, M) from ``logits`` (B, M, K)."""
        progress = (step + 1) / self.num_steps
        drawn = self.sampling.draw(
            logits,
            self.noise,
            positions,
            step=step,
            progress=step_progress(step, self.num_steps),
            sharpness=self.selector.sharpness(progress),
        )
        return Candidates(
            log_probs=logits.log_softmax(-1),
            tokens=drawn,
            positions=positions,
            gumbel=self.noise.gumbel(positions, step),
            progress=progress,
            grid=self.grid,
        )

    def _selector_counts(
        self, candidates: Candidates, scores: Tensor, is_masked: Tensor | None, num_masked: list[int]
    ) -> StepCounts:
        """Returns the counts that the selector decides, read from the device: the one wait of such a step."""
        valid = torch.ones_like(scores, dtype=torch.bool) if is_masked is None else is_masked
        kept: list[int] = self.selector.num_kept(candidates, scores, valid).tolist()
        return StepCounts.from_kept(num_masked, kept)

    def _mask_decided(self, counts: list[int], step: int) -> None:
        """Masks ``counts[b]`` tokens of row b again that earlier steps decided, the most doubtful first."""
        is_decided = self.unknown & ~self.masked  # (B, N); what this step drew is not among them
        every_position = torch.arange(is_decided.shape[1], device=is_decided.device).expand_as(is_decided)
        scores = self.selector.remasking_scores(
            Decided(
                confidence=self.confidence,
                gumbel=self.noise.gumbel(every_position, step),
                progress=(step + 1) / self.num_steps,
            )
        )  # (B, N)
        order = scores.masked_fill(~is_decided, -torch.inf).argsort(dim=1, descending=True, stable=True)
        self.tokens = _mask_first(self.tokens, order, counts, self.mask_token_id)


def _sort_masked_first(masked: Tensor, counts: list[int]) -> Tensor:
    """(B, M) int64: the masked positions of each row in raster order, then known ones as padding."""
    num_tokens = masked.shape[1]
    if min(counts) == num_tokens:
        return torch.arange(num_tokens, device=masked.device).expand(masked.shape)
    return masked.logical_not().argsort(dim=1, stable=True)[:, : max(counts)]


def _mark_masked_columns(counts: list[int], positions: Tensor) -> Tensor | None:
    """(B, M) bool: the first counts[b] columns of row b, the rest being padding; None if there is no padding."""
    return None if min(counts) == positions.shape[1] else _mark_first_columns(counts, positions)


def _mark_first_columns(counts: list[int], like: Tensor) -> Tensor:
    """(B, M) bool in the shape of ``like``: the first counts[b] columns of row b."""
    limit = torch.tensor(counts).to(like.device, non_blocking=True)
    return torch.arange(like.shape[1], device=like.device) < limit.unsqueeze(1)


def _mask_first(tokens: Tensor, positions: Tensor, counts: list[int], mask_token_id: int) -> Tensor:
    """Masks tokens (B, N) at the first counts[b] positions of row b."""
    if min(counts) == max(counts):  # the usual case, without a transfer to the device
        return tokens.scatter(1, positions[:, : counts[0]], mask_token_id)
    kept = tokens.gather(1, positions).masked_fill(_mark_first_columns(counts, positions), mask_token_id)
    return tokens.scatter(1, positions, kept)


def _select_decided(before: list[int], after: list[int], positions: Tensor) -> Tensor:
    """(B, P): columns after[b] to before[b] of each row, padded with later ones, which are known too."""
    decided = max(b - a for b, a in zip(before, after, strict=True))
    if min(after) == max(after):
        return positions[:, after[0] : after[0] + decided]
    start = torch.tensor(after).to(positions.device, non_blocking=True).unsqueeze(1)
    # a row that decided fewer, at the right end of the columns, repeats its last position
    columns = (start + torch.arange(decided, device=positions.device)).clamp(max=positions.shape[1] - 1)
    return positions.gather(1, columns)

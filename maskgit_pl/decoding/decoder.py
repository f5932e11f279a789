"""The decoder: draws every masked token, keeps some, masks the rest again, until none is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskgit_pl.decoding.limits import check_num_steps, check_token_counts, check_token_sum
from maskgit_pl.decoding.noise import Noise
from maskgit_pl.decoding.predictors import Predictor
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import Candidates, Decided, TokenSelector
from maskgit_pl.schedules import MaskSchedule, num_masked

__all__ = ["DecodingStep", "ParallelDecoder", "StepCounts"]


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
class StepCounts:
    """How many tokens of each row a step finds masked, leaves masked, and masks again of those decided before it.

    Args:
        before: Masked before the step.
        after: Masked after it.
        remasked: Of ``after``, decided before the step.
    """

    before: list[int]
    after: list[int]
    remasked: list[int]

    @property
    def undecided(self) -> list[int]:
        """Drawn in the step and masked again at once."""
        return [after - again for after, again in zip(self.after, self.remasked, strict=True)]


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
        sampling: How codes are drawn from logits.
        tokens_per_step: How many tokens are decided in each step, in place of the mask schedule: T numbers of at least
            1 that sum to the number of tokens. Where fewer are masked at the start, in proportion, rounded down.

    Raises:
        ValueError: A number out of range.
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

    def masked_counts(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[list[int]]:
        """How many tokens of each row are masked before each step, and after the last (0).

        Args:
            at_start: Masked tokens of each row at the start.
            num_tokens: N, tokens of an image.
            first_step: Step to begin at (editing begins late), in [0, num_steps).

        Returns:
            num_steps - first_step + 1 lists of one count a row. Where the selector decides how many to keep, the most
            that can be masked.

        Raises:
            ValueError: More steps than tokens, ``first_step`` out of range, or ``tokens_per_step`` of another sum.
        """
        plan = self.plan(at_start, num_tokens, first_step=first_step)
        return [plan[0].before, *(counts.after for counts in plan)]

    def plan(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[StepCounts]:
        """The counts of each step; arguments and errors as of ``masked_counts``."""
        check_num_steps(self.num_steps, num_tokens)
        if not 0 <= first_step < self.num_steps:
            raise ValueError(f"first_step: a step in [0, {self.num_steps}) is needed, got {first_step}")
        planned = self._planned(at_start, num_tokens)
        steps, before = [], list(at_start)
        for step in range(first_step, self.num_steps):
            rows = zip(at_start, before, planned[step], strict=True)
            both = [self._row(step, unknown, masked, wanted) for unknown, masked, wanted in rows]
            after, remasked = ([row[part] for row in both] for part in (0, 1))
            steps.append(StepCounts(before, after, remasked))
            before = after
        return steps

    def _planned(self, at_start: Sequence[int], num_tokens: int) -> list[list[int]]:
        """What the schedule, or the list in its place, wants masked after each step of each row."""
        if self.tokens_per_step is not None:
            check_token_sum(self.tokens_per_step, num_tokens)
            left = [num_tokens - sum(self.tokens_per_step[: step + 1]) for step in range(self.num_steps)]
            return [[unknown * rest // num_tokens for unknown in at_start] for rest in left]
        progress = torch.arange(1, self.num_steps + 1, dtype=torch.float32) / self.num_steps
        progress = self.token_selector.schedule_progress(progress)
        ratios = self.mask_schedule(progress, num_tokens)  # on the host, in float32, before the loop
        counts: list[list[int]] = num_masked(
            ratios.unsqueeze(1), torch.tensor(list(at_start)), rounding="floor"
        ).tolist()  # (T, B)
        return counts

    def _row(self, step: int, unknown: int, masked: int, planned: int) -> tuple[int, int]:
        """Of one row: masked after a step, and how many of these were decided before."""
        if step == self.num_steps - 1:
            return 0, 0
        decided = unknown - masked
        remasked = self.token_selector.num_remasked(
            decided=decided, planned=planned, progress=(step + 1) / self.num_steps
        )
        remasked = max(0, min(remasked, decided, unknown - 1))
        after = min(masked, max(1, remasked, min(masked - 1 + remasked, planned)))
        return after, min(remasked, after)

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
            predictor: Where logits come from.
            tokens: (B, N) int64: known codes, and ``mask_token_id`` where they are to be found.
            noise: Where chance comes from.
            mask_token_id: The id that marks an unknown token.
            first_step: Step to begin at, in [0, num_steps).
            grid: Rows and columns of tokens, for selectors that look at places.
            num_masked: Masked tokens of each row, where the caller knows them; else the device is asked, which waits.

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
        """The tokens (B, N) int64 in [0, K) that ``steps`` ends with; arguments as there."""
        last = tokens
        for step in self.steps(predictor, tokens, noise, mask_token_id=mask_token_id, first_step=first_step):
            last = step.tokens
        return last


class _Run:
    """The state of one decoding run; arguments as of ``ParallelDecoder.steps``."""

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
        self.tokens, self.masked = tokens, masked
        self.unknown = masked  # at the start: what may ever be masked
        self.confidence = torch.ones(tokens.shape, device=tokens.device)
        self.surest = torch.full_like(self.confidence, torch.inf)

    def steps(self, plan: Sequence[StepCounts], first_step: int) -> Iterator[DecodingStep]:
        """Follows the plan, or the selector where it decides itself how many to keep."""
        before = plan[0].before
        positions = _masked_first(self.masked, before)
        newly_known = positions[:, :0]
        for step, counts in enumerate(plan, start=first_step):
            if max(before) == 0:
                return
            logits = self.predictor(self.tokens, positions, newly_known).float()
            valid = _valid(before, positions)
            candidates = self._candidates(logits, positions, step)
            scores, drawn, sure = self.selector(candidates), candidates.tokens, candidates.drawn_log_probs.exp()
            if valid is not None:
                scores = scores.where(valid, torch.inf)
                drawn = drawn.where(valid, self.tokens.gather(1, positions))
                sure = sure.where(valid, self.confidence.gather(1, positions))
            if not self.selector.follows_schedule and step < self.num_steps - 1:
                counts = self._own_counts(candidates, scores, valid, before)  # the plan is a bound
            self.confidence = self.confidence.scatter(1, positions, sure)
            everywhere = self.surest.scatter(1, positions, scores)
            ranks = scores.argsort(dim=1, stable=True)  # least sure first; padding last
            full = self.tokens.scatter(1, positions, drawn)
            positions, was_masked, again = positions.gather(1, ranks), self.masked, max(counts.remasked) > 0
            self.tokens = _masked_at(full, positions, counts.undecided, self.mask_token_id)
            if again:
                self._mask_again(counts.remasked, step)
            self.masked = self.tokens == self.mask_token_id
            yield DecodingStep(step, full, was_masked, self.masked, everywhere, self.confidence)
            newly_known = _between(before, counts.undecided, positions)
            before = counts.after
            positions = _masked_first(self.masked, before) if again else positions[:, : max(before)]

    def _candidates(self, logits: Tensor, positions: Tensor, step: int) -> Candidates:
        progress = (step + 1) / self.num_steps
        drawn = self.sampling.draw(
            logits,
            self.noise,
            positions,
            step=step,
            position=step / (self.num_steps - 1) if self.num_steps > 1 else 1.0,
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

    def _own_counts(
        self, candidates: Candidates, scores: Tensor, valid: Tensor | None, before: list[int]
    ) -> StepCounts:
        """What the selector decides, read from the device: the one wait of such a step."""
        unmasked = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        kept: list[int] = self.selector.num_kept(candidates, scores, unmasked).tolist()
        after = [max(0, masked - max(1, count)) for masked, count in zip(before, kept, strict=True)]
        return StepCounts(before, after, [0] * len(after))

    def _mask_again(self, counts: list[int], step: int) -> None:
        """Masks tokens that were decided in earlier steps: of each row as many as said, the most doubtful first."""
        decided = self.unknown & ~self.masked
        everywhere = torch.arange(decided.shape[1], device=decided.device).expand_as(decided)
        doubts = self.selector.doubts(
            Decided(
                confidence=self.confidence,
                gumbel=self.noise.gumbel(everywhere, step),
                progress=(step + 1) / self.num_steps,
            )
        )
        order = doubts.masked_fill(~decided, -torch.inf).argsort(dim=1, descending=True, stable=True)
        self.tokens = _masked_at(self.tokens, order, counts, self.mask_token_id)


def _masked_first(masked: Tensor, counts: list[int]) -> Tensor:
    """(B, M) int64: the masked positions of each row in raster order, then known ones as padding."""
    num_tokens = masked.shape[1]
    if min(counts) == num_tokens:
        return torch.arange(num_tokens, device=masked.device).expand(masked.shape)
    return masked.logical_not().argsort(dim=1, stable=True)[:, : max(counts)]


def _valid(counts: list[int], positions: Tensor) -> Tensor | None:
    """(B, M) bool: the first counts[b] of row b, the rest being padding; None where there is no padding."""
    return None if min(counts) == positions.shape[1] else _first(counts, positions)


def _first(counts: list[int], like: Tensor) -> Tensor:
    """(B, M) bool in the shape of ``like``: the first counts[b] of row b."""
    limit = torch.tensor(counts).to(like.device, non_blocking=True)
    return torch.arange(like.shape[1], device=like.device) < limit.unsqueeze(1)


def _masked_at(tokens: Tensor, positions: Tensor, counts: list[int], mask_token_id: int) -> Tensor:
    """The tokens (B, N), masked at the first counts[b] positions of row b."""
    if min(counts) == max(counts):  # the usual case, without a transfer to the device
        return tokens.scatter(1, positions[:, : counts[0]], mask_token_id)
    kept = tokens.gather(1, positions).masked_fill(_first(counts, positions), mask_token_id)
    return tokens.scatter(1, positions, kept)


def _between(before: list[int], after: list[int], positions: Tensor) -> Tensor:
    """(B, P): the positions from after[b] to before[b] of each row, padded with later ones, which are known too."""
    decided = max(b - a for b, a in zip(before, after, strict=True))
    if min(after) == max(after):
        return positions[:, after[0] : after[0] + decided]
    start = torch.tensor(after).to(positions.device, non_blocking=True).unsqueeze(1)
    columns = (start + torch.arange(decided, device=positions.device)).clamp(max=positions.shape[1] - 1)
    return positions.gather(1, columns)

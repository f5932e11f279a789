"""The parallel decoder of MaskGIT: fills all masked tokens of an image in T steps.

Used by ``classes.decode_classes``. Each step processes all images of the batch together:

    1. Predict. The predictor returns logits (B, M, K) at the masked positions.
    2. Draw. A code is drawn for each of these positions.
    3. Score. The token selector scores the draws. High scores are kept.
    4. Count. The mask schedule (``plan``) or the selector sets how many tokens stay masked.
    5. Remask. The draws with the lowest scores become mask tokens again. A selector may also mask tokens that earlier
       steps decided.

The last step keeps all of its draws. They are the result.

A selector with ``needs_decided_logits`` compares the draws with the tokens that earlier steps decided; see
``correction``.

Shapes: B images, N tokens per image, K codes, M the largest number of masked tokens of an image in the batch. Images
with fewer masked tokens are padded to M with known positions. Padding never changes a code, a confidence or an order.

Source: paper, section on iterative decoding; google-research/maskgit, ``parallel_decode.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskgit_pl.decoding.correction import CorrectingRun
from maskgit_pl.decoding.limits import check_num_steps, check_token_counts, check_token_sum
from maskgit_pl.decoding.noise import Noise
from maskgit_pl.decoding.plan import StepCounts, count_by_list, count_by_schedule, plan_steps
from maskgit_pl.decoding.predictors import Predictor
from maskgit_pl.decoding.run import DecodingRun, DecodingStep
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.decoding.selectors import TokenSelector
from maskgit_pl.decoding.token_selector import CheckedSelector
from maskgit_pl.schedules import MaskSchedule

__all__ = ["ParallelDecoder"]


@dataclass(frozen=True)
class ParallelDecoder:
    """The decoder of MaskGIT, which fills masked tokens in ``num_steps`` parallel steps.

    Step t draws a code for each of the m masked tokens from the predictor's distribution. With U tokens masked at the
    start, the max(1, min(m - 1, floor(gamma((t + 1) / T) U))) draws with the lowest scores are then masked again. The
    result is the draw of the last step. A selector may also mask tokens that earlier steps decided, or set the number
    of tokens to keep itself; the last step always keeps all.

    Args:
        mask_schedule: gamma: the schedule object that the mask sampler of the training holds too.
        token_selector: Scores the draws.
        num_steps: T, in [1, N].
        sampling: Temperature and truncation of the logits that codes are drawn from.
        tokens_per_step: Number of tokens that each step decides, in place of the mask schedule: T integers >= 1 whose
            sum is N. Images with fewer masked tokens at the start decide them in proportion, rounded down.

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
        """Counts the masked tokens of each row before each step, and after the last (0).

        Args:
            at_start: Masked tokens of each row at the start.
            num_tokens: N, tokens per image.
            first_step: Step to begin at, in [0, T). Editing skips the first steps.

        Returns:
            T - first_step + 1 lists with one count per row. They are upper bounds if the selector sets the number of
            tokens to keep.

        Raises:
            ValueError: if T is above N, ``first_step`` is out of range, or ``tokens_per_step`` does not sum to N.
        """
        plan = self.plan(at_start, num_tokens, first_step=first_step)
        return [plan[0].before, *(counts.after for counts in plan)]

    def plan(self, at_start: Sequence[int], num_tokens: int, *, first_step: int = 0) -> list[StepCounts]:
        """Computes the counts of each step; see ``count_masked`` for arguments and errors."""
        check_num_steps(self.num_steps, num_tokens)
        if not 0 <= first_step < self.num_steps:
            raise ValueError(f"first_step must be in [0, {self.num_steps}), got {first_step}")
        if self.tokens_per_step is None:
            planned = count_by_schedule(self.mask_schedule, self.token_selector, self.num_steps, at_start, num_tokens)
        else:
            check_token_sum(self.tokens_per_step, num_tokens)
            planned = count_by_list(self.tokens_per_step, at_start, num_tokens)
        num_remasked = CheckedSelector(self.token_selector).num_remasked
        return plan_steps(at_start, planned, num_remasked, first_step=first_step)

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
        """Decodes, and yields after each step.

        Args:
            predictor: Computes the logits.
            tokens: (B, N) int64: known codes in [0, K), and ``mask_token_id`` at unknown positions.
            noise: Source of the random numbers.
            mask_token_id: Id of the mask token.
            first_step: Step to begin at, in [0, T).
            grid: Rows and columns of tokens, for selectors that depend on the position.
            num_masked: Masked tokens of each row; None counts them, which waits for the device.

        Yields:
            A ``DecodingStep`` for each step. Known tokens never change. Nothing is yielded if no token is masked. A
            selector that sets the number of tokens to keep may finish before the last step.
        """
        masked = tokens == mask_token_id
        at_start = list(num_masked) if num_masked is not None else masked.sum(1).tolist()
        plan = self.plan(at_start, tokens.shape[1], first_step=first_step)
        kind = CorrectingRun if self.token_selector.needs_decided_logits else DecodingRun
        run = kind(self, predictor, noise, mask_token_id=mask_token_id, grid=grid, tokens=tokens, masked=masked)
        yield from run.steps(plan, first_step)

    def decode(
        self, predictor: Predictor, tokens: Tensor, noise: Noise, *, mask_token_id: int, first_step: int = 0
    ) -> Tensor:
        """Returns the tokens (B, N) int64 in [0, K) of the last step; see ``steps`` for the arguments."""
        last = tokens
        for step in self.steps(predictor, tokens, noise, mask_token_id=mask_token_id, first_step=first_step):
            last = step.tokens
        return last

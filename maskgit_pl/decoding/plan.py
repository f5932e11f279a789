"""The number of tokens that each decoding step finds masked and leaves masked: arithmetic on the host, before the loop.

Of a row that starts with U unknown tokens, m are masked before step t of T. After the step

    planned  = floor(gamma((t + 1) / T) U), or what the list ``tokens_per_step`` says in its place
    remasked = what the token selector masks again of the U - m tokens that earlier steps decided, usually 0
    after    = min(m, max(1, remasked, min(m - 1 + remasked, planned))), and 0 after the last step

tokens are masked. ``decoder.ParallelDecoder`` follows the counts: all shapes of a run are known before it begins.

Source: google-research/maskgit, ``parallel_decode.py`` (at least 1 and at most m - 1 stay masked); remasking: ReMDM,
arXiv:2503.00307.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskgit_pl.decoding.selectors import TokenSelector
    from maskgit_pl.schedules import MaskSchedule

__all__ = ["StepCounts", "count_after", "count_by_list", "count_by_schedule", "plan_steps", "step_progress"]


@dataclass(frozen=True)
class StepCounts:
    """The number of tokens of each row that are masked before and after a step, and masked again by it.

    Args:
        before: Masked before the step.
        after: Masked after it.
        remasked: Those of ``after`` that earlier steps had decided.
    """

    before: list[int]
    after: list[int]
    remasked: list[int]

    @property
    def undecided(self) -> list[int]:
        """Drawn in the step and masked again at once."""
        return [after - remasked for after, remasked in zip(self.after, self.remasked, strict=True)]

    @classmethod
    def from_kept(cls, before: list[int], kept: Sequence[int]) -> StepCounts:
        """Returns the counts of a step that keeps ``kept[b]`` tokens of row b, at least 1 and at most all."""
        after = [max(0, masked - max(1, count)) for masked, count in zip(before, kept, strict=True)]
        return cls(before, after, [0] * len(after))


def step_progress(step: int, num_steps: int) -> float:
    """Returns t / (T - 1): 0 at the first step and 1 at the last. A single step counts as the last."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


def count_by_schedule(
    mask_schedule: MaskSchedule, selector: TokenSelector, num_steps: int, at_start: Sequence[int], num_tokens: int
) -> list[list[int]]:
    """Returns how many tokens the mask schedule wants masked after each step: T lists of one count a row.

    Args:
        mask_schedule: gamma.
        selector: May stretch the schedule (``schedule_progress``).
        num_steps: T.
        at_start: Unknown tokens of each row.
        num_tokens: N, tokens of an image.
    """
    import torch

    from maskgit_pl.schedules import num_masked

    progress = torch.arange(1, num_steps + 1, dtype=torch.float32) / num_steps
    ratios = mask_schedule(selector.schedule_progress(progress), num_tokens)  # (T,), float32, on the CPU
    counts: list[list[int]] = num_masked(
        ratios.unsqueeze(1), torch.tensor(list(at_start)), rounding="floor"
    ).tolist()  # (T, B)
    return counts


def count_by_list(tokens_per_step: Sequence[int], at_start: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Returns how many tokens are masked after each step when a list says how many each decides.

    Args:
        tokens_per_step: T numbers that sum to ``num_tokens``.
        at_start: Unknown tokens of each row. If fewer than all, the list counts in proportion, rounded down.
        num_tokens: N, tokens of an image.

    Returns:
        T lists of one count a row.
    """
    left = [num_tokens - sum(tokens_per_step[: step + 1]) for step in range(len(tokens_per_step))]
    return [[unknown * rest // num_tokens for unknown in at_start] for rest in left]


def plan_steps(
    at_start: Sequence[int],
    planned: Sequence[Sequence[int]],
    num_remasked: Callable[..., int],
    *,
    first_step: int = 0,
) -> list[StepCounts]:
    """Returns the counts of the steps from ``first_step`` on.

    Args:
        at_start: Masked tokens of each row before ``first_step``.
        planned: T lists: the tokens that the schedule wants masked after each step, of each row.
        num_remasked: As ``TokenSelector.num_remasked``.
        first_step: In [0, T).
    """
    num_steps = len(planned)
    steps, before = [], list(at_start)
    for step in range(first_step, num_steps):
        after, remasked = [0] * len(before), [0] * len(before)
        for row, (unknown, masked, wanted) in enumerate(zip(at_start, before, planned[step], strict=True)):
            if step == num_steps - 1:
                continue  # the last step decides everything
            decided = unknown - masked
            asked = num_remasked(decided=decided, planned=wanted, progress=(step + 1) / num_steps)
            after[row], remasked[row] = count_after(masked, wanted, max(0, min(asked, decided)))
        steps.append(StepCounts(before, after, remasked))
        before = after
    return steps


def count_after(masked: int, planned: int, remasked: int) -> tuple[int, int]:
    """Returns how many tokens of a row are masked after a step that is not the last, and how many of them again.

    Args:
        masked: Masked before the step.
        planned: Wanted by the schedule after it.
        remasked: Tokens decided before that the selector masks again, not negative.
    """
    most = masked - 1 + remasked  # every step decides at least one of the tokens that it draws
    least = max(1, remasked)  # the next step needs something to decide, and what is masked again is masked
    after = min(masked, max(least, min(most, planned)))  # never more than before: a row that is done stays done
    return after, min(remasked, after)

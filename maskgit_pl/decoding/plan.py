"""The counts of masked tokens before and after each decoding step, and checks of settings against a model.

The counts are computed on the host before the loop of ``decoder.ParallelDecoder``, so that all tensor shapes of a run
are known before it begins. A row starts with U unknown tokens, and m of them are masked before step t of T. The counts
after the step are

    planned  = floor(gamma((t + 1) / T) U), or the count that the list ``tokens_per_step`` gives
    remasked = tokens that the token selector masks again, of the U - m that earlier steps decided; usually 0
    after    = min(m, max(1, remasked, min(m - 1 + remasked, planned))), and 0 after the last step

``DecodingConfig.check`` uses the checks, which import no torch.

Source: google-research/maskgit, ``parallel_decode.py`` (at least 1 and at most m - 1 tokens stay masked); remasking:
ReMDM, arXiv:2503.00307.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from maskgit_pl.decoding.token_selector import CheckedSelector, TokenSelector
from maskgit_pl.schedules import MaskSchedule, compute_ratios, num_masked

__all__ = [
    "DrawMethod",
    "StepCounts",
    "check_guidance",
    "check_num_steps",
    "check_parallel",
    "check_token_counts",
    "check_token_sum",
    "count_after",
    "count_by_list",
    "count_by_schedule",
    "plan_steps",
    "step_progress",
]

DrawMethod = Literal["gumbel", "inverse_cdf"]
"""Methods of drawing codes from the softmax. They draw from the same distribution, but different codes for a seed.

- ``gumbel``: the largest sum of a logit and a Gumbel number. A small change of the logits, as of bfloat16, int8 or
  another device, changes few draws. The released code draws so.
- ``inverse_cdf``: by inverting the cumulative distribution, with one uniform number for a position. A small change of
  one probability moves the intervals of all later codes.
"""


@dataclass(frozen=True)
class StepCounts:
    """The counts of one step: one integer per row of the batch.

    Args:
        before: Tokens masked before the step.
        after: Tokens masked after the step.
        remasked: Tokens among ``after`` that earlier steps had decided.
    """

    before: list[int]
    after: list[int]
    remasked: list[int]

    @property
    def undecided(self) -> list[int]:
        """The tokens of each row that the step draws and immediately masks again."""
        return [after - remasked for after, remasked in zip(self.after, self.remasked, strict=True)]

    @classmethod
    def from_kept(cls, before: list[int], kept: Sequence[int]) -> StepCounts:
        """Returns the counts of a step that keeps ``kept[b]`` tokens of row b, clipped to [1, before[b]]."""
        after = [max(0, masked - max(1, count)) for masked, count in zip(before, kept, strict=True)]
        return cls(before, after, [0] * len(after))


def plan_steps(
    at_start: Sequence[int],
    planned: Sequence[Sequence[int]],
    num_remasked: Callable[..., int],
    *,
    first_step: int = 0,
) -> list[StepCounts]:
    """Returns the counts of the steps from ``first_step`` to the last one.

    Args:
        at_start: Masked tokens of each row before ``first_step``.
        planned: T lists with one count per row, from ``count_by_schedule`` or ``count_by_list``.
        num_remasked: The method ``TokenSelector.num_remasked``.
        first_step: First step, in [0, T).
    """
    num_steps = len(planned)
    steps, before = [], list(at_start)
    for step in range(first_step, num_steps):
        after, remasked = [0] * len(before), [0] * len(before)
        for row, (unknown, masked, wanted) in enumerate(zip(at_start, before, planned[step], strict=True)):
            if step == num_steps - 1:
                continue  # the last step keeps all of its draws
            decided = unknown - masked
            asked = num_remasked(decided=decided, planned=wanted, progress=(step + 1) / num_steps)
            after[row], remasked[row] = count_after(masked, wanted, max(0, min(asked, decided)))
        steps.append(StepCounts(before, after, remasked))
        before = after
    return steps


def count_after(masked: int, planned: int, remasked: int) -> tuple[int, int]:
    """Counts the tokens of a row that are masked after a step, and those among them that are remasked.

    Args:
        masked: m, tokens masked before the step, which is not the last one.
        planned: Count that the schedule gives after the step.
        remasked: Tokens decided by earlier steps that the selector masks again, >= 0.
    """
    # The released code clips to [1, m - 1]: each step decides at least one token, and leaves one for the next step.
    most = masked - 1 + remasked
    least = max(1, remasked)
    # The number of masked tokens never grows, so a finished row (m = 0) stays finished.
    after = min(masked, max(least, min(most, planned)))
    return after, min(remasked, after)


def count_by_schedule(
    mask_schedule: MaskSchedule, selector: TokenSelector, num_steps: int, at_start: Sequence[int], num_tokens: int
) -> list[list[int]]:
    """Counts the tokens that the mask schedule leaves masked after each step.

    Args:
        mask_schedule: gamma.
        selector: The token selector, which may warp the schedule (``schedule_progress``).
        num_steps: T.
        at_start: U, unknown tokens of each row.
        num_tokens: N, tokens per image.

    Returns:
        T lists with one count per row.
    """
    import torch

    progress = torch.arange(1, num_steps + 1, dtype=torch.float32) / num_steps
    ratios = compute_ratios(mask_schedule, CheckedSelector(selector).schedule_progress(progress), num_tokens)  # (T,)
    unknown = torch.tensor(list(at_start))  # (B,), on the CPU as the ratios
    counts: list[list[int]] = num_masked(ratios.unsqueeze(1), unknown, rounding="floor").tolist()  # (T, B)
    return counts


def count_by_list(tokens_per_step: Sequence[int], at_start: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Counts the tokens that a list of tokens per step leaves masked after each step.

    Args:
        tokens_per_step: T integers that sum to ``num_tokens``: the tokens that each step decides.
        at_start: U, unknown tokens of each row. The counts scale by U / N, rounded down.
        num_tokens: N, tokens per image.

    Returns:
        T lists with one count per row.
    """
    left = [num_tokens - sum(tokens_per_step[: step + 1]) for step in range(len(tokens_per_step))]
    return [[unknown * rest // num_tokens for unknown in at_start] for rest in left]


def step_progress(step: int, num_steps: int) -> float:
    """Returns t / (T - 1): 0 at the first step and 1 at the last. A single step counts as the last one."""
    return step / (num_steps - 1) if num_steps > 1 else 1.0


def check_num_steps(num_steps: int, num_tokens: int | None = None) -> None:
    """Checks the number of decoding steps.

    Args:
        num_steps: T.
        num_tokens: N, tokens per image; None if it is not known yet.

    Raises:
        ValueError: if ``num_steps`` is below 1 or above ``num_tokens``.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    if num_tokens is not None and num_steps > num_tokens:
        raise ValueError(f"num_steps must be <= {num_tokens}, the tokens per image, got {num_steps}")


def check_token_counts(tokens_per_step: Sequence[int], num_steps: int, selector: TokenSelector) -> None:
    """Checks a list of token counts against the steps and the selector.

    Args:
        tokens_per_step: Number of tokens that each step decides.
        num_steps: T.
        selector: The token selector.

    Raises:
        ValueError: if the selector sets the number of tokens to keep, or the list does not hold T integers >= 1.
    """
    if not selector.follows_schedule:
        raise ValueError(
            f"tokens_per_step must not be set for token selector {type(selector).__name__}, which sets the number of "
            f"tokens of each step itself, got {list(tokens_per_step)}; leave it out"
        )
    if len(tokens_per_step) != num_steps or min(tokens_per_step) < 1:
        raise ValueError(f"tokens_per_step must be {num_steps} integers >= 1, got {list(tokens_per_step)}")


def check_token_sum(tokens_per_step: Sequence[int], num_tokens: int) -> None:
    """Checks that a list of token counts sums to the tokens of an image.

    Args:
        tokens_per_step: Number of tokens that each step decides.
        num_tokens: N, tokens per image.

    Raises:
        ValueError: if it does not.
    """
    if sum(tokens_per_step) != num_tokens:
        raise ValueError(
            f"tokens_per_step must sum to {num_tokens}, the tokens per image, got a sum of {sum(tokens_per_step)}"
        )


def check_guidance(scales: Sequence[float], *, has_negative_class: bool) -> None:
    """Checks that guidance has a class to push images away from.

    Args:
        scales: Guidance scale of each step, >= 0.
        has_negative_class: True if the model has a null class, or negative classes are named.

    Raises:
        ValueError: if a scale is positive and ``has_negative_class`` is False.
    """
    if not has_negative_class and any(scale > 0 for scale in scales):
        raise ValueError(
            "guidance must have scale 0 for a model that has no null class (trained with class_dropout 0), got a "
            f"scale of {max(scales):g}; use scale 0, or name negative classes"
        )


def check_parallel(task: str, *, is_autoregressive: bool) -> None:
    """Checks that a model can fill masked tokens in any order.

    Args:
        task: Name of the task, for the message.
        is_autoregressive: True if the model draws one token per step.

    Raises:
        ValueError: if the model is autoregressive.
    """
    if is_autoregressive:
        raise ValueError(
            f"{task} requires a model with bidirectional attention, which fills masked tokens in any order, got an "
            "autoregressive one; choose another run"
        )

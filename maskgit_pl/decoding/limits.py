"""Names of decoding settings, and checks of them against the sizes and the kind of a model.

Used by ``ParallelDecoder``, and by ``DecodingConfig.check``, which checks numbers without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from maskgit_pl.decoding.selectors import TokenSelector

__all__ = [
    "DrawMethod",
    "check_guidance",
    "check_num_steps",
    "check_parallel",
    "check_token_counts",
    "check_token_sum",
]

DrawMethod = Literal["gumbel", "inverse_cdf"]
"""Methods of drawing codes from the softmax. They draw from the same distribution, but different codes for a seed.

- ``gumbel``: the largest sum of a logit and a Gumbel number. A small change of the logits, as of bfloat16, int8 or
  another device, changes few draws. The released code draws so.
- ``inverse_cdf``: by inverting the cumulative distribution, with one uniform number for a position. A small change of
  one probability moves the intervals of all later codes.
"""


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

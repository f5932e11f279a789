"""Limits of the number of decoding steps, and of the tokens that each of them may decide.

Used by ``ParallelDecoder``, and by ``DecodingConfig.check``, which refuses a wrong number without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskgit_pl.decoding.selectors import TokenSelector

__all__ = ["check_guidance", "check_num_steps", "check_parallel", "check_token_counts", "check_token_sum"]


def check_guidance(scales: Sequence[float], *, has_negative_class: bool) -> None:
    """Refuses guidance where there is no class to push images away from.

    Args:
        scales: Guidance scale of each step.
        has_negative_class: The model has a null class, or negative classes are named.

    Raises:
        ValueError: if any scale is positive and ``has_negative_class`` is False.
    """
    if not has_negative_class and any(scale > 0 for scale in scales):
        raise ValueError(
            "guidance: this model has no null class (it was trained with class_dropout 0); use scale 0, or name "
            "negative classes"
        )


def check_parallel(task: str, *, is_autoregressive: bool) -> None:
    """Refuses an autoregressive model for a task that fills masked tokens in any order.

    Args:
        task: Name of the task, for the error.
        is_autoregressive: The model draws one token after the other.

    Raises:
        ValueError: if the model is autoregressive.
    """
    if is_autoregressive:
        raise ValueError(
            f"{task}: a model with bidirectional attention is needed, which fills masked tokens in any order, got an "
            "autoregressive one, which draws whole images from their first token on; take another run"
        )


def check_num_steps(num_steps: int, num_tokens: int | None = None) -> None:
    """Refuses a number of decoding steps that an image cannot take.

    Args:
        num_steps: T.
        num_tokens: N, tokens of an image; None if it is not known yet.

    Raises:
        ValueError: if ``num_steps`` is below 1 or above ``num_tokens``.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: at least 1 is needed, got {num_steps}")
    if num_tokens is not None and num_steps > num_tokens:
        raise ValueError(f"num_steps: at most the {num_tokens} tokens of an image, got {num_steps}")


def check_token_counts(tokens_per_step: Sequence[int], num_steps: int, selector: TokenSelector) -> None:
    """Refuses a list of token counts that does not go with the steps and the selector.

    Args:
        tokens_per_step: Number of tokens that each step decides.
        num_steps: T.
        selector: Which tokens are kept.

    Raises:
        ValueError: if the selector decides itself how many to keep, or the list is not T numbers of at least 1.
    """
    if not selector.follows_schedule:
        raise ValueError(
            f"tokens_per_step: token selector {type(selector).__name__} decides itself how many to keep; leave the "
            "list out"
        )
    if len(tokens_per_step) != num_steps or min(tokens_per_step) < 1:
        raise ValueError(f"tokens_per_step: {num_steps} numbers of at least 1 are needed, got {list(tokens_per_step)}")


def check_token_sum(tokens_per_step: Sequence[int], num_tokens: int) -> None:
    """Refuses a list of token counts that does not sum to the tokens of an image.

    Args:
        tokens_per_step: Number of tokens that each step decides.
        num_tokens: N.

    Raises:
        ValueError: if the sum is another number.
    """
    if sum(tokens_per_step) != num_tokens:
        raise ValueError(
            f"tokens_per_step: numbers that sum to the {num_tokens} tokens of an image are needed, got "
            f"{sum(tokens_per_step)}"
        )

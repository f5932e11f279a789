"""How many steps an image can take, and how many tokens each of them may decide.

Used by ``ParallelDecoder``, and by ``DecodingConfig.check``, which refuses a wrong number without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from maskgit_pl.selectors import TokenSelector

__all__ = ["check_num_steps", "check_token_counts", "check_token_sum"]


def check_num_steps(num_steps: int, num_tokens: int | None = None) -> None:
    """Refuses a number of decoding steps that an image cannot take.

    Args:
        num_steps: T.
        num_tokens: N, tokens of an image; None where it is not known yet.

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
        tokens_per_step: How many tokens each step decides.
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
        tokens_per_step: How many tokens each step decides.
        num_tokens: N.

    Raises:
        ValueError: if the sum is another number.
    """
    if sum(tokens_per_step) != num_tokens:
        raise ValueError(
            f"tokens_per_step: numbers that sum to the {num_tokens} tokens of an image are needed, got "
            f"{sum(tokens_per_step)}"
        )

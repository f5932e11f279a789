"""The columns of a decoding step: the positions (B, M) that it works on, with padding for rows that have fewer.

Used by ``run`` and ``correction``. All counts are known on the host, so that nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mark_first_columns", "mark_masked_columns", "mask_first", "sort_masked_first"]


def sort_masked_first(masked: Tensor, counts: list[int]) -> Tensor:
    """Returns (B, M) int64: the masked positions of each row in raster order, then known positions as padding."""
    num_tokens = masked.shape[1]
    if min(counts) == num_tokens:  # all tokens are masked: the order is known without a sort
        return torch.arange(num_tokens, device=masked.device).expand(masked.shape)
    return masked.logical_not().argsort(dim=1, stable=True)[:, : max(counts)]


def mark_masked_columns(counts: list[int], positions: Tensor) -> Tensor | None:
    """Returns (B, M) bool: False in the columns that pad a row beyond counts[b]; None if no row is padded."""
    return None if min(counts) == positions.shape[1] else mark_first_columns(counts, positions)


def mark_first_columns(counts: list[int], like: Tensor) -> Tensor:
    """Returns (B, M) bool in the shape of ``like``: True in the first counts[b] columns of row b."""
    limit = torch.tensor(counts).to(like.device, non_blocking=True)
    return torch.arange(like.shape[1], device=like.device) < limit.unsqueeze(1)


def mask_first(tokens: Tensor, positions: Tensor, counts: list[int], mask_token_id: int) -> Tensor:
    """Masks tokens (B, N) at the first counts[b] positions of row b."""
    if min(counts) == max(counts):  # the usual case: slicing copies no counts to the device
        return tokens.scatter(1, positions[:, : counts[0]], mask_token_id)
    kept = tokens.gather(1, positions).masked_fill(mark_first_columns(counts, positions), mask_token_id)
    return tokens.scatter(1, positions, kept)

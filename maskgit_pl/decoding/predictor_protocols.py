"""Protocols of decoding: a source of logits, and the networks that predictors run. ``predictors`` implements them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["ConditionalNetwork", "Predictor"]


class Predictor(Protocol):
    """A source of the logits of masked tokens. It serves one decoding run: it may count its calls."""

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Predicts the codes at masked positions.

        Args:
            tokens: (B, N) int64: codes in [0, K), and ``mask_token_id`` at unknown positions.
            positions: (B, M) int64 in [0, N): the masked positions. Rows with fewer masked tokens are padded with known
                positions, whose logits are ignored.

        Returns:
            (B, M, K) float: logits of the codes.
        """


class ConditionalNetwork(Protocol):
    """A network that computes the logits of the codes at some positions, given tokens and labels."""

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Computes logits (B, M, K) at positions (B, M) of tokens (B, N) for labels (B,), all int64."""

"""The formula of guidance, and guidance by a second network. ``predictors`` builds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskgit_pl.decoding.predictor_protocols import Predictor

__all__ = ["AutoguidedPredictor", "apply_guidance"]


def apply_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Applies classifier-free guidance: conditional + scale (conditional - unconditional).

    Args:
        conditional: Logits of any shape.
        unconditional: Logits of the same shape.
        scale: Guidance scale >= 0; 0 returns the conditional logits.

    Returns:
        float32 logits of that shape.
    """
    # u + (1 + s) (c - u) = c + s (c - u), in one kernel.
    return torch.lerp(unconditional.float(), conditional.float(), 1 + scale)


class AutoguidedPredictor:
    """A predictor with autoguidance: a weaker network takes the place of the unconditional prediction.

    guided = positive + scale (positive - negative), on logits. Both networks see the same tokens, each with its own
    mask token. Calls with scale 0 run the positive network only.

    Args:
        positive: Predictor of the network that generates.
        negative: Predictor of the negative network.
        mask_token_ids: Id of the mask token of the positive and of the negative network.
        scales: Guidance scale of each call, >= 0.

    Source: Karras et al., arXiv:2406.02507, equation 3, whose weight w is 1 + scale.
    """

    def __init__(
        self,
        positive: Predictor,
        negative: Predictor,
        *,
        mask_token_ids: tuple[int, int],
        scales: Sequence[float],
    ) -> None:
        self.positive = positive
        self.negative = negative
        self.mask_token_ids = mask_token_ids
        self._scales = iter(scales)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        scale = next(self._scales)
        logits = self.positive(tokens, positions)  # (B, M, K)
        if scale == 0:
            return logits
        # The mask tokens have different ids if only one network has a null class.
        own, other = self.mask_token_ids
        tokens = tokens if own == other else tokens.masked_fill(tokens == own, other)
        return apply_guidance(logits, self.negative(tokens, positions), scale)

"""A canvas of tokens, larger than what the transformer sees, that is filled window by window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.editing import Window

__all__ = ["Canvas"]


@dataclass
class Canvas:
    """The state of a canvas while it is filled.

    Attributes:
        tokens: (B, R, C) int64, 0 where unknown.
        unknown: (R, C) bool, on the CPU.
        confidence: (B, R, C) float32, see ``DecodingStep``.
    """

    tokens: Tensor
    unknown: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, tokens: Tensor, unknown: Tensor, *, count: int, device: torch.device) -> Canvas:
        """Returns ``count`` equal canvases of tokens (R, C) int64, any value where ``unknown`` (R, C) bool."""
        known = tokens.masked_fill(unknown, 0).to(device)
        every = known.expand(count, *known.shape).clone()
        return cls(every, unknown.clone(), torch.ones(every.shape, device=device))

    def window(self, window: Window, *, mask_token_id: int) -> Tensor:
        """Returns what the transformer sees: (B, h w) int64, ``mask_token_id`` where unknown."""
        hidden = window.unknown.to(self.tokens.device)
        return self.tokens[window.index].masked_fill(hidden, mask_token_id).flatten(1)

    def step(self, window: Window, step: DecodingStep) -> DecodingStep:
        """Returns a step of a window as one of the whole canvas; tokens of later windows are masked."""

        def place(values: Tensor, background: Tensor) -> Tensor:
            whole = background.clone()
            whole[window.index] = window.square(values)
            return whole.flatten(1)

        waiting = self.unknown.to(self.tokens.device).expand(self.tokens.shape)
        return DecodingStep(
            step.step,
            place(step.tokens, self.tokens),
            place(step.was_masked, waiting),
            place(step.still_masked, waiting),
            place(step.scores, torch.full_like(self.confidence, torch.inf)),
            place(step.confidence, self.confidence),
        )

    def keep(self, window: Window, last: DecodingStep) -> None:
        """Takes the tokens of a window's last step."""
        self.tokens[window.index] = window.square(last.tokens)
        hidden = window.unknown.to(self.tokens.device)
        kept = self.confidence[window.index]
        self.confidence[window.index] = window.square(last.confidence).where(hidden, kept)
        self.unknown[window.index[1:]] = False

"""A canvas of tokens that is larger than the grid of the transformer and is filled window by window.

Used by ``Editor.outpaint`` and ``Editor.panorama``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pipeline.editing_canvas import Window

__all__ = ["Canvas"]


@dataclass
class Canvas:
    """The state of a canvas while it is filled.

    Attributes:
        tokens: (B, R, C) int64 codes, 0 where unknown.
        unknown: (R, C) bool on the CPU, True where no window has decided yet.
        confidence: (B, R, C) float32. See ``DecodingStep``.
    """

    tokens: Tensor
    unknown: Tensor
    confidence: Tensor

    @classmethod
    def of(cls, tokens: Tensor, unknown: Tensor, *, count: int, device: torch.device) -> Canvas:
        """Returns ``count`` equal canvases.

        Args:
            tokens: (R, C) int64, any value where ``unknown``.
            unknown: (R, C) bool.
            count: B, the number of canvases.
            device: Device of the tokens.
        """
        known = tokens.masked_fill(unknown, 0).to(device)
        every = known.expand(count, *known.shape).clone()
        return cls(every, unknown.clone(), torch.ones(every.shape, device=device))

    def window(self, window: Window, *, mask_token_id: int) -> Tensor:
        """Returns the input of the transformer: (B, h w) int64, ``mask_token_id`` where unknown."""
        hidden = window.unknown.to(self.tokens.device)
        return self.tokens[window.index].masked_fill(hidden, mask_token_id).flatten(1)

    def step(self, window: Window, step: DecodingStep) -> DecodingStep:
        """Returns a decoding step of a window as a step of the whole canvas. Tokens of later windows are masked."""

        def place(values: Tensor, background: Tensor) -> Tensor:
            whole = background.clone()  # (B, R, C)
            whole[window.index] = window.as_grid(values)
            return whole.flatten(1)

        waiting = self.unknown.to(self.tokens.device).expand(self.tokens.shape)
        return DecodingStep(
            step.step,
            place(step.tokens, self.tokens),
            place(step.was_masked, waiting),
            place(step.still_masked, waiting),
            place(step.scores, torch.full_like(self.confidence, torch.inf)),
            place(self._confidence(window, step).flatten(1), self.confidence),
        )

    def keep(self, window: Window, last: DecodingStep) -> None:
        """Copies the tokens of the last step of a window to the canvas."""
        self.tokens[window.index] = window.as_grid(last.tokens)
        self.confidence[window.index] = self._confidence(window, last)
        self.unknown[window.index[1:]] = False

    def _confidence(self, window: Window, step: DecodingStep) -> Tensor:
        """Returns the confidence of the tokens of a window, (B, h, w)."""
        hidden = window.unknown.to(self.tokens.device)
        # Tokens that were known before the window keep the confidence of the window that decided them.
        return window.as_grid(step.confidence).where(hidden, self.confidence[window.index])

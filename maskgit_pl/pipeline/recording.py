"""Records decoding steps while a model generates. ``pipeline.display.Recording`` shows them."""

from __future__ import annotations

from dataclasses import fields, replace

from maskgit_pl.decoding import DecodingStep

__all__ = ["StepRecorder"]


class StepRecorder:
    """A callback of ``MaskGIT.generate`` that keeps the decoding steps of the first images of the first batch.

    Args:
        max_images: Number of images whose steps are kept.

    Attributes:
        steps: Steps recorded so far.
    """

    def __init__(self, *, max_images: int = 4) -> None:
        self.max_images = max_images
        self.steps: list[DecodingStep] = []
        self._batch_size: int | None = None

    def __call__(self, step: DecodingStep) -> None:
        self._batch_size = self._batch_size or len(step.tokens)
        # Steps of later batches are ignored: the first batch is complete when no token is masked, and another batch may
        # have another size.
        is_complete = bool(self.steps) and not bool(self.steps[-1].still_masked.any())
        if is_complete or len(step.tokens) != self._batch_size:
            return
        names = [field.name for field in fields(step) if field.name != "step"]
        self.steps.append(replace(step, **{name: getattr(step, name)[: self.max_images] for name in names}))

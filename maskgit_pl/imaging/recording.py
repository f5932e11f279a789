"""Records decoding steps while a model generates, and writes them as an animation or a filmstrip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging.decoding_figures import decoding_filmstrip, decoding_frames, select_steps
from maskgit_pl.imaging.grids import save_gif, save_png

__all__ = ["StepRecorder", "save_animation", "save_filmstrip"]

Decode: TypeAlias = Callable[[Tensor], Tensor]

_FRAME, _ANIMATION, _SHORTEST = 600, 9600, 40  # milliseconds: a frame, at most all frames together, at least a frame


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


def save_animation(
    steps: Sequence[DecodingStep], decode: Decode, path: Path, *, grid: tuple[int, int], captions: Sequence[str]
) -> None:
    """Writes decoding steps as a GIF of at most about ten seconds.

    Args:
        steps: Decoding steps of a few images.
        decode: Function that decodes tokens (n, N) int64 to images (n, C, H, W) uint8.
        path: File to write.
        grid: Rows and columns of tokens (h, w).
        captions: Text above each image.
    """
    shown = select_steps(steps, "animation")
    images = [decode(step.tokens) for step in shown]
    # More frames are shown for a shorter time each, so that the animation stays under ten seconds.
    frames = decoding_frames(shown, images, grid=grid, captions=captions[: len(images[0])], num_steps=len(steps))
    save_gif(frames, path, milliseconds=max(_SHORTEST, min(_FRAME, _ANIMATION // len(frames))))


def save_filmstrip(steps: Sequence[DecodingStep], decode: Decode, path: Path, *, grid: tuple[int, int]) -> None:
    """Writes the decoding of the first image as a PNG with a column for each step. See ``save_animation``."""
    shown = select_steps(steps, "filmstrip")
    save_png(decoding_filmstrip(shown, [decode(step.tokens[:1]) for step in shown], grid=grid), path)

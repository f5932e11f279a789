"""Records decoding steps while a model generates, and draws them as frames of an animation or as a filmstrip.

``pipeline.display.Recording`` shows what ``StepRecorder`` recorded; the web page draws single panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from typing import Literal

from PIL import Image, ImageDraw
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pipeline.grids import (
    MASKED,
    NEW,
    PANEL_SIZE,
    PAPER,
    REMASKED,
    REQUESTED,
    add_legend,
    add_title,
    draw_color_bar,
    draw_outline,
    enlarge,
    lay_out,
    panel_scale,
    swatch,
    viridis,
)

__all__ = [
    "StepRecorder",
    "confidence_panel",
    "decoding_filmstrip",
    "decoding_frames",
    "number_windows",
    "select_steps",
    "token_panel",
    "undrawn_tokens",
]

_MAX_COLUMNS = 12  # number of steps in a filmstrip
_MAX_FRAMES = 64  # number of steps in an animation
_WIDE = 2  # width / height from which a filmstrip has a row for each step


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


def select_steps(count: int, kind: Literal["animation", "filmstrip"]) -> list[int]:
    """Returns the steps of range(count) that a picture shows, evenly spread with the first and the last."""
    most = _MAX_FRAMES if kind == "animation" else _MAX_COLUMNS
    if count <= most:
        return list(range(count))
    # Rounding keeps 0 and count - 1 exactly.
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def number_windows(steps: Sequence[DecodingStep]) -> list[int]:
    """Returns the number of the window of each step, from 1; a window of a canvas begins where step numbers restart."""
    restarts = [False, *(after.step <= before.step for before, after in pairwise(steps))]
    return [1 + count for count in accumulate(restarts[: len(steps)])]


def decoding_frames(
    steps: Sequence[DecodingStep],
    images: Sequence[Tensor],
    *,
    token_size: int,
    num_steps: int,
    windows: Sequence[int],
    title: str,
    captions: Sequence[str] = (),
    requested: Tensor | None = None,
) -> list[Image.Image]:
    """Draws a frame for each decoding step: above, the decided tokens; below, the image of all tokens of the step.

    In the upper row, masked tokens are grey, tokens kept at this step have an orange frame, tokens masked again have a
    blue frame, and decided tokens show their part of the image. A legend says so.

    Args:
        steps: Decoding steps of n images, all or some of them.
        images: Decoded tokens of each step, (n, C, H, W) uint8.
        token_size: Height and width of a token in pixels.
        num_steps: Number of decoding steps T.
        windows: Number of the window of each step. See ``number_windows``.
        title: Head line of all frames.
        captions: Text above each image; empty for none.
        requested: (H, W) bool, the pixels that the user of an edit named; None for no edit.

    Source: paper, Figure 2.
    """
    legend = _legend(steps, requested)
    frames = []
    for step, decoded, window in zip(steps, images, windows, strict=True):
        above = [token_panel(step, row, decoded[row], token_size, requested=requested) for row in range(len(decoded))]
        below = [enlarge(image, panel_scale(decoded, PANEL_SIZE)) for image in decoded]
        frame = lay_out([*above, *below], rows=2, columns=len(decoded), column_captions=captions)
        where = f"window {window}, " if windows[-1] > 1 else ""
        frame = add_title(frame, f"{where}{_describe(step, num_steps)}")
        frames.append(add_title(add_legend(frame, legend), title))
    return frames


def decoding_filmstrip(
    steps: Sequence[DecodingStep],
    images: Sequence[Tensor],
    *,
    token_size: int,
    windows: Sequence[int],
    title: str,
    row: int = 0,
    requested: Tensor | None = None,
) -> Image.Image:
    """Draws the decoding of one image, with a column for each step; for a wide image, with a row for each step.

    The four pictures of a step show, from above or from the left:

    1. The mask before the step, in grey.
    2. Confidence, the probability of each code when it was last drawn, from dark (0) to bright (the highest value). The
       legend has the color bar with its numbers.
    3. Newly kept tokens in an orange frame, and tokens masked again in a blue frame.
    4. The image of all tokens of the step.

    Args:
        steps: Decoding steps of n images, all or some of them, with the first.
        images: Decoded tokens of each step, (n, C, H, W) uint8.
        token_size: Height and width of a token in pixels.
        windows: Number of the window of each step. See ``number_windows``.
        title: Head line.
        row: Index of the image in [0, n).
        requested: (H, W) bool, the pixels that the user of an edit named; None for no edit.
    """
    chosen = [(step, decoded[row]) for step, decoded in zip(steps, images, strict=True)]
    scale = panel_scale(images[0], PANEL_SIZE)
    undrawn = [undrawn_tokens(step, steps[0]) for step in steps]
    # The highest confidence that was drawn is the brightest color. 1e-9 avoids a division by zero.
    drawn = [step.confidence * (step.was_masked & ~hidden) for step, hidden in zip(steps, undrawn, strict=True)]
    top = max(1e-9, *(float(values[row].max()) for values in drawn))
    kinds = {
        "mask": [
            _cells_panel(image, token_size, filled=step.was_masked[row], requested=requested) for step, image in chosen
        ],
        "confidence": [
            confidence_panel(step.confidence[row] / top, image, token_size, undrawn=hidden[row])
            for (step, image), hidden in zip(chosen, undrawn, strict=True)
        ],
        "newly kept": [token_panel(step, row, image, token_size, requested=requested) for step, image in chosen],
        "image": [enlarge(image, scale) for _, image in chosen],
    }
    texts = [f"step {step.step + 1}: {int(step.still_masked[row].sum())} masked" for step, _ in chosen]
    if windows[-1] > 1:
        texts = [f"window {window}, step {step.step + 1}" for window, step in zip(windows, steps, strict=True)]
    height, width = images[0].shape[-2:]
    if width >= _WIDE * height:
        tiles = [tile for step in zip(*kinds.values(), strict=True) for tile in step]
        page = lay_out(tiles, rows=len(chosen), columns=len(kinds), row_captions=texts, column_captions=list(kinds))
    else:
        tiles = [tile for panels in kinds.values() for tile in panels]
        page = lay_out(tiles, rows=len(kinds), columns=len(chosen), row_captions=list(kinds), column_captions=texts)
    legend = [*_legend(steps, requested), (draw_color_bar(top), "confidence")]
    if any(bool(hidden[row].any()) for hidden in undrawn):
        legend.append((swatch(frame=MASKED), "no confidence: given, or not drawn yet"))
    return add_title(add_legend(page, legend), title)


def token_panel(
    step: DecodingStep,
    row: int,
    image: Tensor,
    token_size: int,
    *,
    size: int = PANEL_SIZE,
    requested: Tensor | None = None,
) -> Image.Image:
    """Draws an image with masked tokens in grey, and tokens just kept or masked again in a frame.

    Args:
        step: Decoding step of n images.
        row: Index of the image in [0, n).
        image: Decoded tokens of the step, (C, H, W) uint8.
        token_size: Height and width of a token in pixels.
        size: Smallest length of the longer edge of the picture in pixels, and twice that of the shorter edge.
        requested: (H, W) bool, the pixels that the user of an edit named, which get an outline; None for no edit.
    """
    was, still = step.was_masked[row], step.still_masked[row]
    framed = {NEW: was & ~still, REMASKED: still & ~was}
    return _cells_panel(image, token_size, filled=still, framed=framed, size=size, requested=requested)


def confidence_panel(
    values: Tensor, image: Tensor, token_size: int, *, undrawn: Tensor, size: int = PANEL_SIZE
) -> Image.Image:
    """Draws values of the tokens as colors of viridis, from dark (0) to bright (1), as large as the image.

    Args:
        values: (N,) float; those above 1 are as bright as 1.
        image: (C, H, W) uint8, which gives the size.
        token_size: Height and width of a token in pixels.
        undrawn: (N,) bool, the tokens that are white. See ``undrawn_tokens``.
        size: See ``token_panel``.
    """
    scale, colors = panel_scale(image, size), viridis(values.tolist())
    panel = Image.new("RGB", (image.shape[-1] * scale, image.shape[-2] * scale), PAPER)
    draw = ImageDraw.Draw(panel)
    for box, color, is_undrawn in zip(
        _boxes(image.shape[-2:], token_size, scale), colors, undrawn.tolist(), strict=True
    ):
        draw.rectangle(box, PAPER if is_undrawn else color, MASKED if is_undrawn else None)
    return panel


def undrawn_tokens(step: DecodingStep, first: DecodingStep) -> Tensor:
    """Returns the tokens without a confidence, (n, N) bool: given ones, and those of windows that are still to come.

    Args:
        step: A step of n images.
        first: The first step of the same images.
    """
    return (step.confidence >= 1) & (step.still_masked | ~first.was_masked)


def _describe(step: DecodingStep, num_steps: int) -> str:
    counts = sorted(set(step.still_masked.sum(1).tolist()))
    masked = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"step {step.step + 1}/{num_steps}, {masked} of {step.tokens.shape[1]} masked"


def _legend(steps: Sequence[DecodingStep], requested: Tensor | None) -> list[tuple[Image.Image, str]]:
    """Returns the entries of the legend; what does not occur in the steps has none."""
    entries = [(swatch(fill=MASKED), "masked tokens"), (swatch(frame=NEW), "newly kept")]
    if any(bool((step.still_masked & ~step.was_masked).any()) for step in steps):
        entries.append((swatch(frame=REMASKED), "masked again"))
    return entries if requested is None else [*entries, (swatch(frame=REQUESTED), "requested pixels")]


def _cells_panel(
    image: Tensor,
    token_size: int,
    *,
    filled: Tensor,
    framed: Mapping[tuple[int, int, int], Tensor] | None = None,
    size: int = PANEL_SIZE,
    requested: Tensor | None = None,
) -> Image.Image:
    """Draws an image (C, H, W) uint8 with tokens filled in grey or framed in a color, each given as (N,) bool."""
    scale = panel_scale(image, size)
    panel, boxes = enlarge(image, scale), _boxes(image.shape[-2:], token_size, scale)
    draw = ImageDraw.Draw(panel)
    for box, masked in zip(boxes, filled.tolist(), strict=True):
        if masked:
            draw.rectangle(box, fill=MASKED, outline=PAPER)
    # Frames are drawn last, so that no fill covers them.
    for color, tokens in (framed or {}).items():
        for box, wanted in zip(boxes, tokens.tolist(), strict=True):
            if wanted:
                draw.rectangle(box, outline=color, width=2)
    return panel if requested is None else draw_outline(panel, requested, REQUESTED)


def _boxes(size: Sequence[int], token_size: int, scale: int) -> list[tuple[int, int, int, int]]:
    """Returns (left, top, right, bottom), all inclusive, of each token in an image (H, W) enlarged by ``scale``.

    The tokens are in raster order. Those in the last row and column may reach beyond the image.
    """
    (rows, columns), side = (math.ceil(pixels / token_size) for pixels in size), token_size * scale
    return [
        (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
        for row in range(rows)
        for column in range(columns)
    ]

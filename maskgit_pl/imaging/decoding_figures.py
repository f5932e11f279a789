"""Draws decoding step by step, as the frames of an animation or as a filmstrip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from PIL import Image, ImageDraw
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging.layout import MASKED, NEW, PANEL_SIZE, PAPER, REMASKED, add_title, enlarge, lay_out, scale_to

__all__ = ["confidence_panel", "decoding_filmstrip", "decoding_frames", "select_steps", "token_panel"]

_MAX_COLUMNS = 12  # number of steps in a filmstrip
_MAX_FRAMES = 64  # number of steps in an animation


def select_steps(steps: Sequence[DecodingStep], kind: Literal["animation", "filmstrip"]) -> list[DecodingStep]:
    """Returns the steps that a picture shows, evenly spread with the first and the last. Only these must be decoded."""
    most = _MAX_FRAMES if kind == "animation" else _MAX_COLUMNS
    return [steps[number] for number in _spread(len(steps), most)]


def decoding_frames(
    steps: Sequence[DecodingStep],
    images: Sequence[Tensor],
    *,
    grid: tuple[int, int],
    captions: Sequence[str] = (),
    num_steps: int | None = None,
) -> list[Image.Image]:
    """Draws a frame for each decoding step: above, the decided tokens; below, the image of all tokens of the step.

    In the upper row, masked tokens are grey, tokens kept at this step have an orange frame, tokens masked again have a
    blue frame, and decided tokens show their part of the image.

    Args:
        steps: Decoding steps of n images.
        images: Decoded tokens of each step, (n, C, H, W) uint8.
        grid: Rows and columns of tokens (h, w).
        captions: Text above each image; empty for none.
        num_steps: Number of decoding steps T, if ``steps`` are only some of them; None if they are all.

    Source: paper, Figure 2.
    """
    frames = []
    for step, decoded in zip(steps, images, strict=True):
        above = [token_panel(step, row, decoded[row], grid) for row in range(len(decoded))]
        below = [enlarge(image, scale_to(decoded, PANEL_SIZE)) for image in decoded]
        frame = lay_out([*above, *below], rows=2, columns=len(decoded), column_captions=captions)
        frames.append(add_title(frame, _describe(step, num_steps or len(steps))))
    return frames


def decoding_filmstrip(
    steps: Sequence[DecodingStep], images: Sequence[Tensor], *, grid: tuple[int, int], row: int = 0
) -> Image.Image:
    """Draws the decoding of one image, with a column for each step.

    The four rows show, from above:

    1. The mask before the step, in grey.
    2. Confidence, the probability of each code when it was last drawn, from dark (0) to bright (the highest value,
       which the caption of the row names).
    3. Newly kept tokens in an orange frame, and tokens masked again in a blue frame.
    4. The image of all tokens of the step.

    At most 12 steps are shown, evenly spread with the first and the last.

    Args:
        steps: Decoding steps of n images.
        images: Decoded tokens of each step, (n, C, H, W) uint8.
        grid: Rows and columns of tokens (h, w).
        row: Index of the image in [0, n).
    """
    shown = _spread(len(steps), _MAX_COLUMNS)
    chosen = [(steps[number], images[number][row]) for number in shown]
    scale = scale_to(images[0], PANEL_SIZE)
    # The highest confidence that was drawn is the brightest colour. 1e-9 avoids a division by zero.
    top = max(1e-9, *(float((step.confidence * step.was_masked)[row].max()) for step, _ in chosen))
    rows = [
        [_cells_panel(image, grid, filled=step.was_masked[row]) for step, image in chosen],
        [confidence_panel(step.confidence[row] / top, image, grid) for step, image in chosen],
        [token_panel(step, row, image, grid) for step, image in chosen],
        [enlarge(image, scale) for _, image in chosen],
    ]
    captions = [f"step {step.step + 1}: {int(step.still_masked[row].sum())} masked" for step, _ in chosen]
    return lay_out(
        [panel for panels in rows for panel in panels],
        rows=4,
        columns=len(chosen),
        row_captions=["mask", f"confidence 0 to {top:.2f}", "newly kept", "image"],
        column_captions=captions,
    )


def token_panel(
    step: DecodingStep, row: int, image: Tensor, grid: tuple[int, int], *, size: int = PANEL_SIZE
) -> Image.Image:
    """Draws an image with masked tokens in grey, and tokens just kept or masked again in a frame.

    Args:
        step: Decoding step of n images.
        row: Index of the image in [0, n).
        image: Decoded tokens of the step, (C, H, W) uint8.
        grid: Rows and columns of tokens (h, w).
        size: Smallest length of the longer edge of the picture in pixels.
    """
    was, still = step.was_masked[row], step.still_masked[row]
    framed = {NEW: was & ~still, REMASKED: still & ~was}
    return _cells_panel(image, grid, filled=still, framed=framed, size=size)


def confidence_panel(values: Tensor, image: Tensor, grid: tuple[int, int], *, size: int = PANEL_SIZE) -> Image.Image:
    """Draws values of the tokens as colours of viridis, from dark (0) to bright (1), as large as the image.

    Args:
        values: (N,) float in [0, 1].
        image: (C, H, W) uint8, which gives the size.
        grid: Rows and columns of tokens (h, w).
        size: See ``token_panel``.
    """
    from matplotlib import colormaps

    scale = scale_to(image, size)
    colours = (colormaps["viridis"](values.cpu().numpy())[:, :3] * 255).round().astype(int).tolist()
    panel = Image.new("RGB", (image.shape[-1] * scale, image.shape[-2] * scale), PAPER)
    draw = ImageDraw.Draw(panel)
    for box, colour in zip(_boxes(image.shape[-2:], grid, scale), colours, strict=True):
        draw.rectangle(box, fill=tuple(colour))
    return panel


def _describe(step: DecodingStep, num_steps: int) -> str:
    counts = sorted(set(step.still_masked.sum(1).tolist()))
    masked = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"step {step.step + 1}/{num_steps}, {masked} of {step.tokens.shape[1]} masked"


def _spread(count: int, most: int) -> list[int]:
    """Returns at most ``most`` numbers of range(count), evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    # Rounding keeps 0 and count - 1 exactly.
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _cells_panel(
    image: Tensor,
    grid: tuple[int, int],
    *,
    filled: Tensor,
    framed: Mapping[tuple[int, int, int], Tensor] | None = None,
    size: int = PANEL_SIZE,
) -> Image.Image:
    """Draws an image (C, H, W) uint8 with tokens filled in grey or framed in a colour, each given as (N,) bool."""
    scale = scale_to(image, size)
    panel, boxes = enlarge(image, scale), _boxes(image.shape[-2:], grid, scale)
    draw = ImageDraw.Draw(panel)
    for box, masked in zip(boxes, filled.tolist(), strict=True):
        if masked:
            draw.rectangle(box, fill=MASKED, outline=PAPER)
    # Frames are drawn last, so that no fill covers them.
    for colour, tokens in (framed or {}).items():
        for box, wanted in zip(boxes, tokens.tolist(), strict=True):
            if wanted:
                draw.rectangle(box, outline=colour, width=2)
    return panel


def _boxes(size: Sequence[int], grid: tuple[int, int], scale: int) -> list[tuple[int, int, int, int]]:
    """Returns (left, top, right, bottom), all inclusive, of each token in an image (H, W) enlarged by ``scale``.

    The tokens are in raster order. Those in the last row and column may reach beyond the image.
    """
    height, width = (math.ceil(pixels / cells) * scale for pixels, cells in zip(size, grid, strict=True))
    return [
        (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        for row in range(grid[0])
        for column in range(grid[1])
    ]

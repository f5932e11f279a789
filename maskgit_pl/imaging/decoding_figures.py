"""Decoding shown step by step, as an animation or as a filmstrip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from PIL import Image, ImageDraw
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.imaging.layout import MASKED, NEW, PANEL_SIZE, PAPER, REMASKED, add_title, enlarge, lay_out, scale_to

__all__ = ["decoding_filmstrip", "decoding_frames", "select_steps"]

_MAX_COLUMNS = 12  # of a filmstrip
_MAX_FRAMES = 64  # of an animation


def select_steps(steps: Sequence[DecodingStep], kind: Literal["animation", "filmstrip"]) -> list[DecodingStep]:
    """Returns the steps that a picture shows, the first and the last among them; no others need be decoded."""
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
    """Draws one picture a decoding step: above, what is decided; below, the image of all tokens that the step drew.

    Above, masked tokens are grey, tokens kept at this step have an orange frame and tokens masked again a blue one, and
    decided ones are their part of the image.

    Args:
        steps: The steps of a run over a few images.
        images: For each step, its tokens decoded: (n, C, H, W) uint8.
        grid: Rows and columns of tokens.
        captions: Text above the images; empty for none.
        num_steps: T, if the steps are some of them; None if they are all.

    Source: paper, Figure 2.
    """
    frames = []
    for step, decoded in zip(steps, images, strict=True):
        above = [_token_panel(step, row, decoded[row], grid) for row in range(len(decoded))]
        below = [enlarge(image, scale_to(decoded, PANEL_SIZE)) for image in decoded]
        frame = lay_out([*above, *below], rows=2, columns=len(decoded), column_captions=captions)
        frames.append(add_title(frame, _describe(step, num_steps or len(steps))))
    return frames


def decoding_filmstrip(
    steps: Sequence[DecodingStep], images: Sequence[Tensor], *, grid: tuple[int, int], row: int = 0
) -> Image.Image:
    """Draws the decoding of one image, a column a step: mask, confidence, what is newly kept, the image.

    The mask before the step is grey. Confidence is the probability of each code when it was last drawn, from dark (0)
    to bright (the highest that was drawn, which stands beside the row). Newly kept tokens have an orange frame, tokens
    masked again a blue one. The image is that of all tokens that the step drew. Of many steps at most 12 are shown, the
    first and the last among them.

    Args:
        steps: The steps of a run.
        images: For each step, its tokens decoded: (n, C, H, W) uint8.
        grid: Rows and columns of tokens.
        row: Number of the image in the run.
    """
    shown = _spread(len(steps), _MAX_COLUMNS)
    chosen = [(steps[number], images[number][row]) for number in shown]
    scale = scale_to(images[0], PANEL_SIZE)
    top = max(1e-9, *(float((step.confidence * step.was_masked)[row].max()) for step, _ in chosen))
    rows = [
        [_cells_panel(image, grid, filled=step.was_masked[row]) for step, image in chosen],
        [_heat_panel(step.confidence[row] / top, image, grid) for step, image in chosen],
        [_token_panel(step, row, image, grid) for step, image in chosen],
        [enlarge(image, scale) for _, image in chosen],
    ]
    captions = [f"step {step.step + 1}: {int(step.still_masked[row].sum())} masked" for step, _ in chosen]
    return lay_out(
        [panel for panels in rows for panel in panels],
        rows=4,
        columns=len(chosen),
        row_captions=["mask", f"confidence to {top:.2f}", "newly kept", "image"],
        column_captions=captions,
    )


def _describe(step: DecodingStep, num_steps: int) -> str:
    counts = sorted(set(step.still_masked.sum(1).tolist()))
    masked = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"step {step.step + 1}/{num_steps}, {masked} of {step.tokens.shape[1]} masked"


def _spread(count: int, most: int) -> list[int]:
    """Returns at most ``most`` of range(count), evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _token_panel(step: DecodingStep, row: int, image: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Draws an image (C, H, W) uint8 with masked tokens grey, and frames around tokens just kept or masked again."""
    was, still = step.was_masked[row], step.still_masked[row]
    return _cells_panel(image, grid, filled=still, framed={NEW: was & ~still, REMASKED: still & ~was})


def _cells_panel(
    image: Tensor,
    grid: tuple[int, int],
    *,
    filled: Tensor,
    framed: Mapping[tuple[int, int, int], Tensor] | None = None,
) -> Image.Image:
    """Draws an image (C, H, W) uint8 with tokens filled grey or framed in a colour; (N,) bool each."""
    scale = scale_to(image, PANEL_SIZE)
    panel, boxes = enlarge(image, scale), _boxes(image.shape[-2:], grid, scale)
    draw = ImageDraw.Draw(panel)
    for box, masked in zip(boxes, filled.tolist(), strict=True):
        if masked:
            draw.rectangle(box, fill=MASKED, outline=PAPER)
    for colour, tokens in (framed or {}).items():
        for box, wanted in zip(boxes, tokens.tolist(), strict=True):
            if wanted:
                draw.rectangle(box, outline=colour, width=2)
    return panel


def _heat_panel(values: Tensor, image: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Draws values (N,) float of the tokens as colours, from dark (0) to bright (1); as large as the image's panel."""
    from matplotlib import colormaps

    scale = scale_to(image, PANEL_SIZE)
    colours = (colormaps["viridis"](values.cpu().numpy())[:, :3] * 255).round().astype(int).tolist()
    panel = Image.new("RGB", (image.shape[-1] * scale, image.shape[-2] * scale), PAPER)
    draw = ImageDraw.Draw(panel)
    for box, colour in zip(_boxes(image.shape[-2:], grid, scale), colours, strict=True):
        draw.rectangle(box, fill=tuple(colour))
    return panel


def _boxes(size: Sequence[int], grid: tuple[int, int], scale: int) -> list[tuple[int, int, int, int]]:
    """Returns (left, top, right, bottom), all included, of the tokens of an image (H, W) enlarged ``scale`` times.

    In raster order. Tokens at the right and below may go beyond the image.
    """
    height, width = (math.ceil(pixels / cells) * scale for pixels, cells in zip(size, grid, strict=True))
    return [
        (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        for row in range(grid[0])
        for column in range(grid[1])
    ]

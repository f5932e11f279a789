"""Pictures of a decoding: its steps are recorded, and shown as an animation or as a filmstrip, in notebooks too.

``MaskGIT.record`` returns a ``Recording``. The web page draws its panels one by one.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.grids import (
    MASKED,
    NEW,
    PAPER,
    REMASKED,
    REQUESTED,
    add_legend,
    add_title,
    draw_color_bar,
    draw_outline,
    enlarge,
    image_grid,
    lay_out,
    panel_scale,
    save_gif,
    save_png,
    swatch,
    to_pil,
    viridis,
)
from maskgit_pl.registry import describe
from maskgit_pl.text import count_text, printable

if TYPE_CHECKING:
    from maskgit_pl.pretrained.networks import PretrainedTokenizer

_COLUMNS, _MOST_IMAGES = 8, 64  # of a contact sheet
_MAX_COLUMNS, _MAX_FRAMES = 12, 64  # number of steps in a filmstrip and in an animation
_WIDE = 2  # width / height from which a filmstrip has a row for each step
_FRAME, _ANIMATION, _SHORTEST = 600, 9600, 40  # milliseconds: a frame, at most all frames together, at least a frame


class ImageList(list[Image.Image]):
    """A list of images of the same size, which a notebook shows as a contact sheet of the first 64."""

    def _repr_png_(self) -> bytes | None:
        if not self or len({(image.size, image.mode) for image in self}) > 1:  # the user changed it
            return None
        pixels = [np.atleast_3d(np.asarray(image)) for image in self[:_MOST_IMAGES]]
        images = rearrange(torch.from_numpy(np.stack(pixels)), "n h w c -> n c h w")
        file = BytesIO()
        image_grid(images, columns=min(_COLUMNS, len(images))).save(file, format="PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Recording:
    """The decoding of a few images, step by step. A notebook shows it as an animation.

    Args:
        steps: Decoding steps of the images, at least one.
        tokenizer: Decodes the tokens of a step.
        decoding: Decoding settings, which the head line names.
        captions: Name of the class of each image.
        seeds: Seed of each image.
        grid: Rows and columns of the tokens of a canvas; None for those of the model's images.
        requested: (H, W) bool, the pixels that the user of an edit named; None for no edit.
    """

    steps: Sequence[DecodingStep]
    tokenizer: PretrainedTokenizer
    decoding: DecodingConfig
    captions: Sequence[str]
    seeds: Sequence[int]
    grid: tuple[int, int] | None = None
    requested: Tensor | None = None
    _decoded: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def images(self) -> ImageList:
        """The images of the last step, those of ``MaskGIT.generate``."""
        return ImageList(to_pil(image) for image in self.images_at(len(self.steps) - 1))

    def images_at(self, number: int) -> Tensor:
        """Returns the images of all tokens of a step in [0, number of steps), (n, C, H, W) uint8."""
        if number not in self._decoded:  # an animation and a filmstrip decode each step once
            self._decoded[number] = self.tokenizer.decode(self.steps[number].tokens, grid=self.grid)
        return self._decoded[number]

    def save(self, path: Path | str) -> None:
        """Writes an animation of all images (``.gif``), or a filmstrip of the first one (``.png``).

        An animation has at most 64 steps and ten seconds, a filmstrip at most 12 steps.
        """
        path = Path(path)
        if path.suffix.lower() == ".gif":
            frames = self.frames()
            # More frames are shown for a shorter time each, so that the animation stays under ten seconds.
            save_gif(frames, path, milliseconds=max(_SHORTEST, min(_FRAME, _ANIMATION // len(frames))))
        elif path.suffix.lower() == ".png":
            save_png(self.filmstrip(), path)
        else:
            raise ValueError(f"path must end with .gif (animation) or .png (filmstrip), got {str(path)!r}")

    def frames(self) -> list[Image.Image]:
        """Draws a frame for each of at most 64 steps: above, the decided tokens; below, the image of all tokens.

        In the upper row, masked tokens are grey, tokens kept at this step have an orange frame, tokens masked
        again have a blue frame, and decided tokens show their part of the image. A legend says so.

        Source: paper, Figure 2.
        """
        size, windows = self.tokenizer.token_size, _number_windows(self.steps)
        numbers = select_steps(len(self.steps), _MAX_FRAMES)
        legend = self._legend([self.steps[number] for number in numbers])
        captions = [f"{name}, seed {seed}" for name, seed in zip(self.captions, self.seeds, strict=True)]
        frames = []
        for number in numbers:
            step, images = self.steps[number], self.images_at(number)
            above = [token_panel(step, row, image, size, requested=self.requested) for row, image in enumerate(images)]
            below = [enlarge(image, panel_scale(images)) for image in images]
            frame = lay_out([*above, *below], columns=len(images), column_captions=captions)
            counts = sorted(set(step.still_masked.sum(1).tolist()))
            masked = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            where = f"window {windows[number]}, " if windows[-1] > 1 else ""
            text = f"step {step.step + 1}/{self.decoding.num_steps}, {masked} of {step.tokens.shape[1]} masked"
            frame = add_title(frame, f"{where}{text}")
            frames.append(add_title(add_legend(frame, legend), describe_settings(self.decoding)))
        return frames

    def filmstrip(self, title: str | None = None) -> Image.Image:
        """Draws at most 12 steps of the first image, one in each column; of a wide image, one in each row.

        The four pictures of a step show, from above or from the left:

        1. The mask before the step, in grey.
        2. Confidence, the probability of each code when it was last drawn, from dark (0) to bright (the
           highest value). The legend has the color bar with its numbers.
        3. Newly kept tokens in an orange frame, and tokens masked again in a blue frame.
        4. The image of all tokens of the step.

        Args:
            title: Head line; None for the class, the seed and the settings.
        """
        size, requested = self.tokenizer.token_size, self.requested
        numbers, windows = select_steps(len(self.steps), _MAX_COLUMNS), _number_windows(self.steps)
        steps, images = [self.steps[number] for number in numbers], [self.images_at(number)[0] for number in numbers]
        # Tokens without a confidence: given ones, and those of windows that are still to come.
        given = ~steps[0].was_masked[0]
        undrawn = [(step.confidence[0] >= 1) & (step.still_masked[0] | given) for step in steps]
        # The highest confidence that was drawn is the brightest color. 1e-9 avoids a division by zero.
        drawn = [step.was_masked[0] & ~hidden for step, hidden in zip(steps, undrawn, strict=True)]
        top = max(
            1e-9, *(float((step.confidence[0] * tokens).max()) for step, tokens in zip(steps, drawn, strict=True))
        )
        panels: dict[str, list[Image.Image]] = {"mask": [], "confidence": [], "newly kept": [], "image": []}
        for step, image, hidden in zip(steps, images, undrawn, strict=True):
            panels["mask"].append(_cells_panel(image, size, filled=step.was_masked[0], requested=requested))
            panels["confidence"].append(_confidence_panel(step.confidence[0] / top, image, size, undrawn=hidden))
            panels["newly kept"].append(token_panel(step, 0, image, size, requested=requested))
            panels["image"].append(enlarge(image, panel_scale(image)))
        texts = [f"step {step.step + 1}: {int(step.still_masked[0].sum())} masked" for step in steps]
        if windows[-1] > 1:
            texts = [f"window {windows[number]}, step {self.steps[number].step + 1}" for number in numbers]
        height, width = images[0].shape[-2:]
        if width >= _WIDE * height:
            tiles = [tile for step in zip(*panels.values(), strict=True) for tile in step]
            page = lay_out(tiles, columns=4, row_captions=texts, column_captions=list(panels))
        else:
            tiles = [tile for kind in panels.values() for tile in kind]
            page = lay_out(tiles, columns=len(steps), row_captions=list(panels), column_captions=texts)
        legend = [*self._legend(steps), (draw_color_bar(top), "confidence")]
        if any(bool(hidden.any()) for hidden in undrawn):
            legend.append((swatch(frame=MASKED), "no confidence: given, or not drawn yet"))
        own_title = f"{self.captions[0]}, seed {self.seeds[0]}: {describe_settings(self.decoding)}"
        return add_title(add_legend(page, legend), own_title if title is None else title)

    def _legend(self, steps: Sequence[DecodingStep]) -> list[tuple[Image.Image, str]]:
        """Returns the entries of the legend; what does not occur in the steps has none."""
        entries = [(swatch(fill=MASKED), "masked tokens"), (swatch(frame=NEW), "newly kept")]
        if any(bool((step.still_masked & ~step.was_masked).any()) for step in steps):
            entries.append((swatch(frame=REMASKED), "masked again"))
        return entries if self.requested is None else [*entries, (swatch(frame=REQUESTED), "requested pixels")]

    def __repr__(self) -> str:
        return f"Recording({len(self.steps)} steps of {', '.join(map(printable, self.captions))})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "decoding.gif"
            self.save(file)
            return {"text/plain": repr(self), "image/gif": b64encode(file.read_bytes()).decode()}


def describe_settings(decoding: DecodingConfig) -> str:
    """Returns the number of steps and the token selector with its arguments, for head lines of pictures."""
    steps = count_text(decoding.num_steps, "step")
    if decoding.token_selector is None:
        return f"{steps}, one token each, in raster order"
    return f"{steps}, token selector {describe(decoding.token_selector)}"


def select_steps(count: int, most: int) -> list[int]:
    """Returns at most ``most`` steps of range(count), evenly spread with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _number_windows(steps: Sequence[DecodingStep]) -> list[int]:
    """Returns the number of the window of each step, from 1; a window of a canvas begins where step numbers restart."""
    restarts = [False, *(after.step <= before.step for before, after in pairwise(steps))]
    return list(accumulate(restarts, initial=1))[1:]


def token_panel(
    step: DecodingStep,
    row: int,
    image: Tensor,
    token_size: int,
    *,
    requested: Tensor | None = None,
) -> Image.Image:
    """Draws an image with masked tokens in grey, and tokens just kept or masked again in a frame.

    Args:
        step: Decoding step of n images.
        row: Index of the image in [0, n).
        image: Decoded tokens of the step, (C, H, W) uint8.
        token_size: Height and width of a token in pixels.
        requested: (H, W) bool, the pixels that the user of an edit named, which get an outline; None for no edit.
    """
    was, still = step.was_masked[row], step.still_masked[row]
    framed = {NEW: was & ~still, REMASKED: still & ~was}
    return _cells_panel(image, token_size, filled=still, framed=framed, requested=requested)


def _confidence_panel(values: Tensor, image: Tensor, token_size: int, *, undrawn: Tensor) -> Image.Image:
    """Draws values of the tokens as colors of viridis, from dark (0) to bright (1), as large as the image.

    Args:
        values: (N,) float; those above 1 are as bright as 1.
        image: (C, H, W) uint8, which gives the size.
        token_size: Height and width of a token in pixels.
        undrawn: (N,) bool, the tokens that are white.
    """
    scale, colors = panel_scale(image), viridis(values.tolist())
    panel = Image.new("RGB", (image.shape[-1] * scale, image.shape[-2] * scale), PAPER)
    draw, boxes = ImageDraw.Draw(panel), _boxes(image.shape[-2:], token_size, scale)
    for box, color, is_undrawn in zip(boxes, colors, undrawn.tolist(), strict=True):
        draw.rectangle(box, PAPER if is_undrawn else color, MASKED if is_undrawn else None)
    return panel


def _cells_panel(
    image: Tensor,
    token_size: int,
    *,
    filled: Tensor,
    framed: Mapping[tuple[int, int, int], Tensor] | None = None,
    requested: Tensor | None = None,
) -> Image.Image:
    """Draws an image (C, H, W) uint8 with tokens filled in grey or framed in a color, each given as (N,) bool."""
    scale = panel_scale(image)
    panel, boxes = enlarge(image, scale), _boxes(image.shape[-2:], token_size, scale)
    draw = ImageDraw.Draw(panel)
    for box, masked in zip(boxes, filled.tolist(), strict=True):
        if masked:
            draw.rectangle(box, fill=MASKED, outline=PAPER)
    # Frames are drawn last, so that no fill covers them.
    for color, tokens in (framed or {}).items():
        for box, is_framed in zip(boxes, tokens.tolist(), strict=True):
            if is_framed:
                draw.rectangle(box, outline=color, width=2)
    return panel if requested is None else draw_outline(panel, requested)


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

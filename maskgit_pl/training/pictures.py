"""Pictures for people: grids of reconstructions and samples, and decoding shown step by step.

The functions make pictures out of tensors; the two callbacks write them after each validation, beside the checkpoints
and into TensorBoard. ``maskgit sample`` and ``maskgit evaluate`` use the same functions.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pretrained import PretrainedTokenizer
from maskgit_pl.text import printable
from maskgit_pl.training.logs import RunLogger

__all__ = [
    "ReconstructionPictures",
    "SamplePictures",
    "decode_images",
    "decoding_filmstrip",
    "decoding_frames",
    "edit_sheet",
    "image_grid",
    "images_at_once",
    "reconstruction_grid",
    "save_gif",
    "save_png",
    "shown_steps",
    "to_pil",
]

log = logging.getLogger(__name__)

_COMFORTABLE = 84  # pixels along an edge: 28 px images are shown three times as large
_PANEL = 168  # the same for the pictures of decoding, where single tokens must be seen
_GAP, _MARGIN, _FONT_SIZE = 4, 8, 14
_PAPER, _INK, _MASKED, _NEW, _AGAIN = (255, 255, 255), (40, 40, 40), (176, 176, 176), (230, 90, 20), (40, 110, 220)
_MOST_CLASSES, _MOST_OF_A_CLASS = 10, 8
_MOST_PAIRS = 16
_MOST_STEPS = 12  # columns of a filmstrip
_MOST_FRAMES = 64  # of an animation
_MOST_PIXELS = 2**20  # decoded at a time: 16 images of 256 pixels


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) uint8, C = 1 or 3 -> a grey (L) or RGB picture of that size."""
    pixels = rearrange(image.cpu().numpy(), "c h w -> h w c")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def image_grid(
    images: Tensor,
    *,
    columns: int,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Lays images out in rows, enlarged without smoothing so that a person sees their pixels.

    Args:
        images: (n, C, H, W) uint8, C = 1 or 3, n at least 1; the last row may be short.
        columns: Images of a row.
        row_captions: Written left of the rows; empty for none.
        column_captions: Written above the columns; empty for none.
        scale: Times as large; None enlarges small images to about 84 px.

    Raises:
        ValueError: No images, fewer than one column, or more captions than rows or columns.
    """
    rows = _checked_rows(images, columns, row_captions, column_captions)
    scale = _scale(images, _COMFORTABLE) if scale is None else scale
    tiles = [_enlarged(image, scale) for image in images]
    return _lay_out(tiles, rows=rows, columns=columns, row_captions=row_captions, column_captions=column_captions)


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, *, columns: int = 8) -> Image.Image:
    """Rows of originals, each above the row of their reconstructions.

    Args:
        originals: (n, C, H, W) uint8.
        reconstructions: The same shape.
        columns: Images of a row.
    """
    columns = min(columns, len(originals))
    starts = range(0, len(originals) // columns * columns, columns)  # whole rows alone
    rows = [part[start : start + columns] for start in starts for part in (originals, reconstructions)]
    return image_grid(torch.cat(rows), columns=columns, row_captions=["original", "reconstruction"] * len(starts))


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes a PNG under a temporary name first, so that a viewer never meets half of it."""
    _save(path, lambda partial: picture.save(partial, format="PNG"))


def save_gif(frames: Sequence[Image.Image], path: Path, *, milliseconds: int = 600, last: int = 2400) -> None:
    """Writes frames as a GIF that goes round for ever.

    Args:
        frames: At least one, all of one size.
        path: The file.
        milliseconds: How long a frame stays.
        last: How long the last one stays.
    """
    durations = [milliseconds] * (len(frames) - 1) + [last]
    first, *rest = [frame.quantize(128) for frame in frames]
    _save(
        path,
        lambda partial: first.save(
            partial, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1
        ),
    )


def images_at_once(height: int, width: int) -> int:
    """Returns how many images of a size a tokenizer encodes or decodes at a time, at least 1: their pixels are bounded.

    The released tokenizer takes 130 MB for an image of 256 x 256 pixels.
    """
    return max(1, _MOST_PIXELS // (height * width))


def decode_images(tokenizer: PretrainedTokenizer, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
    """Decodes tokens to pictures, as many at a time as ``images_at_once`` says.

    Args:
        tokenizer: Where its network is, the work is done.
        tokens: (B, N) int64 in [0, K).
        grid: Rows and columns of another picture than the model's own, such as a panorama.

    Returns:
        (B, C, H, W) uint8 on the CPU: the decoded images, clipped to [0, 1], image_size high and wide or as large as
        the grid.
    """
    size = None if grid is not None and grid != tokenizer.grid else tokenizer.image_size
    rows, columns = grid or tokenizer.grid
    factor = tokenizer.network.config.downsampling_factor
    count, decoded = images_at_once(rows * factor, columns * factor), []
    with torch.inference_mode():
        for first in range(0, len(tokens), count):
            images = tokenizer.network.decode(tokens[first : first + count], (rows, columns))[..., :size, :size]
            decoded.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
        return torch.cat(decoded)


def shown_steps(steps: Sequence[DecodingStep], kind: Literal["animation", "filmstrip"]) -> list[DecodingStep]:
    """The steps that a picture shows, so that no others need be decoded: all, or some with the first and last."""
    most = _MOST_FRAMES if kind == "animation" else _MOST_STEPS
    return [steps[number] for number in _spread(len(steps), most)]


def decoding_frames(
    steps: Sequence[DecodingStep],
    images: Sequence[Tensor],
    *,
    grid: tuple[int, int],
    captions: Sequence[str] = (),
    num_steps: int | None = None,
) -> list[Image.Image]:
    """One picture a decoding step: above, what is decided; below, the image that the step's whole draw gives.

    Above, masked tokens are grey, tokens kept at this step have an orange frame and tokens masked again a blue one, and
    decided ones are their part of the image.

    Args:
        steps: The steps of a run over a few images.
        images: For each step, its tokens decoded: (n, C, H, W) uint8.
        grid: Rows and columns of tokens.
        captions: Written above the images; empty for none.
        num_steps: T, where the steps are some of them; None where they are all.

    Source: paper, Figure 2.
    """
    frames = []
    for step, decoded in zip(steps, images, strict=True):
        above = [_token_panel(step, row, decoded[row], grid) for row in range(len(decoded))]
        below = [_enlarged(image, _scale(decoded, _PANEL)) for image in decoded]
        frame = _lay_out([*above, *below], rows=2, columns=len(decoded), column_captions=captions)
        frames.append(_titled(frame, _describe(step, num_steps or len(steps))))
    return frames


def decoding_filmstrip(
    steps: Sequence[DecodingStep], images: Sequence[Tensor], *, grid: tuple[int, int], row: int = 0
) -> Image.Image:
    """One image's decoding in one picture, a column a step: mask, confidence, what is newly kept, the image.

    The mask is what the step found: grey. Confidence is the probability that each code had when it was last drawn, from
    dark (0) to bright (the highest that was drawn, which stands beside the row). Newly kept tokens have an orange
    frame, tokens masked again a blue one. The image is that of the step's whole draw. Of many steps some are shown, the
    first and the last among them.

    Args:
        steps: The steps of a run.
        images: For each step, its tokens decoded: (n, C, H, W) uint8.
        grid: Rows and columns of tokens.
        row: Which image of the run.
    """
    shown = _spread(len(steps), _MOST_STEPS)
    chosen = [(steps[number], images[number][row]) for number in shown]
    scale = _scale(images[0], _PANEL)
    top = max(1e-9, *(float((step.confidence * step.was_masked)[row].max()) for step, _ in chosen))
    rows = [
        [_cells_panel(image, grid, filled=step.was_masked[row]) for step, image in chosen],
        [_heat_panel(step.confidence[row] / top, image, grid) for step, image in chosen],
        [_token_panel(step, row, image, grid) for step, image in chosen],
        [_enlarged(image, scale) for _, image in chosen],
    ]
    captions = [f"step {step.step + 1}: {int(step.still_masked[row].sum())} masked" for step, _ in chosen]
    return _lay_out(
        [panel for panels in rows for panel in panels],
        rows=4,
        columns=len(chosen),
        row_captions=["mask", f"confidence to {top:.2f}", "newly kept", "image"],
        column_captions=captions,
    )


def edit_sheet(
    original: Tensor, variants: Tensor, *, mask: Tensor, region: Tensor, title: str, captions: Sequence[str]
) -> Image.Image:
    """An edit in one row: the original, the original with the region grey and the mask outlined, the variants.

    Args:
        original: (C, H, W) uint8, C = 1 or 3.
        variants: (n, C, H, W) uint8.
        mask: (H, W) bool: what was asked for.
        region: (H, W) bool: what was generated, the mask and its surroundings.
        title: Written above.
        captions: One for each variant.
    """
    colour = original.expand(3, -1, -1)
    edge = _outline(mask)
    masked = colour.clone()
    for part, value in ((region, _MASKED), (edge, _NEW)):
        masked = torch.tensor(value, dtype=torch.uint8)[:, None, None].where(part, masked)
    images = torch.cat([torch.stack([colour, masked]), variants.expand(-1, 3, -1, -1)])
    page = image_grid(images, columns=len(images), column_captions=["original", "masked", *captions])
    return _titled(page, title)


class ReconstructionPictures(Callback):
    """Writes ``reconstructions.png`` after each validation of stage 1.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        pair = cast("_Reconstructs", pl_module).reconstructions()
        if pair is not None:
            originals, reconstructions = (part[:_MOST_PAIRS] for part in pair)
            _publish(reconstruction_grid(originals, reconstructions), self.folder, "reconstructions", trainer)


class SamplePictures(Callback):
    """Writes ``samples.png`` after each validation of stage 2: the same classes and seeds every time.

    Every rank samples, so that sharded networks stay in step; rank 0 decodes and writes.

    Args:
        folder: Where to.
        class_names: All classes; at most 10 of them, evenly spread, are shown.
        images_per_class: At most 8.
        seed: Of the first image; image i has seed + i.
    """

    def __init__(self, folder: Path, *, class_names: Sequence[str], images_per_class: int = 8, seed: int = 0) -> None:
        self.folder = folder
        shown = min(len(class_names), _MOST_CLASSES)
        self.classes = [number * len(class_names) // shown for number in range(shown)]
        self.captions = [class_names[label] for label in self.classes]
        self.images_per_class = min(images_per_class, _MOST_OF_A_CLASS)
        self.labels = [label for label in self.classes for _ in range(self.images_per_class)]
        self.seeds = [seed + number for number in range(len(self.labels))]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        model = cast("_Samples", pl_module)
        *_, last = model.sample(self.labels, self.seeds)  # to the end, on every rank
        if trainer.is_global_zero:
            images = decode_images(model.tokenizer, last.tokens)
            picture = image_grid(images, columns=self.images_per_class, row_captions=self.captions)
            _publish(picture, self.folder, "samples", trainer)


class _Reconstructs(Protocol):
    def reconstructions(self) -> tuple[Tensor, Tensor] | None: ...


class _Samples(Protocol):
    @property
    def tokenizer(self) -> PretrainedTokenizer: ...

    def sample(self, labels: Sequence[int], seeds: Sequence[int]) -> Iterator[DecodingStep]: ...


def _publish(picture: Image.Image, folder: Path, name: str, trainer: Trainer) -> None:
    """Training does not depend on it."""
    try:
        save_png(picture, folder / f"{name}.png")
    except OSError as error:
        log.warning("%s: cannot be written: %s; training goes on", folder / f"{name}.png", error)
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.log_picture(name, picture, trainer.global_step)


def _checked_rows(images: Tensor, columns: int, row_captions: Sequence[str], column_captions: Sequence[str]) -> int:
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"images: (n, C, H, W) uint8 with n >= 1 are needed, got {tuple(images.shape)} {images.dtype}")
    if columns < 1:
        raise ValueError(f"columns: at least 1 is needed, got {columns}")
    rows = math.ceil(len(images) / columns)
    for name, captions, most in (("row", row_captions, rows), ("column", column_captions, columns)):
        if len(captions) > most:
            raise ValueError(f"{name}_captions: at most {most}, one a {name}, are needed, got {len(captions)}")
    return rows


def _scale(images: Tensor, wanted: int) -> int:
    """The whole factor that brings the longer edge to at least ``wanted`` pixels."""
    return max(1, math.ceil(wanted / max(images.shape[-2:])))


def _outline(mask: Tensor) -> Tensor:
    """(H, W) bool: the masked pixels that have a neighbour outside; beyond the border is outside too."""
    outside = F.pad(mask.logical_not()[None].float(), (1, 1, 1, 1), value=1.0)
    return mask & (F.max_pool2d(outside, 3, stride=1)[0] > 0)


def _enlarged(image: Tensor, scale: int) -> Image.Image:
    picture = to_pil(image).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _lay_out(
    tiles: Sequence[Image.Image],
    *,
    rows: int,
    columns: int,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> Image.Image:
    """Tiles of one size in raster order, captions to the left and above."""
    font = ImageFont.load_default(_FONT_SIZE)
    row_captions, column_captions = (list(map(printable, texts)) for texts in (row_captions, column_captions))
    width, height = tiles[0].size
    left = _MARGIN + math.ceil(max((font.getlength(text) + _MARGIN for text in row_captions), default=0))
    top = _MARGIN + (_FONT_SIZE + _MARGIN if column_captions else 0)
    size = left + columns * (width + _GAP) - _GAP + _MARGIN, top + rows * (height + _GAP) - _GAP + _MARGIN
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for number, tile in enumerate(tiles):
        page.paste(tile, (left + number % columns * (width + _GAP), top + number // columns * (height + _GAP)))
    for row, text in enumerate(row_captions):
        middle = top + row * (height + _GAP) + height // 2
        draw.text((left - _MARGIN, middle), text, _INK, font, anchor="rm")
    for column, text in enumerate(column_captions):
        middle = left + column * (width + _GAP) + width // 2
        draw.text((middle, _MARGIN + _FONT_SIZE // 2), _shortened(text, width, font), _INK, font, anchor="mm")
    return page


def _shortened(text: str, width: int, font: Any) -> str:
    """The text, cut with an ellipsis where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _titled(picture: Image.Image, title: str) -> Image.Image:
    font, title = ImageFont.load_default(_FONT_SIZE), printable(title)
    height = _FONT_SIZE + _MARGIN
    width = max(picture.width, math.ceil(font.getlength(title)) + 2 * _MARGIN)
    page = Image.new("RGB", (width, picture.height + height), _PAPER)
    page.paste(picture, (0, height))
    ImageDraw.Draw(page).text((_MARGIN, _MARGIN + _FONT_SIZE // 2), title, _INK, font, anchor="lm")
    return page


def _describe(step: DecodingStep, num_steps: int) -> str:
    counts = sorted(set(step.still_masked.sum(1).tolist()))
    masked = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"step {step.step + 1}/{num_steps}, {masked} of {step.tokens.shape[1]} masked"


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of range(count), evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _token_panel(step: DecodingStep, row: int, image: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The decided part of an image (C, H, W) uint8: grey where masked, framed where kept or masked again just now."""
    was, still = step.was_masked[row], step.still_masked[row]
    return _cells_panel(image, grid, filled=still, framed={_NEW: was & ~still, _AGAIN: still & ~was})


def _cells_panel(
    image: Tensor,
    grid: tuple[int, int],
    *,
    filled: Tensor,
    framed: Mapping[tuple[int, int, int], Tensor] | None = None,
) -> Image.Image:
    """An image (C, H, W) uint8 with tokens filled grey or framed in a colour; (N,) bool each."""
    scale = _scale(image, _PANEL)
    panel, boxes = _enlarged(image, scale), _boxes(image.shape[-2:], grid, scale)
    draw = ImageDraw.Draw(panel)
    for box, masked in zip(boxes, filled.tolist(), strict=True):
        if masked:
            draw.rectangle(box, fill=_MASKED, outline=_PAPER)
    for colour, tokens in (framed or {}).items():
        for box, wanted in zip(boxes, tokens.tolist(), strict=True):
            if wanted:
                draw.rectangle(box, outline=colour, width=2)
    return panel


def _heat_panel(values: Tensor, image: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Values (N,) float of the tokens as colours, from dark (0) to bright (1), in a picture as large as the image's."""
    from matplotlib import colormaps

    scale = _scale(image, _PANEL)
    colours = (colormaps["viridis"](values.cpu().numpy())[:, :3] * 255).round().astype(int).tolist()
    panel = Image.new("RGB", (image.shape[-1] * scale, image.shape[-2] * scale), _PAPER)
    draw = ImageDraw.Draw(panel)
    for box, colour in zip(_boxes(image.shape[-2:], grid, scale), colours, strict=True):
        draw.rectangle(box, fill=tuple(colour))
    return panel


def _boxes(size: Sequence[int], grid: tuple[int, int], scale: int) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom), all included, of the tokens of an image (H, W) shown ``scale`` times as large.

    In raster order. Tokens at the right and below may go beyond the image.
    """
    height, width = (math.ceil(pixels / cells) * scale for pixels, cells in zip(size, grid, strict=True))
    return [
        (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        for row in range(grid[0])
        for column in range(grid[1])
    ]


def _save(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""The decoding of a request: whole images, regions of images, and canvases that are filled window by window.

The methods of ``MaskGIT`` call these functions (``edit`` calls ``redraw``). Each yields the decoding steps
while they are decoded and returns the images, (n, C, H, W) uint8 on the CPU; ``finish`` runs them to the end.

Source: paper, sections on iterative decoding and on class-conditional image editing; released code, its
editing functions.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import check_choice, check_number, height_width, plain_number
from maskgit_pl.decoding import (
    ConditionalModel,
    DecodingStep,
    decode_autoregressive,
    decode_classes,
)
from maskgit_pl.errors import printable
from maskgit_pl.networks.backbone import AutoregressiveBackbone
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer, PretrainedTransformer
from maskgit_pl.pipeline.options import Images, OutputType, Request, StepCallback
from maskgit_pl.pipeline.regions import (
    ImageLike,
    Margins,
    MaskLike,
    Window,
    composite,
    first_step,
    fit_to_model,
    image_pixels,
    mask_pixels,
    pixel_region,
    seam,
    seam_radius,
    token_mask,
    windows,
)
from maskgit_pl.randomness import random_bits
from maskgit_pl.schedules import num_masked

__all__ = ["StepsOfImages", "decode", "finish", "generate", "inpaint", "outpaint", "panorama", "redraw"]

StepsOfImages: TypeAlias = collections.abc.Generator[DecodingStep, None, Tensor]
"""Decoding steps, and the images (n, C, H, W) uint8 as the value that the generator returns."""


def decode(
    transformer: PretrainedTransformer, request: Request, *, tokens: Tensor | None = None, first_step: int = 0
) -> Iterator[DecodingStep]:
    """Yields the decoding steps of all results of a request, in one batch.

    Args:
        transformer: The network, its mask schedule and its caches.
        request: Labels, seeds and decoding settings of B results.
        tokens: (B, N) int64 to start from; None starts from masked tokens only.
        first_step: First step in [0, T).
    """
    network, device, decoding = transformer.network, transformer.device, request.decoding
    if isinstance(network, AutoregressiveBackbone):
        return decode_autoregressive(
            ConditionalModel(network, device),
            request.labels,
            request.seeds,
            decoder=decoding.build_autoregressive_decoder(network.config.num_tokens),
            scales=decoding.scales(),
            negative_labels=request.negative_labels,
        )
    model = _conditional_model(transformer)
    if request.negative_model is not None:
        model = replace(model, negative=_conditional_model(request.negative_model))
    return decode_classes(
        model.bind(None if request.vectors is None else request.vectors.to(device)),
        request.labels,
        request.seeds,
        decoder=decoding.build_decoder(transformer.mask_schedule),
        scales=decoding.scales(),
        negative_labels=request.negative_labels,
        tokens=tokens,
        first_step=first_step,
    )


def finish(steps: StepsOfImages, output_type: OutputType, callback: StepCallback | None) -> Images:
    """Runs all decoding steps, calls ``callback`` after each, and returns the images as ``output_type``.

    Raises:
        ValueError: if the output type is unknown. The message names the nearest one.
    """
    check_choice("output_type", output_type, get_args(OutputType))
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            images: Tensor = end.value
            break
        if callback is not None:
            callback(step)
    if output_type == "pt":
        return images
    if output_type == "np":
        pixels: npt.NDArray[np.uint8] = rearrange(images.numpy(), "n c h w -> n h w c")
        return pixels
    from maskgit_pl.pipeline import display, grids  # which import Pillow

    return display.ImageList(grids.to_pil(image) for image in images)


def generate(tokenizer: PretrainedTokenizer, transformer: PretrainedTransformer, request: Request) -> StepsOfImages:
    """Generates one image for each label."""
    images = []
    for rows in request.batches():
        steps = decode(transformer, request.part(rows))
        images.append((yield from _decode_images(tokenizer, steps)))
    return torch.cat(images)


def inpaint(
    tokenizer: PretrainedTokenizer,
    transformer: PretrainedTransformer,
    request: Request,
    image: ImageLike | Sequence[ImageLike],
    mask: MaskLike | Sequence[MaskLike],
) -> StepsOfImages:
    """Regenerates the masked part of images. See ``MaskGIT.inpaint`` for the arguments and the numbered steps."""
    transformer.schedule_for("inpaint")
    factor, dilation = tokenizer.network.config.downsampling_factor, 1 if request.dilation is None else request.dilation
    radius = seam_radius(tokenizer.image_size) if request.blend is None else request.blend
    # 1. (m, C, H, W) pixels and (m, H, W) masks -> (m, N) tokens and (m, h, w) masks of tokens, with m = 1 or n.
    pixels, masks = _read_images(tokenizer, request, image, mask)
    unknown = torch.stack([token_mask(pixel_mask, factor=factor, dilation=dilation) for pixel_mask in masks])
    tokens = tokenizer.encode(pixels, batch_size=request.batch_size)
    # 2.
    edited = yield from _regenerate(tokenizer, transformer, request, tokens, unknown.flatten(1))
    # 3. The region of the tokens is larger than the mask.
    height, width = masks.shape[1:]
    regions = (pixel_region(token_region, factor=factor, height=height, width=width) for token_region in unknown)
    weights = torch.stack([seam(region, radius=radius) for region in regions])
    for row, original in enumerate(pixels.expand_as(edited)):
        edited[row] = composite(original, edited[row], weights[row % len(weights)])
    return edited


def redraw(
    tokenizer: PretrainedTokenizer,
    transformer: PretrainedTransformer,
    request: Request,
    image: ImageLike | Sequence[ImageLike],
    strength: float,
) -> StepsOfImages:
    """Regenerates a random share of the tokens of images. See ``MaskGIT.edit`` for the arguments and numbered steps."""
    transformer.schedule_for("edit")
    share = check_number("strength", plain_number(strength), "(0, 1]")
    num_tokens = transformer.network.config.num_tokens
    # 1. (m, C, H, W) pixels -> (m, N) tokens, with m = 1 or n.
    pixels, _ = _read_images(tokenizer, request, image, None)
    tokens = tokenizer.encode(pixels, batch_size=request.batch_size)
    # 2. The positions of a seed are in one order, so that a larger share masks the same tokens and others.
    keys = random_bits("strength", seed=torch.tensor(request.seeds), index=0, count=num_tokens)  # (n, N)
    masked = num_masked(torch.tensor(share), num_tokens, rounding="ceil")
    unknown = keys.argsort(dim=1, stable=True).argsort(dim=1) < masked
    # 3.
    return (yield from _regenerate(tokenizer, transformer, request, tokens, unknown))


def outpaint(
    tokenizer: PretrainedTokenizer,
    transformer: PretrainedTransformer,
    request: Request,
    image: ImageLike,
    added: Margins,
    overlap: float,
) -> StepsOfImages:
    """Extends an image beyond its borders. See ``MaskGIT.outpaint`` for the arguments and the numbered steps."""
    transformer.schedule_for("outpaint")
    factor, size = tokenizer.network.config.downsampling_factor, tokenizer.image_size
    pixels = image_pixels(image, channels=tokenizer.network.config.in_channels)
    added.check(pixels.shape[-2:], factor=factor, least=size)
    # 1. (H, W) pixels -> (R, C) canvas of tokens, unknown outside the image.
    mask = added.outside(*pixels.shape[-2:])
    unknown = token_mask(mask, factor=factor, dilation=request.dilation or 0)
    tokens = added.pad(_encode_within(tokenizer, pixels, added), size=factor)
    # 2. (n, C, H, W): the filled canvases as pixels.
    filled = yield from _fill(tokenizer, transformer, request, tokens, unknown, overlap)
    # 3. The weight is 1 outside the image and 0 inside, with a blurred edge.
    weight = seam(mask, radius=seam_radius(size) if request.blend is None else request.blend)
    original = added.pad(pixels, size=1)
    return torch.stack([composite(original, edited, weight) for edited in filled])


def panorama(
    tokenizer: PretrainedTokenizer,
    transformer: PretrainedTransformer,
    request: Request,
    size: tuple[int, int],
    overlap: float,
) -> StepsOfImages:
    """Generates images of any size, a (height, width) in pixels of whole tokens. See ``MaskGIT.panorama``."""
    transformer.schedule_for("panorama")
    factor = tokenizer.network.config.downsampling_factor
    unknown = torch.ones(size[0] // factor, size[1] // factor, dtype=torch.bool)
    tokens = torch.zeros(unknown.shape, dtype=torch.int64)
    return (yield from _fill(tokenizer, transformer, request, tokens, unknown, overlap))


def _conditional_model(transformer: PretrainedTransformer) -> ConditionalModel:
    # The first step of a class without context is the same for all seeds, so its logits are cached.
    return ConditionalModel(transformer.network, transformer.device, transformer.caches.first_step)


def _decode_images(tokenizer: PretrainedTokenizer, steps: Iterator[DecodingStep]) -> StepsOfImages:
    """Yields decoding steps, and returns the images of the last one, (B, C, H, W)."""
    for step in steps:
        yield step
    return tokenizer.decode(step.tokens)


def _regenerate(
    tokenizer: PretrainedTokenizer,
    transformer: PretrainedTransformer,
    request: Request,
    tokens: Tensor,
    unknown: Tensor,
) -> StepsOfImages:
    """Decodes the unknown tokens of each result, and returns the images of all tokens.

    Args:
        tokenizer: Decodes the tokens.
        transformer: Predicts the tokens.
        request: Labels, seeds and decoding settings of n results.
        tokens: (n, N) int64, any code where ``unknown``; or (1, N) for all results.
        unknown: (n, N) bool, or (1, N).
    """
    tokens = tokens.masked_fill(unknown, transformer.network.config.mask_token_id)
    tokens, unknown = (rows.expand(len(request.labels), -1) for rows in (tokens, unknown))
    first_steps = [first_step(row, num_steps=request.decoding.num_steps) for row in unknown]
    shape = (len(tokens), tokenizer.network.config.in_channels, *height_width(tokenizer.image_size))
    images = torch.empty(shape, dtype=torch.uint8)
    # A batch shares its steps, so rows with different first steps cannot be in one.
    for start in sorted(set(first_steps)):
        for rows in request.batches([row for row, first in enumerate(first_steps) if first == start]):
            context = None if bool(unknown[rows].all()) else tokens[rows]  # None: without context
            steps = decode(transformer, request.part(rows), tokens=context, first_step=start)
            images[rows] = yield from _decode_images(tokenizer, steps)
    return images


def _fill(
    tokenizer: PretrainedTokenizer,
    transformer: PretrainedTransformer,
    request: Request,
    tokens: Tensor,
    unknown: Tensor,
    overlap: float,
) -> StepsOfImages:
    """Fills a canvas window by window, yields the steps of the whole canvas, and decodes it to pixels.

    1. Places the known tokens on a canvas for each result of a batch.
    2. For each window: decodes its unknown tokens with the known ones as context, and copies them to the canvas.
    3. Decodes the tokens of the whole canvas.

    Args:
        tokenizer: Decodes the tokens.
        transformer: Predicts the tokens.
        request: Labels, seeds and decoding settings of n results.
        tokens: (R, C) int64, any value where ``unknown``.
        unknown: (R, C) bool.
        overlap: See ``MaskGIT.outpaint``.
    """
    config = transformer.network.config
    overlap = check_number("overlap", plain_number(overlap), "(0, 1)")
    filled = []
    for rows in request.batches():
        batch = request.part(rows)
        # 1. (B, R, C) tokens.
        canvas = _Canvas.of(tokens, unknown, count=len(rows), device=transformer.device)
        seeds = torch.tensor(batch.seeds)
        for number, window in enumerate(windows(unknown, size=config.grid, overlap=overlap)):
            first = first_step(window.unknown, num_steps=request.decoding.num_steps)
            context = canvas.window(window, mask_token_id=config.mask_token_id)
            # 2. Each window has its own noise: with the same noise, windows would repeat one another.
            window_seeds = seeds if number == 0 else random_bits("window", seed=seeds, index=number)[:, 0]
            part = replace(batch, seeds=window_seeds.tolist())
            start = None if bool(window.unknown.all()) else context  # None: a window without context
            for step in decode(transformer, part, tokens=start, first_step=first):
                yield canvas.step(window, step)
            canvas.keep(window, step)
        # 3. (B, R C) tokens -> (B, C, H, W) pixels.
        filled.append(tokenizer.decode(canvas.tokens.flatten(1), grid=(unknown.shape[0], unknown.shape[1])))
    return torch.cat(filled)


@dataclass
class _Canvas:
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
    def of(cls, tokens: Tensor, unknown: Tensor, *, count: int, device: torch.device) -> _Canvas:
        """Returns ``count`` equal canvases.

        Args:
            tokens: (R, C) int64, any value where ``unknown``.
            unknown: (R, C) bool.
            count: B, the number of canvases.
            device: Device of the tokens.
        """
        kept = tokens.masked_fill(unknown, 0).to(device)
        every = kept.expand(count, *kept.shape).clone()
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


def _encode_within(tokenizer: PretrainedTokenizer, pixels: Tensor, added: Margins) -> Tensor:
    """Encodes an image that will be extended: (C, H, W) uint8 -> tokens (h, w) int64 on the CPU.

    The pixels at the border are repeated outwards before the image is encoded. Its border tokens then look like
    tokens inside an image. Without this, pixels that are decoded next to them are too bright or too dark.
    """
    config = tokenizer.network.config
    factor = config.downsampling_factor
    # Half an image of repeated pixels, in whole tokens, is enough context on each side.
    around = added.at_most(*(side // 2 // factor * factor for side in height_width(tokenizer.image_size)))
    repeated = around.pad(pixels.float(), size=1, mode="replicate").to(pixels.dtype)
    tokens = tokenizer.encode(repeated[None])
    rows, columns = config.grid((repeated.shape[-2], repeated.shape[-1]))
    grid = rearrange(tokens, "1 (h w) -> h w", h=rows)
    # Keeps the tokens of the image itself.
    left, right, up, down = (side // factor for side in around.sides)
    return grid[up : rows - down, left : columns - right]


def _read_images(
    tokenizer: PretrainedTokenizer,
    request: Request,
    image: ImageLike | Sequence[ImageLike],
    mask: MaskLike | Sequence[MaskLike] | None,
) -> tuple[Tensor, Tensor]:
    """Reads images and masks, and fits them to the size of the model; see ``regions.fit_to_model``.

    Returns:
        (m, C, H, W) uint8 and (m, H, W) bool: m = 1 for one image and at most one mask, else one for each result.
    """
    count, channels = len(request.labels), tokenizer.network.config.in_channels
    images, masks = _as_list("image", image, count), [None] if mask is None else _as_list("mask", mask, count)
    number, read = max(len(images), len(masks)), []
    for row in range(number):
        # One image goes with every mask, and one mask with every image.
        source, mask_source = images[row % len(images)], masks[row % len(masks)]
        name = f"image {row}" if number > 1 else "image"
        name = f"image {printable(str(source))}" if isinstance(source, str | Path) else name
        pixels = image_pixels(source, channels=channels, name=name)
        region = None if mask_source is None else mask_pixels(mask_source, name=f"mask of {name}")
        read.append(fit_to_model(pixels, region, image_size=tokenizer.image_size, fit=request.fit, name=name))
    return torch.stack([pixels for pixels, _ in read]), torch.stack([region for _, region in read])


def _as_list(name: str, images: ImageLike | Sequence[ImageLike], count: int) -> list[ImageLike]:
    """Returns a list of one image or mask for all results, or of one for each of the ``count`` results."""
    if not isinstance(images, list | tuple):
        return [cast("ImageLike", images)]
    if len(images) not in (1, count):
        raise ValueError(f"{name} must be one {name}, or one for each of the {count} classes, got {len(images)}")
    return list(images)

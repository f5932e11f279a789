"""The decoding of a request: whole images, regions of images, and canvases that are filled window by window.

The methods of ``MaskGIT`` call these functions (``edit`` calls ``redraw``). Each returns images (n, C, H, W)
uint8 on the CPU, after it has called ``Request.callback`` with each decoding step.

Source: paper, sections on iterative decoding and on class-conditional image editing; released code, its
editing functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import check_number, height_width, plain_number
from maskgit_pl.decoding import ConditionalModel, DecodingStep, decode_autoregressive, decode_classes
from maskgit_pl.networks.backbone import AutoregressiveBackbone
from maskgit_pl.pipeline.options import Images, OutputType, Request
from maskgit_pl.pipeline.regions import (
    Box,
    ImageLike,
    Margins,
    MaskLike,
    Window,
    box_mask,
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
from maskgit_pl.pretrained.networks import Pipeline, PretrainedTokenizer, PretrainedTransformer
from maskgit_pl.randomness import random_bits
from maskgit_pl.schedules import num_masked
from maskgit_pl.text import printable

_DILATION = 1  # tokens around an inpainted region that are generated, too: the seam lies outside the mask
_MOST_PIXELS = "[0, 65536]"  # of a blur: the side of the largest image


def decode(
    transformer: PretrainedTransformer, request: Request, *, tokens: Tensor | None = None, first_step: int = 0
) -> Iterator[DecodingStep]:
    """Yields the decoding steps of all results of a request, in one batch.

    Args:
        transformer: The network, its mask schedule and the logits of its first step.
        request: Labels, seeds and decoding settings of B results.
        tokens: (B, N) int64 to start from; None starts from masked tokens only.
        first_step: First step in [0, T).
    """
    network, device, decoding = transformer.network, transformer.device, request.decoding
    negative = None if request.negative_label is None else [request.negative_label] * len(request.labels)
    if isinstance(network, AutoregressiveBackbone):
        return decode_autoregressive(
            ConditionalModel(network, device),
            request.labels,
            request.seeds,
            decoder=decoding.build_autoregressive_decoder(network.config.num_tokens),
            scales=decoding.scales(),
            negative_labels=negative,
        )
    model = _conditional_model(transformer)
    if request.negative_model is not None:
        model = replace(model, negative=_conditional_model(request.negative_model))
    return decode_classes(
        model.bind(None if request.vectors is None else request.vectors.to(device)),
        request.labels,
        request.seeds,
        decoder=decoding.build_decoder(transformer.mask_schedule, transformer.corruption),
        scales=decoding.scales(),
        negative_labels=negative,
        tokens=tokens,
        first_step=first_step,
    )


def as_output(images: Tensor, output_type: OutputType) -> Images:
    """Returns images (n, C, H, W) uint8 as ``output_type``."""
    if output_type == "pt":
        return images
    if output_type == "np":
        return rearrange(images.numpy(), "n c h w -> n h w c")
    from maskgit_pl import grids
    from maskgit_pl.pipeline import display

    return display.ImageList(grids.to_pil(image) for image in images)


def generate(pipe: Pipeline, request: Request) -> Tensor:
    """Generates one image for each label."""
    tokenizer, parts = pipe.tokenizer, map(request.part, request.batches())
    return torch.cat([tokenizer.decode(_decode_tokens(pipe.transformer, part)) for part in parts])


def generate_tokens(transformer: PretrainedTransformer, request: Request, known: npt.ArrayLike | None) -> Tensor:
    """Generates tokens (n, N) int64 on the CPU. See ``MaskGIT.generate_tokens`` for the arguments."""
    config, count = transformer.network.config, len(request.labels)
    if known is None:
        parts = map(request.part, request.batches())
        return torch.cat([_decode_tokens(transformer, part).cpu() for part in parts])
    transformer.schedule_for("known")
    array = np.asarray(known)
    if array.dtype.kind not in "iu" or array.shape not in ((count, config.num_tokens), (count, *config.grid)):
        raise ValueError(
            f"known must be integers of shape {(count, *config.grid)}, the results and their token grid, got "
            f"{array.shape} of {array.dtype}"
        )
    tokens = torch.from_numpy(array.astype(np.int64)).reshape(count, -1)
    if tokens.min() < -1 or tokens.max() >= config.codebook_size or not bool((tokens == -1).any(1).all()):
        raise ValueError(
            f"known must be in [-1, {config.codebook_size}), with a -1 in each sample, got {tokens.min()} to "
            f"{tokens.max()}; -1 marks tokens to generate"
        )
    for rows, part, context, start in _edits(request, tokens, tokens == -1, config.mask_token_id):
        tokens[rows] = _decode_tokens(transformer, part, tokens=context, first_step=start).cpu()
    return tokens


def inpaint(
    pipe: Pipeline,
    request: Request,
    image: ImageLike | list[ImageLike],
    mask: MaskLike | Box | list[MaskLike | Box],
    *,
    fit: bool,
    blend: float | None,
) -> Tensor:
    """Regenerates the masked part of images. See ``MaskGIT.inpaint`` for the arguments and the numbered steps."""
    pipe.transformer.schedule_for("inpaint")
    factor, radius = pipe.tokenizer.token_size, _seam_radius(pipe, blend)
    # 1. (m, C, H, W) pixels and (m, H, W) masks -> (m, N) tokens and (m, h, w) masks of tokens, with m = 1 or n.
    pixels, masks = _read_images(pipe, request, image, mask, fit=fit)
    unknown = torch.stack([token_mask(pixel_mask, factor=factor, dilation=_DILATION) for pixel_mask in masks])
    tokens = pipe.tokenizer.encode(pixels, batch_size=request.batch_size)
    # 2.
    edited = _regenerate(pipe, request, tokens, unknown.flatten(1))
    # 3. The region of the tokens is larger than the mask.
    height, width = masks.shape[1:]
    regions = (pixel_region(token_region, factor=factor, height=height, width=width) for token_region in unknown)
    weights = torch.stack([seam(region, radius=radius) for region in regions])
    for row, original in enumerate(pixels.expand_as(edited)):
        edited[row] = composite(original, edited[row], weights[row % len(weights)])
    return edited


def redraw(
    pipe: Pipeline, request: Request, image: ImageLike | list[ImageLike], strength: float, *, fit: bool
) -> Tensor:
    """Regenerates a random share of the tokens of images. See ``MaskGIT.edit`` for the arguments and numbered steps."""
    pipe.transformer.schedule_for("edit")
    share = check_number("strength", plain_number(strength), "(0, 1]")
    num_tokens = pipe.transformer.network.config.num_tokens
    # 1. (m, C, H, W) pixels -> (m, N) tokens, with m = 1 or n.
    pixels, _ = _read_images(pipe, request, image, None, fit=fit)
    tokens = pipe.tokenizer.encode(pixels, batch_size=request.batch_size)
    # 2. The positions of a seed are in one order, so that a larger share masks the same tokens and others.
    keys = random_bits("strength", seed=torch.tensor(request.seeds), index=0, count=num_tokens)  # (n, N)
    masked = num_masked(torch.tensor(share), num_tokens, rounding="ceil")
    unknown = keys.argsort(dim=1, stable=True).argsort(dim=1) < masked
    # 3.
    return _regenerate(pipe, request, tokens, unknown)


def outpaint(pipe: Pipeline, request: Request, image: ImageLike, added: Margins, *, blend: float | None) -> Tensor:
    """Extends an image beyond its borders. See ``MaskGIT.outpaint`` for the arguments and the numbered steps."""
    pipe.transformer.schedule_for("outpaint")
    factor, radius = pipe.tokenizer.token_size, _seam_radius(pipe, blend)
    pixels = image_pixels(image, channels=pipe.tokenizer.channels)
    added.check(pixels.shape[-2:], factor=factor, least=pipe.tokenizer.image_size)
    # 1. (H, W) pixels -> (R, C) canvas of tokens, unknown outside the image.
    mask = added.outside(*pixels.shape[-2:])
    unknown = token_mask(mask, factor=factor)
    tokens = added.pad(_encode_within(pipe.tokenizer, pixels, added), size=factor)
    # 2. (n, C, H, W): the filled canvases as pixels.
    filled = _fill(pipe, request, tokens, unknown)
    # 3. The weight is 1 outside the image, where there is nothing to blend with, and falls to 0 inside.
    weight = seam(mask, radius=radius).masked_fill(mask, 1.0)
    original = added.pad(pixels, size=1)
    return torch.stack([composite(original, edited, weight) for edited in filled])


def panorama(pipe: Pipeline, request: Request, size: tuple[int, int]) -> Tensor:
    """Generates images of any size, a (height, width) in pixels of whole tokens. See ``MaskGIT.panorama``."""
    pipe.transformer.schedule_for("panorama")
    factor = pipe.tokenizer.token_size
    unknown = torch.ones(size[0] // factor, size[1] // factor, dtype=torch.bool)
    tokens = torch.zeros(unknown.shape, dtype=torch.int64)
    return _fill(pipe, request, tokens, unknown)


def _seam_radius(pipe: Pipeline, blend: float | None) -> float:
    """Returns the standard deviation of the blur of a seam in pixels; None is that of the released code."""
    if blend is None:
        return seam_radius(pipe.tokenizer.image_size)
    return check_number("blend", plain_number(blend), _MOST_PIXELS)


def _conditional_model(transformer: PretrainedTransformer) -> ConditionalModel:
    # The first step of a class without context is the same for all seeds, so its logits are cached.
    return ConditionalModel(transformer.network, transformer.device, transformer.first_step)


def _decode_tokens(
    transformer: PretrainedTransformer, request: Request, *, tokens: Tensor | None = None, first_step: int = 0
) -> Tensor:
    """Decodes all results of a request in one batch, and returns their tokens (B, N). See ``decode``."""
    for step in decode(transformer, request, tokens=tokens, first_step=first_step):
        if request.callback is not None:
            request.callback(step)
    return step.tokens


def _edits(
    request: Request, tokens: Tensor, unknown: Tensor, mask_token_id: int
) -> Iterator[tuple[Sequence[int], Request, Tensor | None, int]]:
    """Yields batches of results with some unknown tokens: their rows, request, context and first step.

    ``tokens`` (n, N) int64 hold any code where ``unknown`` (n, N) bool; (1, N) is for all results.
    """
    tokens = tokens.masked_fill(unknown, mask_token_id)
    tokens, unknown = (rows.expand(len(request.labels), -1) for rows in (tokens, unknown))
    first_steps = [first_step(row, num_steps=request.decoding.num_steps) for row in unknown]
    # A batch shares its steps, so rows with different first steps cannot be in one.
    for start in sorted(set(first_steps)):
        for rows in request.batches([row for row, first in enumerate(first_steps) if first == start]):
            context = None if bool(unknown[rows].all()) else tokens[rows]  # None: without context
            yield rows, request.part(rows), context, start


def _regenerate(pipe: Pipeline, request: Request, tokens: Tensor, unknown: Tensor) -> Tensor:
    """Decodes the unknown tokens of each result, and returns the images of all tokens. See ``_edits``."""
    shape = (len(request.labels), pipe.tokenizer.channels, *height_width(pipe.tokenizer.image_size))
    images, mask_token_id = torch.empty(shape, dtype=torch.uint8), pipe.transformer.network.config.mask_token_id
    for rows, part, context, start in _edits(request, tokens, unknown, mask_token_id):
        decoded = _decode_tokens(pipe.transformer, part, tokens=context, first_step=start)
        images[rows] = pipe.tokenizer.decode(decoded)
    return images


def _fill(pipe: Pipeline, request: Request, tokens: Tensor, unknown: Tensor) -> Tensor:
    """Fills a canvas window by window, and decodes it to pixels. The steps of the callback are of the whole canvas.

    1. Places the known tokens on a canvas for each result of a batch.
    2. For each window: decodes its unknown tokens with the known ones as context, and copies them to the canvas.
    3. Decodes the tokens of the whole canvas.

    ``tokens`` (R, C) int64 hold any value where ``unknown`` (R, C) bool.
    """
    config, device = pipe.transformer.network.config, pipe.transformer.device
    filled = []
    for rows in request.batches():
        batch = request.part(rows)
        # 1. (B, R, C): the tokens, those that no window has decided yet, and their confidence
        canvas = tokens.masked_fill(unknown, 0).to(device).repeat(len(rows), 1, 1)
        waiting = unknown.to(device).repeat(len(rows), 1, 1)
        confidence = torch.ones(canvas.shape, device=device)
        seeds = torch.tensor(batch.seeds)
        for number, window in enumerate(windows(unknown, size=pipe.tokenizer.grid)):
            hidden = window.unknown.to(device)
            context = canvas[window.index].masked_fill(hidden, config.mask_token_id).flatten(1)
            # 2. Each window has its own noise: with the same noise, windows would repeat one another.
            window_seeds = seeds if number == 0 else random_bits("window", seed=seeds, index=number)[:, 0]
            for step in decode(
                pipe.transformer,
                replace(batch, seeds=window_seeds.tolist()),
                tokens=None if bool(window.unknown.all()) else context,  # None: a window without context
                first_step=first_step(window.unknown, num_steps=request.decoding.num_steps),
            ):
                canvas[window.index] = window.as_grid(step.tokens)
                # Tokens that were known before the window keep the confidence of the window that decided them.
                drawn = window.as_grid(step.confidence)
                confidence[window.index] = drawn.where(hidden, confidence[window.index])
                if request.callback is not None:
                    request.callback(_on_canvas(step, window, canvas, waiting, confidence))
            waiting[window.index] = False
        # 3. (B, R C) tokens -> (B, C, H, W) pixels.
        filled.append(pipe.tokenizer.decode(canvas.flatten(1), grid=(unknown.shape[0], unknown.shape[1])))
    return torch.cat(filled)


def _on_canvas(step: DecodingStep, window: Window, canvas: Tensor, waiting: Tensor, confidence: Tensor) -> DecodingStep:
    """Returns a decoding step of a window as a step of the whole canvas. Tokens of later windows are masked.

    Args:
        step: Step of the window.
        window: Place of the window.
        canvas: (B, R, C) int64 tokens, with those of the step.
        waiting: (B, R, C) bool, the tokens that no window before this one has decided.
        confidence: (B, R, C) float32, with that of the step.
    """

    def place(values: Tensor, background: Tensor) -> Tensor:
        whole = background.clone()  # (B, R, C)
        whole[window.index] = window.as_grid(values)
        return whole.flatten(1)

    return DecodingStep(
        step.step,
        canvas.flatten(1).clone(),
        place(step.was_masked, waiting),
        place(step.still_masked, waiting),
        place(step.scores, torch.full_like(confidence, torch.inf)),
        confidence.flatten(1).clone(),
    )


def _encode_within(tokenizer: PretrainedTokenizer, pixels: Tensor, added: Margins) -> Tensor:
    """Encodes an image that will be extended: (C, H, W) uint8 -> tokens (h, w) int64 on the CPU.

    The pixels at the border are repeated outwards before the image is encoded. Its border tokens then look like
    tokens inside an image. Without this, pixels that are decoded next to them are too bright or too dark.
    """
    factor = tokenizer.token_size
    # Half an image of repeated pixels, in whole tokens, is enough context on each side.
    around = added.at_most(*(side // 2 // factor * factor for side in height_width(tokenizer.image_size)))
    repeated = around.pad(pixels.float(), size=1, mode="replicate").to(pixels.dtype)
    tokens = tokenizer.encode(repeated[None])
    rows, columns = tokenizer.network.config.grid((repeated.shape[-2], repeated.shape[-1]))
    grid = rearrange(tokens, "1 (h w) -> h w", h=rows)
    # Keeps the tokens of the image itself.
    left, right, up, down = (side // factor for side in around.sides)
    return grid[up : rows - down, left : columns - right]


def _read_images(
    pipe: Pipeline,
    request: Request,
    image: ImageLike | list[ImageLike],
    mask: MaskLike | Box | list[MaskLike | Box] | None,
    *,
    fit: bool,
) -> tuple[Tensor, Tensor]:
    """Reads images and masks, and fits them to the size of the model; see ``regions.fit_to_model``.

    Returns:
        (m, C, H, W) uint8 and (m, H, W) bool: m = 1 for one image and at most one mask, else one for each result.
    """
    count, channels = len(request.labels), pipe.tokenizer.channels
    images, masks = _as_list("image", image, count), [None] if mask is None else _as_list("mask", mask, count)
    number, read = max(len(images), len(masks)), []
    for row in range(number):
        # One image goes with every mask, and one mask with every image.
        source, region = images[row % len(images)], masks[row % len(masks)]
        name = f"image {row}" if number > 1 else "image"
        name = f"image {printable(str(source))}" if isinstance(source, str | Path) else name
        pixels = image_pixels(source, channels=channels, name=name)
        if isinstance(region, tuple):
            region = box_mask(region, height=pixels.shape[-2], width=pixels.shape[-1])
        elif region is not None:
            region = mask_pixels(region, name=f"mask of {name}")
        read.append(fit_to_model(pixels, region, image_size=pipe.tokenizer.image_size, fit=fit, name=name))
    return torch.stack([pixels for pixels, _ in read]), torch.stack([region for _, region in read])


def _as_list(name: str, images: Any, count: int) -> list[Any]:
    """Returns a list of one image, mask or box for all results, or of one for each of the ``count`` results."""
    if not isinstance(images, list):
        return [images]
    if len(images) not in (1, count):
        raise ValueError(f"{name} must be one {name}, or one for each of the {count} classes, got {len(images)}")
    return images

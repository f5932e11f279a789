"""The editing tasks of the paper's Table 2: outpaint the right half of held-out images, or inpaint their centre.

The pixels to generate are removed before the tokenizer encodes an image. Otherwise its convolutions would carry some of
them into the neighbouring tokens. ``Evaluator.measure_editing`` uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from maskgit_pl.image_format import height_width
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.networks import PretrainedTokenizer
from maskgit_pl.pipeline.regions import pixel_region

__all__ = ["Task", "edit", "hide_pixels", "make_hidden_mask"]

Task = Literal["outpaint-right", "inpaint-centre"]

_GREY = 128  # uint8 value of hidden pixels


def make_hidden_mask(task: Task, tokenizer: PretrainedTokenizer) -> Tensor:
    """Returns the mask of the pixels to generate: the right 50 %, or the centre of 50 % x 50 %.

    The mask consists of whole tokens. The right half is rounded up, and the centre down to a size that can be centred:
    of 7 x 7 tokens, these are 4 columns, or 3 x 3 tokens.

    Args:
        task: The task.
        tokenizer: Tokenizer whose token grid is used.

    Returns:
        (H, W) bool, True for pixels to generate.

    Source: paper, Table 2.
    """
    (rows, columns), (height, width) = tokenizer.grid, height_width(tokenizer.image_size)
    hidden = torch.zeros(rows, columns, dtype=torch.bool)  # (h, w) tokens
    if task == "outpaint-right":
        hidden[:, columns // 2 :] = True
    else:
        # edge - size must be even, so that both margins are equal.
        high, wide = (max(1, edge // 2 - (edge - edge // 2) % 2) for edge in (rows, columns))
        top, left = (rows - high) // 2, (columns - wide) // 2
        hidden[top : top + high, left : left + wide] = True
    factor = tokenizer.network.config.downsampling_factor
    return pixel_region(hidden, factor=factor, height=height, width=width)


def hide_pixels(task: Task, tokenizer: PretrainedTokenizer, images: Tensor) -> Tensor:
    """Returns (n, C, H, W) uint8 images with grey in the pixels to generate."""
    return images.masked_fill(make_hidden_mask(task, tokenizer), _GREY)


def edit(
    task: Task,
    pipe: MaskGIT,
    images: Tensor,
    labels: Tensor,
    *,
    vectors: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 100,
    on_images: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Regenerates the hidden part of each image, given its class.

    Args:
        task: The part to generate.
        pipe: The model; its own decoding is used.
        images: (n, C, H, W) uint8, of the model's image size.
        labels: (n,) int64: classes of the images.
        vectors: (n, C) float: vectors of the images; None for a model without vectors.
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch of inpainting; outpainting takes one image at a time.
        on_images: Called with the number of images that were edited.

    Returns:
        (n, C, H, W) uint8.
    """
    classes: list[int] = labels.tolist()
    edited = []
    sides, factor = height_width(pipe.tokenizer.image_size), pipe.tokenizer.network.config.downsampling_factor
    # Canvases are whole tokens. An image that does not fill its last tokens is inpainted in its right half.
    if task == "outpaint-right" and not any(side % factor for side in sides):
        # Outpainting extends an image, so that the right half is cut off first.
        added = int(make_hidden_mask(task, pipe.tokenizer)[0].sum())
        for row, (image, label) in enumerate(zip(images, classes, strict=True)):
            own = None if vectors is None else vectors[row]
            edited.append(
                pipe.outpaint(
                    image[..., :-added], right=added, classes=[label], vectors=own, seed=seed + row, output_type="pt"
                )
            )
            on_images(1)
        return torch.cat([torch.as_tensor(result) for result in edited])
    known, mask = hide_pixels(task, pipe.tokenizer, images), make_hidden_mask(task, pipe.tokenizer)
    # Image i has seed + i: each batch continues the seeds of the one before.
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        edited.append(
            pipe.inpaint(
                list(known[rows]), mask, classes=classes[rows], seed=seed + first, batch_size=batch_size,
                output_type="pt", vectors=None if vectors is None else vectors[rows],
            )
        )  # fmt: skip
        on_images(len(classes[rows]))
    return torch.cat([torch.as_tensor(result) for result in edited])

"""The edited images of Table 2: the right half of held-out images is outpainted, or their centre is inpainted.

The pixels to generate are removed before the tokenizer encodes an image. Otherwise its convolutions would carry some of
them into the neighbouring tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from maskgit_pl import MaskGIT
from maskgit_pl.pipeline.regions import pixel_region
from maskgit_pl.pretrained.networks import PretrainedTokenizer

Task = Literal["outpaint-right", "inpaint-centre"]
_GREY = 128  # uint8 value of hidden pixels


def edit(
    task: Task,
    pipe: MaskGIT,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 100,
    on_images: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Regenerates the hidden part of each image, given its class. Returns (n, C, H, W) uint8.

    The model's own decoding is used. Outpainting takes one image at a time.

    Args:
        task: The part to generate.
        pipe: The model.
        images: (n, C, H, W) uint8, of the model's image size.
        labels: (n,) int64: classes of the images.
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch of inpainting.
        on_images: Called with the number of images that were edited.
    """
    classes: list[int] = labels.tolist()
    mask, edited = make_hidden_mask(task, pipe.tokenizer), []
    factor = pipe.tokenizer.token_size
    # Canvases are whole tokens. An image that does not fill its last tokens is inpainted in its right half.
    if task == "outpaint-right" and not any(side % factor for side in images.shape[-2:]):
        # Outpainting extends an image, so that the right half is cut off first.
        added = int(mask[0].sum())
        for row, label in enumerate(classes):
            left = images[row, ..., :-added]
            edited.append(pipe.outpaint(left, right=added, classes=[label], seed=seed + row, output_type="pt"))
            on_images(1)
    else:
        visible = hide_pixels(task, pipe.tokenizer, images)
        # Image i has seed + i: each batch continues the seeds of the one before.
        for first in range(0, len(images), batch_size):
            rows = slice(first, first + batch_size)
            edited.append(
                pipe.inpaint(
                    list(visible[rows]),
                    mask,
                    classes=classes[rows],
                    seed=seed + first,
                    batch_size=batch_size,
                    output_type="pt",
                )
            )
            on_images(len(classes[rows]))
    return torch.cat([torch.as_tensor(result) for result in edited])


def hide_pixels(task: Task, tokenizer: PretrainedTokenizer, images: Tensor) -> Tensor:
    """Returns (n, C, H, W) uint8 images with grey in the pixels to generate."""
    return images.masked_fill(make_hidden_mask(task, tokenizer), _GREY)


def make_hidden_mask(task: Task, tokenizer: PretrainedTokenizer) -> Tensor:
    """Returns the (H, W) bool mask of the pixels to generate: the right 50 %, or the centre of 50 % x 50 %.

    The mask consists of whole tokens. The right half is rounded up, and the centre down to a size that can be
    centred: of 7 x 7 tokens, these are 4 columns, or 3 x 3 tokens.

    Source: paper, Table 2.
    """
    (rows, columns), size = tokenizer.grid, tokenizer.image_size
    height, width = (size, size) if isinstance(size, int) else size
    hidden = torch.zeros(rows, columns, dtype=torch.bool)  # (h, w) tokens
    if task == "outpaint-right":
        hidden[:, columns // 2 :] = True
    else:
        # edge - size must be even, so that both margins are equal.
        high, wide = (max(1, edge // 2 - (edge - edge // 2) % 2) for edge in (rows, columns))
        top, left = (rows - high) // 2, (columns - wide) // 2
        hidden[top : top + high, left : left + wide] = True
    return pixel_region(hidden, factor=tokenizer.token_size, height=height, width=width)

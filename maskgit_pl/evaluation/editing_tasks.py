"""Held-out images that are edited as in the paper's Table 2: the right half outpainted, the centre inpainted.

What is to be generated is taken out of an image before anything sees it: a tokenizer that saw the hidden pixels would
carry some of them into the tokens beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained import PretrainedTokenizer

__all__ = ["Task", "edit", "hide_pixels", "make_hidden_mask"]

Task = Literal["outpaint-right", "inpaint-centre"]

_GREY = 128


def make_hidden_mask(task: Task, tokenizer: PretrainedTokenizer) -> Tensor:
    """Returns (H, W) bool, True where pixels are to be generated: the right half, or half of each edge at the centre.

    In whole tokens: the right half is rounded up, the centre down to what lies in the middle. Of 7 x 7 tokens that is
    4 columns, and 3 x 3 tokens.

    Source: paper, Table 2.
    """
    rows, columns = tokenizer.grid
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    if task == "outpaint-right":
        hidden[:, columns // 2 :] = True
    else:
        high, wide = (max(1, edge // 2 - (edge - edge // 2) % 2) for edge in (rows, columns))
        top, left = (rows - high) // 2, (columns - wide) // 2
        hidden[top : top + high, left : left + wide] = True
    factor = tokenizer.network.config.downsampling_factor
    return hidden.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


def hide_pixels(task: Task, tokenizer: PretrainedTokenizer, images: Tensor) -> Tensor:
    """Returns (n, C, H, H) uint8 images with grey in place of what is to be generated."""
    return images.masked_fill(make_hidden_mask(task, tokenizer), _GREY)


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
    """Generates the hidden part of each image anew, given its class.

    Args:
        task: Which part.
        pipe: The model, whose own decoding is followed.
        images: (n, C, H, H) uint8, of the model's size.
        labels: (n,) int64: their classes.
        seed: Image i has seed + i.
        batch_size: Images at a time, where they are inpainted.
        on_images: Called with the number of images that are done.

    Returns:
        (n, C, H, H) uint8.
    """
    classes: list[int] = labels.tolist()
    edited = []
    if task == "outpaint-right":
        added = int(make_hidden_mask(task, pipe.tokenizer)[0].sum())
        for row, (image, label) in enumerate(zip(images, classes, strict=True)):
            edited.append(
                pipe.outpaint(image[..., :-added], right=added, classes=[label], seed=seed + row, output_type="pt")
            )
            on_images(1)
        return torch.cat([torch.as_tensor(result) for result in edited])
    known, mask = hide_pixels(task, pipe.tokenizer, images), make_hidden_mask(task, pipe.tokenizer)
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        edited.append(
            pipe.inpaint(
                list(known[rows]), mask, classes=classes[rows], seed=seed + first, batch_size=batch_size,
                output_type="pt",
            )
        )  # fmt: skip
        on_images(len(classes[rows]))
    return torch.cat([torch.as_tensor(result) for result in edited])

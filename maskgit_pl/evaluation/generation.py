"""Images that are edited from real ones for a measurement, and files of accepted images.

Edited images are those of the paper's Table 2: the right half of held-out images is outpainted, or their
centre is inpainted. The pixels to generate are removed before the tokenizer encodes an image. Otherwise its
convolutions would carry some of them into the neighbouring tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from maskgit_pl.checks import height_width
from maskgit_pl.distributed import barrier, rank_and_world
from maskgit_pl.evaluation.reference import SampleFile, open_samples
from maskgit_pl.files import remove_partials, write_atomically
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.bulk import (
    BulkOptions,
    BulkPlan,
    BulkResult,
    generate_many,
    is_finished,
    make_plan,
    write_samples,
)
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.regions import pixel_region

Task = Literal["outpaint-right", "inpaint-centre"]
_SCORED_BATCH = 500  # candidates in memory at a time
_GREY = 128  # uint8 value of hidden pixels


def delete_generated(file: Path) -> None:
    """Deletes generated images, with the parts and partial files that a killed process has left of them."""
    if rank_and_world()[0] == 0:
        file.unlink(missing_ok=True)
        if file.parent.is_dir():
            remove_partials(file.parent, file.name)
        shutil.rmtree(file.with_name(f"{file.name}.parts"), ignore_errors=True)
    barrier()


def generate_accepted(
    pipe: MaskGIT,
    file: Path | str,
    options: BulkOptions,
    acceptance: Acceptance,
    *,
    on_images: Callable[[int], object] = lambda count: None,
) -> BulkResult:
    """Generates candidates into ``FILE.candidates.npz``, and writes those that are accepted to a file.

    1. Generates the candidates with ``generate_many``: several processes share them.
    2. The process that finds all of them complete scores them with the classifier.
    3. It writes the best of each class to the file, with their ``seeds`` and ``log_probs``, and deletes the candidates.

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``.
        options: See ``generate_many``; ``num_images`` is the number of accepted images.
        acceptance: Classifier and acceptance rate.
        on_images: See ``generate_many``; it counts candidates.

    Returns:
        The result of ``generate_many`` for the candidates.

    Raises:
        ValueError: if the classifier has other classes, ``num_images`` is not a multiple of the number of
            classes, or for a reason of ``generate_many``.
        FileExistsError: if the file was not written by this function.
    """
    file = Path(file)
    plan = make_plan(pipe, options)
    acceptance.check_classes(pipe.class_names, plan.classes)
    count = num_candidates(acceptance, options.num_images, len(plan.classes))
    candidates = file.with_name(f"{file.stem}.candidates.npz")
    plan = replace(plan, accept_rate=acceptance.rate, classifier=acceptance.digest)
    if is_finished(file, plan):
        return BulkResult(0)
    result = generate_many(pipe, candidates, replace(options, num_images=count), on_images=on_images)
    if result.missing_parts == 0:
        try:
            _write_accepted(file, plan, open_samples(candidates, channels=plan.image[2]), acceptance)
        except (ValueError, OSError):
            if not is_finished(file, plan):  # True if another process has written the file in the meantime
                raise
        candidates.unlink(missing_ok=True)
    return result


def num_candidates(acceptance: Acceptance, num_images: int, num_classes: int) -> int:
    """Returns the number of candidates of all classes."""
    if num_images % num_classes:
        raise ValueError(
            f"num_images must be a multiple of {num_classes}, the number of classes, with accept_rate, got {num_images}"
        )
    return num_classes * acceptance.num_candidates(num_images // num_classes)


def _write_accepted(file: Path, plan: BulkPlan, samples: SampleFile, acceptance: Acceptance) -> None:
    assert samples.labels is not None  # generate_many writes them
    scores = []
    for first, labels in enumerate(torch.split(samples.labels, _SCORED_BATCH)):
        rows = range(first * _SCORED_BATCH, first * _SCORED_BATCH + len(labels))
        scores.append(acceptance.log_probs(samples.read(rows), labels))
    log_probs = torch.cat(scores)
    counts = dict.fromkeys(plan.classes, plan.count // len(plan.classes))
    kept = acceptance.choose(log_probs, samples.labels, counts)
    parts = (samples.images[part.numpy()] for part in torch.split(kept, _SCORED_BATCH))
    arrays = {"seeds": (plan.seed + kept).numpy(), "log_probs": log_probs[kept].numpy().astype(np.float32)}
    with write_atomically(file) as stream:
        write_samples(stream, plan, parts, samples.labels[kept].numpy(), **arrays)


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
    """Regenerates the hidden part of each image, given its class. Returns (n, C, H, W) uint8.

    The model's own decoding is used. Outpainting takes one image at a time.

    Args:
        task: The part to generate.
        pipe: The model.
        images: (n, C, H, W) uint8, of the model's image size.
        labels: (n,) int64: classes of the images.
        vectors: (n, C) float: vectors of the images; None for a model without vectors.
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch of inpainting.
        on_images: Called with the number of images that were edited.
    """
    classes: list[int] = labels.tolist()
    mask, edited = make_hidden_mask(task, pipe.tokenizer), []
    sides, factor = height_width(pipe.tokenizer.image_size), pipe.tokenizer.network.config.downsampling_factor
    # Canvases are whole tokens. An image that does not fill its last tokens is inpainted in its right half.
    if task == "outpaint-right" and not any(side % factor for side in sides):
        # Outpainting extends an image, so that the right half is cut off first.
        added = int(mask[0].sum())
        for row, label in enumerate(classes):
            vector = None if vectors is None else vectors[row]
            left = images[row, ..., :-added]
            edited.append(
                pipe.outpaint(left, right=added, classes=[label], vectors=vector, seed=seed + row, output_type="pt")
            )
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
                    vectors=None if vectors is None else vectors[rows],
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

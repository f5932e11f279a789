"""Rejection sampling of thousands of images into one ``.npz`` file, which ranks share and a second call continues.

``generation`` and ``maskgit sample --accept-rate`` use it. See ``pipeline.acceptance`` for the rule.

The editing tasks of the paper's Table 2: outpaint the right half of held-out images, or inpaint their centre.

The pixels to generate are removed before the tokenizer encodes an image. Otherwise its convolutions would carry some of
them into the neighbouring tokens. ``Evaluator.measure_editing`` uses it.

Generation of the images of a measurement into a file, which ranks share and a restarted command continues.

``Evaluator`` uses it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import height_width
from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.distributed import barrier, rank_and_world
from maskgit_pl.evaluation.npz import SampleFile, open_samples
from maskgit_pl.files import write_atomically
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.bulk import (
    BulkOptions,
    BulkPlan,
    BulkResult,
    generate_many,
    is_finished,
    make_plan,
    remove_samples,
    write_samples,
)
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.options import read_options
from maskgit_pl.pipeline.regions import pixel_region

__all__ = [
    "GeneratedImages",
    "Task",
    "candidates_file",
    "delete_generated",
    "edit",
    "generate_accepted",
    "generate_images",
    "hide_pixels",
    "make_hidden_mask",
    "num_candidates",
]

_BATCH = 500  # images in memory at a time


def candidates_file(file: Path) -> Path:
    """Returns the path of the candidates of a file of accepted images."""
    return file.with_name(f"{file.stem}.candidates.npz")


def num_candidates(acceptance: Acceptance | None, num_images: int, num_classes: int) -> int:
    """Returns the number of candidates of all classes: without rejection sampling, that of the images.

    Raises:
        ValueError: if the images are not evenly spread over the classes.
    """
    if acceptance is None:
        return num_images
    if num_images % num_classes:
        raise ValueError(
            f"num_images must be a multiple of {num_classes}, the number of classes, with accept_rate, got {num_images}"
        )
    return num_classes * acceptance.num_candidates(num_images // num_classes)


def generate_accepted(
    pipe: MaskGIT,
    file: Path | str,
    acceptance: Acceptance,
    *,
    on_scored: Callable[[int], object] = lambda count: None,
    **options: Any,
) -> BulkResult:
    """Generates candidates into ``FILE.candidates.npz``, and writes those that are accepted to a file.

    1. Generates the candidates with ``generate_many``: several processes share them, and a second call resumes.
    2. The process that finds all of them complete scores them with the classifier.
    3. It writes the best of each class to the file, with their ``seeds`` and ``log_probs``, and deletes the candidates.

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``. ``num_images`` is the number of accepted images in it.
        acceptance: Classifier and acceptance rate.
        on_scored: Called after each batch with its number of scored candidates.
        options: See ``generate_many``; its callbacks count candidates.

    Returns:
        The result of ``generate_many`` for the candidates, with the path of the file. Without missing parts, the file
        is complete.

    Raises:
        ValueError: if the classifier has other classes, ``num_images`` is not a multiple of the number of classes, or
            for a reason of ``generate_many``.
        FileExistsError: if the file was not written by this function.
    """
    file = Path(file)
    acceptance.check_classes(pipe.class_names)
    given = {name: value for name, value in options.items() if not name.startswith("on_")}
    bulk, decoding = read_options(BulkOptions, given, pipe.decoding)
    plan = make_plan(pipe, bulk, decoding)
    if max(plan.classes) >= len(pipe.class_names):
        raise ValueError("classes must not be None with accept_rate, which ranks by the class; name a class")
    count = num_candidates(acceptance, bulk.num_images, len(plan.classes))
    candidates, candidates_plan = candidates_file(file), replace(plan, count=count)
    plan = replace(plan, accept_rate=acceptance.rate, classifier=acceptance.digest)
    if is_finished(file, plan):
        remove_samples(candidates, candidates_plan)  # left by a run that was killed in step 3
        return BulkResult(file, 0, count, 0)
    result = generate_many(pipe, candidates, **{**options, "num_images": count})
    if result.missing_parts == 0:
        try:
            samples = open_samples(candidates)
            _write_accepted(file, plan, samples, acceptance, on_scored)
        except (ValueError, OSError):
            if not is_finished(file, plan):  # True if another process has written the file in the meantime
                raise
        with suppress(FileNotFoundError):
            candidates.unlink()
    return replace(result, file=file)


def _write_accepted(
    file: Path, plan: BulkPlan, samples: SampleFile, acceptance: Acceptance, on_scored: Callable[[int], object]
) -> None:
    """Scores the candidates of a file, and writes the accepted ones."""
    assert samples.labels is not None  # generate_many writes them
    channels = cast("Literal[1, 3]", plan.image[2])
    scores = []
    for first in range(0, len(samples), _BATCH):
        rows = range(first, min(first + _BATCH, len(samples)))
        scores.append(
            acceptance.log_probs(samples.read(rows, channels=channels), samples.labels[rows.start : rows.stop])
        )
        on_scored(len(rows))
    log_probs = torch.cat(scores)
    kept: Tensor = acceptance.choose(
        log_probs, samples.labels, dict.fromkeys(plan.classes, plan.count // len(plan.classes))
    )
    parts = (samples.images[part.numpy()] for part in torch.split(kept, _BATCH))
    arrays = {"seeds": (plan.seed + kept).numpy(), "log_probs": log_probs[kept].numpy().astype(np.float32)}
    with write_atomically(file) as stream:
        write_samples(stream, plan, parts, samples.labels[kept].numpy(), **arrays)


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


_PART = 250  # images per part file; a killed command loses at most one part per rank


@dataclass(frozen=True)
class GeneratedImages:
    """Generated images in a file.

    Args:
        file: File of the images, which are read on demand.
        channels: Channels of an image.
        labels: (n,) int64: requested classes, in ascending order.
        seconds_per_image: Wall-clock seconds of this rank per image, for tokens and pixels; None if the images already
            existed.
        steps_taken: Mean number of steps in which an image still had masked tokens, over this rank's images. It is T
            unless the token selector may finish early. None if the images already existed, or the model is
            autoregressive.
    """

    file: SampleFile
    channels: Literal[1, 3]
    labels: Tensor
    seconds_per_image: float | None
    steps_taken: float | None = None

    def read(self, rows: range) -> Tensor:
        """Returns the (b, C, H, W) uint8 images of a range of rows."""
        return self.file.read(rows, channels=self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        return (self.channels, *self.file.images.shape[1:3])

    def read_at(self, rows: Tensor) -> Tensor:
        """Reads the images of some rows.

        It reads the file instead of its memory map, because pages of a map count as memory of this process until the
        system evicts them.

        Args:
            rows: (b,) int64, in any order.

        Returns:
            (b, C, H, W) uint8.

        Raises:
            ValueError: if the file is shorter than before.
        """
        images = self.file.images
        if not isinstance(images, np.memmap):  # a compressed file is in memory already
            found = np.array(images[rows.numpy()])
        else:
            found = np.empty((len(rows), *images.shape[1:]), np.uint8)
            with open(self.file.path, "rb", buffering=0) as file:
                # The images lie one after another; each is read directly into its row of the result.
                for place, row in zip(found, rows.tolist(), strict=True):
                    file.seek(images.offset + row * place.nbytes)
                    if file.readinto(place.data) != place.nbytes:
                        raise ValueError(f"samples {self.file.path} must not be truncated while it is read")
        return rearrange(torch.from_numpy(found), "b h w c -> b c h w")[:, : self.channels]


def generate_images(
    pipe: MaskGIT,
    file: Path,
    decoding: DecodingConfig,
    *,
    num_images: int,
    seed: int = 0,
    batch_size: int = 100,
    acceptance: Acceptance | None = None,
    on_images: Callable[[int], object] = lambda count: None,
) -> GeneratedImages:
    """Generates images of all classes, evenly distributed. Images in the file or in its parts are kept.

    Args:
        pipe: The model.
        file: Path of the ``.npz`` file, see ``pipeline.bulk.generate_many``; the ranks share the work.
        decoding: Decoding of all images.
        num_images: Number of images of all ranks.
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch.
        acceptance: Rejection sampling; None for all images. Times and ``on_images`` then count all candidates.
        on_images: Called first with the number of images that this rank found, then after each batch with its number.

    Raises:
        ValueError: see ``generate_many``, e.g. if the file holds images of other settings.
        FileExistsError: if the file is not one of generated images.
    """
    rank, world_size = rank_and_world()
    taken = 0

    def count_steps(step: DecodingStep) -> None:
        nonlocal taken
        taken += int(step.was_masked.any(1).sum())  # images that still had a masked token before the step

    start = time.perf_counter()
    make = generate_many if acceptance is None else partial(generate_accepted, acceptance=acceptance)
    result = make(
        pipe,
        file,
        num_images=num_images,
        seed=seed,
        part_size=_PART,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        on_start=lambda count, found: on_images(found),
        on_images=on_images,
        on_step=count_steps,
        decoding=decoding,
    )
    seconds = time.perf_counter() - start
    barrier()  # the last rank to finish has assembled the file from the parts
    samples = open_samples(file)
    assert samples.labels is not None  # generate_many writes them
    channels = cast("Literal[1, 3]", pipe.tokenizer.network.config.in_channels)
    # Times and steps are those of images that this call made; images from an earlier call have none.
    if not result.made:
        return GeneratedImages(samples, channels, samples.labels, None)
    each = seconds / result.made * num_candidates(acceptance, num_images, len(pipe.class_names)) / num_images
    return GeneratedImages(samples, channels, samples.labels, each, taken / result.made)


def delete_generated(file: Path) -> None:
    """Deletes generated images, their candidates and all parts; the same model, decoding and seed make them again."""
    if rank_and_world()[0] == 0:
        for each in (file, candidates_file(file)):
            each.unlink(missing_ok=True)
            shutil.rmtree(each.with_name(f"{each.name}.parts"), ignore_errors=True)
    barrier()

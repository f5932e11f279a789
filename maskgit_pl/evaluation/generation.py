"""Generation of the images of a measurement into a file, which ranks share and a restarted command continues.

``Evaluator`` uses it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.distributed import barrier, rank_and_world
from maskgit_pl.evaluation.acceptance import candidates_file, generate_accepted, num_candidates
from maskgit_pl.evaluation.npz import SampleFile, open_samples
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.bulk import generate_many

__all__ = ["GeneratedImages", "delete_generated", "generate_images"]

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

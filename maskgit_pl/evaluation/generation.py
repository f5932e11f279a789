"""The images that a measurement needs: generated into a file, which a killed command goes on with and ranks share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.distributed import barrier, rank_and_world
from maskgit_pl.evaluation.npz import SampleFile, open_samples
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import generate_many

__all__ = ["GeneratedImages", "delete_generated", "generate_images"]

_PART = 250  # images: what is lost at most where the command is killed


@dataclass(frozen=True)
class GeneratedImages:
    """Generated images.

    Args:
        file: Where they are; read as they are needed.
        channels: 1 or 3.
        labels: (n,) int64: the classes asked for, class by class.
        seconds_per_image: Wall clock of one rank, tokens and pixels; None where the images were there already.
        steps_taken: Steps in which an image still had masked tokens, the mean over this rank's images: T unless the
            token selector may end early. None where the images were there already, or the model is autoregressive.
    """

    file: SampleFile
    channels: Literal[1, 3]
    labels: Tensor
    seconds_per_image: float | None
    steps_taken: float | None = None

    def read(self, rows: range) -> Tensor:
        """Reads images: (b, C, H, W) uint8."""
        return self.file.read(rows, channels=self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of an image."""
        return (self.channels, *self.file.images.shape[1:3])

    def read_at(self, rows: Tensor) -> Tensor:
        """Reads the images of any numbers (b,) int64: (b, C, H, W) uint8.

        They are read from the file, not from its mapping: pages of a mapping count as memory of this process for as
        long as the system leaves them there.
        """
        images = self.file.images
        if not isinstance(images, np.memmap):  # a compressed file is in memory already
            found = np.array(images[rows.numpy()])
        else:
            found = np.empty((len(rows), *images.shape[1:]), np.uint8)
            with open(self.file.path, "rb", buffering=0) as file:
                for place, row in zip(found, rows.tolist(), strict=True):
                    file.seek(images.offset + row * place.nbytes)
                    if file.readinto(place.data) != place.nbytes:
                        raise ValueError(f"samples {self.file.path} must not be cut while it is read")
        return rearrange(torch.from_numpy(found), "b h w c -> b c h w")[:, : self.channels]


def generate_images(
    pipe: MaskGIT,
    file: Path,
    decoding: DecodingConfig,
    *,
    num_images: int,
    seed: int = 0,
    batch_size: int = 100,
    on_images: Callable[[int], object] = lambda count: None,
) -> GeneratedImages:
    """Generates images of all classes, spread evenly; those in the file, or in its parts, are not made again.

    Args:
        pipe: The model.
        file: ``.npz``, as ``pipeline.bulk.generate_many`` writes it; the ranks share the work.
        decoding: How images are decoded.
        num_images: How many.
        seed: Image i has seed + i.
        batch_size: Images at a time.
        on_images: Called with the number of images that this rank has, those that were there before among them.

    Raises:
        ValueError: see ``generate_many``; the file holds other images, for one.
        FileExistsError: The file holds something else.
    """
    rank, world_size = rank_and_world()
    taken = 0

    def count_steps(step: DecodingStep) -> None:
        nonlocal taken
        taken += int(step.was_masked.any(1).sum())

    start = time.perf_counter()
    result = generate_many(
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
    barrier()  # the last one to finish its share has put the file together
    samples = open_samples(file)
    assert samples.labels is not None  # generate_many writes them
    channels: Literal[1, 3] = 1 if pipe.tokenizer.network.config.in_channels == 1 else 3
    if not result.made:
        return GeneratedImages(samples, channels, samples.labels, None)
    return GeneratedImages(samples, channels, samples.labels, seconds / result.made, taken / result.made)


def delete_generated(file: Path) -> None:
    """Takes generated images away, complete or not; they are a function of the model and the seed."""
    if rank_and_world()[0] == 0:
        file.unlink(missing_ok=True)
        shutil.rmtree(file.with_name(f"{file.name}.parts"), ignore_errors=True)
    barrier()

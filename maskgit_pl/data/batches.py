"""The batches that the data modules make and the LightningModules take, in a module that imports almost nothing else.

Images stay uint8 until they are on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from maskgit_pl.randomness import random_uniform

if TYPE_CHECKING:
    from maskgit_pl.masking import Draws

_NONE_REPLACED = torch.tensor(-1)


class Batch(NamedTuple):
    """The samples of one rank for one micro-batch.

    Args:
        content: Images (B, C, H, W) uint8, or tokens (B, N) int64.
        labels: (B,) int64, in [0, num_classes).
        index: (B,) int64, number of each sample in its split. Random numbers of a sample depend on it.
        epoch: (B,) int64, number of earlier passes of the stream through the split.
        position: (B,) int64, position in the stream: step * global batch + slot.
        valid: (B,) bool; False for a row that only fills up the last validation batch.
        replacement: (B,) int64, number of the sample that is shown, with its label, in place of an unreadable
            one; -1 if the sample itself is shown.
        vectors: (B, C) float32, vector of each sample shown; None if the samples have none.
        draws: The random draws of a training step for these samples; None before the module has made them.
    """

    content: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    epoch: Tensor
    position: Tensor
    valid: Tensor
    replacement: Tensor = _NONE_REPLACED
    vectors: Tensor | None = None
    draws: Draws | None = None

    @property
    def step_draws(self) -> Draws:
        """The random draws of the step, after the module has made them."""
        assert self.draws is not None
        return self.draws

    def vectors_for(self, condition_dim: int) -> Tensor | None:
        """Returns the vectors for a network with conditioning vectors of a given size.

        Args:
            condition_dim: Size C of the vectors of the network; 0 for a network without vectors.

        Returns:
            (B, C) float32; None for a network without vectors.

        Raises:
            ValueError: if the batch has no vectors, or vectors of another size.
        """
        dim = 0 if self.vectors is None else self.vectors.shape[1]
        if condition_dim not in (0, dim):
            raise ValueError(
                f"condition_dim of the network must be {dim}, the size of the vectors of the data, got "
                f"{condition_dim}; the third item of a sample of ``IndexedDataset`` is its vector"
            )
        return self.vectors if condition_dim else None


def check_batch(batch: Batch, *, shape: tuple[int, ...]) -> None:
    """Checks that a batch has the samples that a module was built for.

    Args:
        batch: The batch that the Trainer passes.
        shape: Shape of the content of each sample: (C, H, W) of images, or (N,) of tokens.
    """
    if not isinstance(batch, Batch):
        raise TypeError(
            "the data must be a data module of maskgit_pl.data, whose batches have the indices of their samples, got "
            f"batches of the type {type(batch).__name__}; use IndexedDataModule(IndexedDataset(dataset, ...))"
        )
    if tuple(batch.content.shape[1:]) != shape:
        raise ValueError(
            f"samples of the data must have the shape {shape} of the model, got {tuple(batch.content.shape[1:])}; set "
            "image_size and in_channels of the data, or build the model for them"
        )


def flip(images: Tensor, *, probability: float, seed: int, index: Tensor, epoch: Tensor) -> Tensor:
    """Mirrors random images of a batch horizontally; the choice depends only on (seed, index, epoch).

    Args:
        images: (B, C, H, W), any dtype, any device.
        probability: Probability that an image is mirrored, in [0, 1].
        seed: Seed of the run, in [0, 2**32).
        index: (B,) int64, ``index`` of the batch.
        epoch: (B,) int64, ``epoch`` of the batch.

    Returns:
        (B, C, H, W) of the same dtype.
    """
    # Integer arithmetic without rounding, so the choice is the same on any device.
    chosen = random_uniform("flip", seed=seed, index=index, epoch=epoch)[:, 0] < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)

"""Batches from any map-style ``torch.utils.data.Dataset`` of images or tokens, labels and vectors, for both stages.

Used from Python, with a plain ``lightning.Trainer``, for data that are not in shards. The samples of a step
and their random numbers are the same for any number of ranks, workers and micro-batches, and after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskgit_pl.checks import ImageSize, check_channels, check_image_size, check_integer, check_seed, height_width
from maskgit_pl.data.augmentations import Augmentations, build_augmentations
from maskgit_pl.data.batches import Batch
from maskgit_pl.data.images import from_pil
from maskgit_pl.data.loader import StepDataModule, make_loader
from maskgit_pl.data.order import BATCH_SIZE_RANGE, InOrder, Order, ShuffledStream
from maskgit_pl.text import shorten


@dataclass(frozen=True)
class IndexedDataset(Dataset[Batch]):
    """A dataset of batches of a map-style dataset, converted and cropped in the same way as images of shards.

    Args:
        dataset: A dataset with ``len(dataset)`` samples; ``dataset[i]`` is (image, label) or (image, label, vector). An
            image is a PIL image, a uint8 tensor (C, H, W) or (H, W), or a uint8 array (H, W) or (H, W, C); or, with
            ``image_size`` None, the tokens of any tokenizer: integers in the shape of the token grid, or (N,). A label
            is an int. A vector, a tensor or array (V,) of finite numbers such as an embedding of a caption, conditions
            a network of ``condition_dim`` V in stage 2; either all items have one of this size or none has. An item
            must depend only on its index: with random transforms, a resumed run would differ.
        image_size: Side of square images, or (height, width), in pixels; the largest part of this shape is
            cropped and resized. None for tokens, for stage 2 only.
        in_channels: 1 for grey, 3 for RGB; images are converted, and alpha is over white.
        order: Maps positions of the stream to samples; ``IndexedDataModule`` sets it. None keeps the dataset's order.
        seed: Seed of the augmentations; ``IndexedDataModule`` sets it.
        augmentations: Names or mappings of registered augmentations, functions of (seed, index, epoch); None
            for the central crop.
    """

    dataset: Dataset[Any]
    image_size: ImageSize | None
    in_channels: int = 3
    order: Order | None = None
    seed: int = 0
    augmentations: list[str | dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        _ = self._built
        check_channels("in_channels", self.in_channels)
        if self.image_size is not None:
            # The dataclass is frozen: a plain assignment would raise an error.
            object.__setattr__(self, "image_size", check_image_size("image_size", self.image_size, "[1, 8192]"))
        elif self.augmentations:
            raise ValueError(
                f"augmentations must be None for tokens (image_size None), got {shorten(self.augmentations)}"
            )

    @cached_property
    def _built(self) -> Augmentations:
        return build_augmentations(self.augmentations)

    def __len__(self) -> int:
        return len(cast("Sized", self.dataset))

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; content is (B, in_channels, H, W) uint8, or tokens (B, N) int64."""
        rows = (InOrder(len(self)) if self.order is None else self.order)(positions)
        images, labels, vectors = list[Tensor](), list[int](), list[Tensor]()
        drawn = self._built.draw(rows.index, rows.epoch, seed=self.seed)
        for index, augment in zip(rows.index.tolist(), drawn, strict=True):
            name = f"sample {index}"
            image, label, *vector = _check_item(self.dataset[index], name=name)
            if self.image_size is None:
                images.append(_to_tokens(image, name=name))
            else:
                pixels = _to_pixels(image, channels=self.in_channels, name=name)
                images.append(augment(pixels, height_width(self.image_size)))
            labels.append(_to_label(label, name=name))
            vectors += [_to_vector(values, name=name) for values in vector]
            if len(vectors) not in (0, len(images)):
                raise ValueError(f"{name}: either all items of the data set must have a vector or none")
        replacement = torch.full_like(rows.index, -1)
        return Batch(
            torch.stack(images),
            torch.tensor(labels),
            *rows,
            replacement=replacement,
            vectors=torch.stack(vectors) if vectors else None,
        )


class IndexedDataModule(StepDataModule):
    """A LightningDataModule of map-style datasets, for a plain ``lightning.Trainer``.

    A step has ``global_batch`` samples, which depend only on (seed, step), divided among ranks and micro-batches:
    ``Trainer(accumulate_grad_batches=)`` in stage 2, ``Tokenizer(accumulation=)`` in stage 1. On several devices, build
    the Trainer with ``use_distributed_sampler=False``.

    Args:
        train: Training samples; their ``order`` and ``seed`` are replaced.
        validation: Validation samples, each used once; None for no validation (``Trainer(limit_val_batches=0)``).
        global_batch: Number of samples per step, over all ranks and micro-batches.
        validation_batch: Number of samples of a validation batch on each rank.
        num_workers: Number of worker processes on each rank; 0 reads in the training process.
        seed: Seed of the order and of random crops, in [0, 2**32).

    Raises:
        TypeError: if the samples are no ``IndexedDataset``.
        ValueError: if a number is out of range.

    Example::

        images = torchvision.datasets.FashionMNIST("data", download=True)
        data = IndexedDataModule(IndexedDataset(images, image_size=28, in_channels=1), global_batch=64)
        lightning.Trainer(max_steps=1000, limit_val_batches=0).fit(module, datamodule=data)
    """

    def __init__(
        self,
        train: IndexedDataset,
        validation: IndexedDataset | None = None,
        *,
        global_batch: int = 256,
        validation_batch: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("global_batch", global_batch, BATCH_SIZE_RANGE)
        check_integer("validation_batch", validation_batch, BATCH_SIZE_RANGE)
        check_seed("seed", seed)
        for samples in (train, validation):
            if not isinstance(samples, IndexedDataset | None):
                raise TypeError(
                    f"train and validation must be an IndexedDataset, got a {type(samples).__name__}; give "
                    "IndexedDataset(dataset, image_size=...)"
                )
        # Validation keeps the dataset's order, with central or random crops as given.
        self.train = replace(train, order=ShuffledStream(len(train), seed), seed=seed)
        self.validation = None if validation is None else replace(validation, order=None)
        self.global_batch = global_batch
        self.validation_batch = validation_batch
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the micro-batches of this rank, from the Trainer's step to the end of the epoch.

        Raises:
            ValueError: if the batch cannot be divided evenly among ranks and micro-batches.
        """
        trainer, accumulation = self.trainer, 1
        if trainer is not None:
            accumulation = getattr(trainer.lightning_module, "accumulation", trainer.accumulate_grad_batches)
        # The Trainer knows the number of ranks only now, so the division is checked here.
        per_device, rest = divmod(self.global_batch, self._world_size * accumulation)
        if rest:
            raise ValueError(
                f"global_batch must be a multiple of {self._world_size} ranks x {accumulation} micro-batches, got "
                f"{self.global_batch}"
            )
        order = self._train_order(len(self.train), per_device=per_device, accumulation=accumulation)
        return make_loader(self.train, order, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Returns this rank's batches, each sample once over all ranks; an empty list without validation samples."""
        if self.validation is None:
            return []
        order = self._eval_order(len(self.validation), per_device=self.validation_batch)
        return make_loader(self.validation, order, num_workers=self.num_workers)


def _check_item(item: Any, *, name: str) -> Sequence[Any]:
    """Returns an item that is an image, a label and maybe a vector; raises TypeError for other items."""
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise TypeError(
            f"{name}: an item of the data set must be (image, label) or (image, label, vector), got a "
            f"{type(item).__name__}; wrap the data set in one that returns such tuples"
        )
    return item


def _to_label(label: Any, *, name: str) -> int:
    """Converts an integer of Python, NumPy or torch to an int that is not negative."""
    number = label.item() if hasattr(label, "item") else label
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{name}: the label must be an integer >= 0, the number of its class, got {shorten(label)}")
    return number


def _to_vector(vector: Any, *, name: str) -> Tensor:
    """Converts a tensor, an array or a list to (V,) float32."""
    values = torch.as_tensor(vector, dtype=torch.float32)
    if values.ndim != 1 or not values.isfinite().all():
        raise ValueError(f"{name}: the vector must be finite numbers of one dimension, got {shorten(vector)}")
    return values


def _to_tokens(tokens: Any, *, name: str) -> Tensor:
    """Converts integers in the shape of a token grid, a tensor, an array or a list, to (N,) int64."""
    values = np.asarray(tokens)
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name}: tokens must be integers, got {values.dtype}; for images, give image_size")
    return torch.from_numpy(values.astype(np.int64)).flatten()


def _to_pixels(image: Any, *, channels: int, name: str) -> Tensor:
    """Converts an image of any supported type to (channels, H, W) uint8."""
    if isinstance(image, Tensor):  # to (H, W) or (H, W, C), the layout of arrays
        image = (image if image.ndim < 3 else image.movedim(0, -1)).cpu().numpy()
    if isinstance(image, np.ndarray):
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 2, 3, 4))
        if image.dtype != np.uint8 or not is_image:
            raise TypeError(
                f"{name}: a tensor must be uint8 of the shape (H, W) or (C, H, W), an array (H, W) or (H, W, C), with "
                f"1 to 4 channels, got {image.dtype} and, with channels last, the shape {image.shape}; convert floats "
                "in [0, 1] by (255 * x).round() to uint8"
            )
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    if not isinstance(image, Image.Image) or image.mode == "F":  # PIL would clip floats in [0, 1] to black
        raise TypeError(
            f"{name}: an image must be a PIL image of integers, a uint8 tensor or a uint8 array, got {shorten(image)}"
        )
    return from_pil(image, channels=channels, name=name)

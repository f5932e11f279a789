"""The registry of augmentations: crops and flips of training images, which a recipe lists in ``data.augmentations``.

They are applied in the order of the list to the decoded image. What is left is cropped at the centre and resized to the
size of the model, which changes nothing after a crop. The random numbers of an image are a function of (seed, index,
epoch) and the name of the augmentation, so ranks, workers, batches and resuming do not change them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from maskgit_pl.checks import check_number
from maskgit_pl.data.images import fit_image, resize
from maskgit_pl.randomness import random_uniform
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.text import shorten

Augment = Callable[[Tensor, tuple[int, int]], Tensor]
"""A function of an image (C, h, w) uint8 and the size (H, W) of the model's images, which returns an image."""

_ATTEMPTS = 10  # Source: torchvision.transforms.RandomResizedCrop


class Augmentation(ABC):
    """The base of registered augmentations: a frozen dataclass of the values in a recipe, and a function of an image.

    Attributes:
        num_random: Number of random numbers for each image.
    """

    num_random: ClassVar[int] = 0

    @abstractmethod
    def __call__(self, image: Tensor, random: Sequence[float], *, size: tuple[int, int]) -> Tensor:
        """Returns the augmented image. It must not change ``image`` itself.

        Args:
            image: (C, h, w) uint8 of any size, with C = 1 or 3.
            random: ``num_random`` numbers in (0, 1), uniform; the same whenever the image is seen in the same epoch.
            size: Height and width of the model's images, for augmentations that crop and resize.

        Returns:
            (C, h', w') uint8.
        """


def _check(name: str, augmentation: Augmentation) -> None:
    derives_from(Augmentation)(name, augmentation)
    image = torch.arange(105, dtype=torch.uint8).view(3, 5, 7)
    result = augmentation(image.clone(), [0.5] * augmentation.num_random, size=(4, 4))
    if not isinstance(result, Tensor) or result.dtype != torch.uint8 or result.ndim != 3 or len(result) != 3:
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else shorten(result)
        raise ValueError(f"augmentation {name!r} must return a uint8 image (3, h, w) for one of (3, 5, 7), got {got}")


augmentations: Registry[Augmentation] = Registry("augmentation", "maskgit_pl.augmentations", check=_check)


@augmentations.register("random_crop")
@dataclass(frozen=True)
class RandomCrop(Augmentation):
    """The largest part of the model's shape, anywhere: resize until the model's shape fits in, then crop."""

    num_random: ClassVar[int] = 2

    def __call__(self, image: Tensor, random: Sequence[float], *, size: tuple[int, int]) -> Tensor:
        return fit_image(image, image_size=size, crop=(random[0], random[1]))


@augmentations.register("random_resized_crop")
@dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """A part of random area and shape, anywhere, resized to the model's size.

    1. Draw the share s of the area from U(scale), and the ratio r of width to height, divided by that of the
       model's images, from exp(U(log(ratio))).
    2. If the part of width sqrt(s h w r) and height sqrt(s h w / r) fits in, take one anywhere.
    3. After 10 attempts, take the largest part at the centre whose ratio is in the range.

    Args:
        scale: Least and largest share of the area, in (0, 1].
        ratio: Least and largest ratio, in (0, 100].

    Source: Inception, arXiv:1409.4842, section 6; defaults and steps of torchvision.transforms.RandomResizedCrop.
    """

    num_random: ClassVar[int] = 4 * _ATTEMPTS

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for name, most in (("scale", 1), ("ratio", 100)):
            low, high = getattr(self, name)
            check_number(name, low, f"(0, {most}]")
            check_number(name, high, f"[{low}, {most}]")

    def __call__(self, image: Tensor, random: Sequence[float], *, size: tuple[int, int]) -> Tensor:
        top, left, height, width = self.box(image.shape[-2], image.shape[-1], random, size=size)
        part = image[:, top : top + height, left : left + width]
        return part if (height, width) == size else resize(part, size)

    def box(
        self, height: int, width: int, random: Sequence[float], *, size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of the part of an image of the given height and width."""
        shape = size[1] / size[0]
        low, high = (math.log(bound) for bound in self.ratio)
        for start in range(0, self.num_random, 4):
            area, ratio, top, left = random[start : start + 4]
            pixels = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))  # 1.
            drawn = shape * math.exp(low + ratio * (high - low))
            rows, columns = round(math.sqrt(pixels / drawn)), round(math.sqrt(pixels * drawn))
            if 0 < columns <= width and 0 < rows <= height:  # 2.
                return int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns
        return self._central_box(height, width, shape)  # 3.

    def _central_box(self, height: int, width: int, shape: float) -> tuple[int, int, int, int]:
        rows, columns = height, width
        if width / height < shape * self.ratio[0]:
            rows = max(1, round(width / (shape * self.ratio[0])))
        elif width / height > shape * self.ratio[1]:
            columns = max(1, round(height * shape * self.ratio[1]))
        return (height - rows) // 2, (width - columns) // 2, rows, columns


@augmentations.register("flip")
@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirrors an image left to right with a probability, in [0, 1]. Leave it out for digits and letters.

    Args:
        probability: The probability.
    """

    num_random: ClassVar[int] = 1

    probability: float = 0.5

    def __post_init__(self) -> None:
        check_number("probability", self.probability, "[0, 1]")

    def __call__(self, image: Tensor, random: Sequence[float], *, size: tuple[int, int]) -> Tensor:
        return image.flip(-1) if random[0] < self.probability else image


_STREAMS = {"random_crop": "crop", "flip": "flip"}  # of randomness


@dataclass(frozen=True)
class Augmentations:
    """The augmentations of a recipe."""

    parts: Mapping[str, Augmentation]  # by name, in the order in which they are applied

    def draw(self, index: Tensor, epoch: Tensor, *, seed: int) -> list[Augment]:
        """Draws the random numbers of images, and returns a function for each image.

        Args:
            index: (B,) int64, number of each sample.
            epoch: (B,) int64, epoch of each sample.
            seed: Seed, in [0, 2**32).
        """
        given: dict[str, Any] = {"seed": seed, "index": index, "epoch": epoch}
        columns = []
        for name, part in self.parts.items():
            stream, count = _STREAMS.get(name, f"augmentation/{name}"), part.num_random
            columns.append(random_uniform(stream, **given, count=count).tolist() if count else [[]] * len(index))
        rows: list[tuple[list[float], ...]] = list(zip(*columns, strict=True)) if columns else [()] * len(index)
        return [partial(self._apply, row) for row in rows]

    def _apply(self, random: Sequence[Sequence[float]], image: Tensor, size: tuple[int, int]) -> Tensor:
        for part, numbers in zip(self.parts.values(), random, strict=True):
            image = part(image, numbers, size=size)
        return fit_image(image, image_size=size, crop=None)


CENTER = Augmentations({})
"""No augmentation: the central part of each image."""


def build_augmentations(specs: Sequence[str | Mapping[str, Any]] | None) -> Augmentations:
    """Builds the augmentations of a recipe.

    Args:
        specs: Names and mappings, ``data.augmentations``; None for the central crop only.
    """
    if specs is None:
        return CENTER
    built = [augmentations.build(spec) for spec in specs]
    names = [spec if isinstance(spec, str) else str(spec["name"]) for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"augmentations must be different, got {shorten(names)}")
    return Augmentations(dict(zip(names, built, strict=True)))

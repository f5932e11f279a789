"""Requests to ``MaskGIT`` after their checks: results with labels and seeds, and images with what is to be edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from maskgit_pl import editing
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.editing import ImageLike, MaskLike
from maskgit_pl.pipeline.classes import Classes
from maskgit_pl.pipeline.options import EditOptions, GenerateOptions, StepCallback, seed_list
from maskgit_pl.pretrained import PretrainedTokenizer
from maskgit_pl.text import printable

__all__ = ["Edit", "Request", "rows_by_first_step", "slices"]


@dataclass(frozen=True)
class Request:
    """A decoding to be made.

    Attributes:
        labels: Label of each result.
        seeds: Its seed, in [0, 2**32).
        negative_labels: Label that guidance pushes it away from; None is "no class".
        decoding: How all of them are decoded.
        batch_size: Results decoded at a time.
        callback: Called after each step of each batch.
    """

    labels: list[int]
    seeds: list[int]
    negative_labels: list[int] | None
    decoding: DecodingConfig
    batch_size: int
    callback: StepCallback | None

    @classmethod
    def of(
        cls,
        classes: Classes,
        options: GenerateOptions,
        decoding: DecodingConfig,
        *,
        class_ids: Callable[[Classes], list[int]],
    ) -> Request:
        """Reads the arguments of ``MaskGIT.generate``; errors as there.

        Args:
            classes: Classes of the results, as indices or names.
            options: Seeds, negative classes, batch size and callback.
            decoding: How to decode.
            class_ids: Maps indices and names to labels.
        """
        labels = class_ids(classes)
        negative = options.negative_classes
        if negative is not None:
            negative = [negative] * len(labels) if isinstance(negative, int | str) else list(negative)
            if len(negative) != len(labels):
                raise ValueError(
                    f"negative_classes: one, or one for each of the {len(labels)} classes, is needed, got "
                    f"{len(negative)}"
                )
        return cls(
            labels,
            seed_list(options.seed, len(labels)),
            None if negative is None else class_ids(negative),
            decoding,
            options.batch_size,
            options.callback,
        )

    def batches(self) -> list[list[int]]:
        """Returns the numbers of the results, batch by batch."""
        count = len(self.labels)
        return [list(range(count)[part]) for part in slices(count, self.batch_size)]

    def part(self, rows: Sequence[int], *, seeds: Sequence[int] | None = None) -> Request:
        """Returns the request for some of the results, with other seeds if they are given."""
        negative = None if self.negative_labels is None else [self.negative_labels[row] for row in rows]
        own = [self.seeds[row] for row in rows] if seeds is None else list(seeds)
        return replace(self, labels=[self.labels[row] for row in rows], seeds=own, negative_labels=negative)


@dataclass(frozen=True)
class Edit:
    """One image to be edited.

    Attributes:
        original: (C, H, W) uint8.
        unknown: (h, w) bool: tokens to be generated again.
        weight: (H, W) float32 in [0, 1]: share of the edited image in each pixel.
    """

    original: Tensor
    unknown: Tensor
    weight: Tensor

    @classmethod
    def all_of(
        cls,
        image: ImageLike | Sequence[ImageLike],
        mask: MaskLike | Sequence[MaskLike],
        *,
        count: int,
        tokenizer: PretrainedTokenizer,
        options: EditOptions,
    ) -> list[Edit]:
        """Returns the edits of ``MaskGIT.inpaint``: one for all ``count`` results, or one for each; errors as there."""
        dilation = 1 if options.dilation is None else options.dilation
        radius = editing.seam_radius(tokenizer.image_size) if options.blend is None else options.blend
        images, masks = _as_list("image", image, count), _as_list("mask", mask, count)
        number = max(len(images), len(masks))
        config, size = tokenizer.network.config, tokenizer.image_size
        edits = []
        for place in range(number):
            given, given_mask = images[place % len(images)], masks[place % len(masks)]
            of_place = f"image {place}" if number > 1 else "image"
            name = f"image {printable(str(given))}" if isinstance(given, str | Path) else of_place
            pixels = editing.image_pixels(given, channels=config.in_channels, name=name)
            wanted = editing.mask_pixels(given_mask, name=f"mask of {name}")
            pixels, wanted = editing.fit_to_model(pixels, wanted, image_size=size, fit=options.fit, name=name)
            unknown = editing.token_mask(wanted, factor=config.downsampling_factor, dilation=dilation)
            region = editing.pixel_region(unknown, factor=config.downsampling_factor, height=size, width=size)
            edits.append(cls(pixels, unknown, editing.seam(region, radius=radius)))
        return edits


def slices(count: int, size: int) -> Iterator[slice]:
    """Returns slices of ``count`` things, ``size`` at a time."""
    return (slice(first, first + size) for first in range(0, count, size))


def rows_by_first_step(first_steps: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields rows that are decoded together, with the step at which they start."""
    for first_step in sorted(set(first_steps)):
        rows = [row for row, own in enumerate(first_steps) if own == first_step]
        for part in slices(len(rows), batch_size):
            yield first_step, rows[part]


def _as_list(name: str, given: ImageLike | Sequence[ImageLike], count: int) -> list[ImageLike]:
    """Returns one image or mask for all results, or one for each of the ``count``, as a list."""
    if not isinstance(given, list | tuple):
        return [cast("ImageLike", given)]
    if len(given) not in (1, count):
        raise ValueError(f"{name}: one, or one for each of the {count} classes, is needed, got {len(given)}")
    return list(given)

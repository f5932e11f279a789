"""Checked requests to ``MaskGIT``: labels and seeds of the results, and the images and masks of edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import Tensor

from maskgit_pl.checks import height_width, plain_list
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.errors import printable
from maskgit_pl.pipeline.fine_tuning import PretrainedTokenizer
from maskgit_pl.pipeline.negative import NegativeModel
from maskgit_pl.pipeline.options import Classes, EditOptions, GenerateOptions, StepCallback, seed_list
from maskgit_pl.pipeline.pixels import (
    ImageLike,
    MaskLike,
    fit_to_model,
    image_pixels,
    mask_pixels,
)
from maskgit_pl.pipeline.regions import pixel_region, seam, seam_radius, token_mask

__all__ = ["Edit", "Request", "rows_by_first_step"]


@dataclass(frozen=True)
class Request:
    """The results that a call of ``MaskGIT`` generates.

    Attributes:
        labels: Label of each result.
        seeds: Seed of each result, in [0, 2**32).
        negative_labels: Label that guidance moves each result away from; None is "no class" for all.
        decoding: Decoding settings of all results.
        batch_size: Number of results decoded at a time.
        callback: Called after each decoding step of each batch.
        negative_model: Weaker model from which guidance moves away; None for guidance by classes.
        vectors: (n, C) float32, vector of each result; None for a model without vectors.
    """

    labels: list[int]
    seeds: list[int]
    negative_labels: list[int] | None
    decoding: DecodingConfig
    batch_size: int
    callback: StepCallback | None
    negative_model: NegativeModel | None = None
    vectors: Tensor | None = None

    @classmethod
    def of(
        cls,
        classes: Classes,
        options: GenerateOptions,
        decoding: DecodingConfig,
        *,
        class_ids: Callable[[Classes], list[int]],
    ) -> Request:
        """Makes the request from the arguments of ``MaskGIT.generate``, and checks them.

        Args:
            classes: Classes of the results as indices or names.
            options: Seeds, negative classes, batch size and callback.
            decoding: Decoding settings.
            class_ids: Function that maps indices and names to labels.
        """
        labels = class_ids(classes)
        return cls(
            labels,
            seed_list(options.seed, len(labels)),
            _negative_labels(options.negative_classes, len(labels), class_ids),
            decoding,
            options.batch_size,
            options.callback,
        )

    def batches(self) -> list[list[int]]:
        """Returns the indices of the results batch by batch."""
        count = len(self.labels)
        return [list(range(count)[part]) for part in _slices(count, self.batch_size)]

    def part(self, rows: Sequence[int], *, seeds: Sequence[int] | None = None) -> Request:
        """Returns the request for some of the results, with other seeds if ``seeds`` is given."""
        negative = None if self.negative_labels is None else [self.negative_labels[row] for row in rows]
        own = [self.seeds[row] for row in rows] if seeds is None else list(seeds)
        vectors = None if self.vectors is None else self.vectors[list(rows)]
        labels = [self.labels[row] for row in rows]
        return replace(self, labels=labels, seeds=own, negative_labels=negative, vectors=vectors)


@dataclass(frozen=True)
class Edit:
    """One image to edit.

    Attributes:
        original: (C, H, W) uint8 pixels.
        unknown: (h, w) bool, True where tokens are generated again.
        weight: (H, W) float32 in [0, 1], the weight of the edited image in each pixel.
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
        """Returns the edits of ``MaskGIT.inpaint`` (see there for errors): one for all results, or one for each."""
        dilation = 1 if options.dilation is None else options.dilation
        radius = seam_radius(tokenizer.image_size) if options.blend is None else options.blend
        images, masks = _as_list("image", image, count), _as_list("mask", mask, count)
        number = max(len(images), len(masks))
        config, size = tokenizer.network.config, tokenizer.image_size
        edits = []
        for place in range(number):
            # One image goes with every mask, and one mask with every image.
            given, given_mask = images[place % len(images)], masks[place % len(masks)]
            of_place = f"image {place}" if number > 1 else "image"
            name = f"image {printable(str(given))}" if isinstance(given, str | Path) else of_place
            pixels = image_pixels(given, channels=config.in_channels, name=name)
            wanted = mask_pixels(given_mask, name=f"mask of {name}")
            pixels, wanted = fit_to_model(pixels, wanted, image_size=size, fit=options.fit, name=name)
            # (H, W) mask in pixels -> (h, w) tokens -> (H, W) region in pixels, which is larger than the mask.
            unknown = token_mask(wanted, factor=config.downsampling_factor, dilation=dilation)
            height, width = height_width(size)
            region = pixel_region(unknown, factor=config.downsampling_factor, height=height, width=width)
            edits.append(cls(pixels, unknown, seam(region, radius=radius)))
        return edits


def _slices(count: int, size: int) -> Iterator[slice]:
    """Returns slices of range(``count``), each at most ``size`` long."""
    return (slice(first, first + size) for first in range(0, count, size))


def rows_by_first_step(first_steps: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields a first step and the rows that are decoded together from it, at most ``batch_size`` at a time."""
    # A batch shares its steps, so rows with different first steps cannot be in one.
    for first_step in sorted(set(first_steps)):
        rows = [row for row, own in enumerate(first_steps) if own == first_step]
        for part in _slices(len(rows), batch_size):
            yield first_step, rows[part]


def _negative_labels(
    given: int | str | Classes | None, count: int, class_ids: Callable[[Classes], list[int]]
) -> list[int] | None:
    """Returns the label that guidance moves each of ``count`` results away from; None for "no class"."""
    if given is None:
        return None
    several = plain_list(given)
    wanted = [cast("int | str", given)] * count if several is None else several
    if len(wanted) != count:
        raise ValueError(
            f"negative_classes must be one class, or one for each of the {count} classes, got {len(wanted)}"
        )
    try:
        return class_ids(wanted)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"negative_classes: {error}") from error


def _as_list(name: str, given: ImageLike | Sequence[ImageLike], count: int) -> list[ImageLike]:
    """Returns a list of one image or mask for all results, or of one for each of the ``count`` results."""
    if not isinstance(given, list | tuple):
        return [cast("ImageLike", given)]
    if len(given) not in (1, count):
        raise ValueError(f"{name} must be one {name}, or one for each of the {count} classes, got {len(given)}")
    return list(given)

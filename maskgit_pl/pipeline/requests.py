"""What was asked of ``MaskGIT``, checked: results with their labels and seeds, and images with what is to be edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from maskgit_pl import editing
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.editing import ImageLike, MaskLike
from maskgit_pl.pipeline.options import Classes, EditOptions, StepCallback, seed_list, with_settings
from maskgit_pl.pretrained import PretrainedTokenizer
from maskgit_pl.text import printable

__all__ = ["Edit", "Request", "rows_by_first_step", "slices"]


@dataclass(frozen=True)
class Request:
    """What was asked for, checked.

    Attributes:
        labels: Label of each result.
        seeds: Its seed, in [0, 2**32).
        negative_labels: What guidance pushes it away from; None is "no class".
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
        options: Mapping[str, Any],
        *,
        class_ids: Callable[[Classes], list[int]],
        decoding: DecodingConfig,
    ) -> Request:
        """Reads the options of ``MaskGIT.generate``; errors as there.

        Args:
            classes: Of the results, as ids or names.
            options: Whatever was given of ``GenerateOptions`` or ``EditOptions``.
            class_ids: From names to labels.
            decoding: The model's own, for what the options do not say.
        """
        labels = class_ids(classes)
        negative = options.get("negative_classes")
        if negative is not None:
            negative = [negative] * len(labels) if isinstance(negative, int | str) else list(negative)
            if len(negative) != len(labels):
                raise ValueError(
                    f"negative_classes: one, or one for each of the {len(labels)} classes, is needed, got "
                    f"{len(negative)}"
                )
        return cls(
            labels,
            seed_list(options.get("seed", 0), len(labels)),
            None if negative is None else class_ids(negative),
            with_settings(decoding, options),
            options.get("batch_size", 64),
            options.get("callback"),
        )

    def parts(self) -> list[list[int]]:
        """The results, batch by batch."""
        count = len(self.labels)
        return [list(range(first, min(first + self.batch_size, count))) for first in range(0, count, self.batch_size)]

    def with_seeds(self, rows: Sequence[int], seeds: list[int]) -> Request:
        """The same for some of the results, with other seeds."""
        negative = None if self.negative_labels is None else [self.negative_labels[row] for row in rows]
        return replace(self, labels=[self.labels[row] for row in rows], seeds=seeds, negative_labels=negative)


@dataclass(frozen=True)
class Edit:
    """One image to be edited.

    Attributes:
        original: (C, H, W) uint8.
        unknown: (h, w) bool: tokens to be found anew.
        weight: (H, W) float32 in [0, 1]: how much of the edited image each pixel shows.
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
        """The edits that ``MaskGIT.inpaint`` is asked for: one for all ``count`` results, or one for each.

        Errors as there.
        """
        dilation, fit, blend = options.get("dilation", 1), options.get("fit", False), options.get("blend")
        radius = editing.seam_radius(tokenizer.image_size) if blend is None else blend
        images, masks = _listed("image", image, count), _listed("mask", mask, count)
        number = max(len(images), len(masks))
        config, size = tokenizer.network.config, tokenizer.image_size
        edits = []
        for place in range(number):
            given, given_mask = images[place % len(images)], masks[place % len(masks)]
            of_place = f"image {place}" if number > 1 else "image"
            name = f"image {printable(str(given))}" if isinstance(given, str | Path) else of_place
            pixels = editing.image_pixels(given, channels=config.in_channels, name=name)
            wanted = editing.mask_pixels(given_mask, name=f"mask of {name}")
            pixels, wanted = editing.fitted(pixels, wanted, image_size=size, fit=fit, name=name)
            unknown = editing.token_mask(wanted, factor=config.downsampling_factor, dilation=dilation)
            region = editing.pixel_region(unknown, factor=config.downsampling_factor, height=size, width=size)
            edits.append(cls(pixels, unknown, editing.seam(region, radius=radius)))
        return edits


def slices(count: int, size: int) -> Iterator[slice]:
    """Of ``count`` things, ``size`` at a time."""
    return (slice(first, first + size) for first in range(0, count, size))


def rows_by_first_step(first_steps: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Rows that are decoded together, with the step at which they begin."""
    for first_step in sorted(set(first_steps)):
        rows = [row for row, own in enumerate(first_steps) if own == first_step]
        for part in slices(len(rows), batch_size):
            yield first_step, rows[part]


def _listed(name: str, given: ImageLike | Sequence[ImageLike], count: int) -> list[ImageLike]:
    """One image or mask for all results, or one for each of the ``count``, as a list."""
    if not isinstance(given, list | tuple):
        return [cast("ImageLike", given)]
    if len(given) not in (1, count):
        raise ValueError(f"{name}: one, or one for each of the {count} classes, is needed, got {len(given)}")
    return list(given)

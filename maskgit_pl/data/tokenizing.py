"""Makes the token store of a data folder, with a tokenizer that the caller provides. Used by ``maskgit tokenize``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.checks import check_integer
from maskgit_pl.data.augmentations import CENTER, Augmentations, build_augmentations
from maskgit_pl.data.batches import Batch, ImageBatches, make_loader
from maskgit_pl.data.manifest import ImageRange, Split, check_vectors, load_manifest, read_manifest_summary
from maskgit_pl.data.order import Rows
from maskgit_pl.data.reader import ShardReader
from maskgit_pl.data.store_description import StoreDescription
from maskgit_pl.data.token_store import is_complete
from maskgit_pl.data.token_writer import Part, StoreParts
from maskgit_pl.data.unreadable import check_budget
from maskgit_pl.files import parse_any_json
from maskgit_pl.image_format import ImageSize, height_width, pixels_text

__all__ = ["PART_SIZE", "Outcome", "TokenizingConfig", "describe_store", "tokenize"]

PART_SIZE = 1024  # samples of a part; a kill costs at most one part per rank
Outcome = Literal["found", "made", "incomplete"]


@dataclass(frozen=True)
class TokenizingConfig:
    """The settings of the execution of ``tokenize``. The tokens do not depend on them.

    Args:
        batch_size: Number of images encoded at a time.
        part_size: Number of images written to disk at a time; a killed process loses at most these.
        num_workers: Number of processes that decode images; 0 decodes in this process.
        rank: Number of this process among those that share the work, in [0, world_size).
        world_size: Number of processes that share the work; they need not run at the same time.
        unreadable_budget: Fraction of unreadable images that may be replaced, in [0, 1]; see ``UnreadableImages``.

    Raises:
        ValueError: if a number is out of range.
    """

    batch_size: int = 256
    part_size: int = PART_SIZE
    num_workers: int = 0
    rank: int = 0
    world_size: int = 1
    unreadable_budget: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "part_size", "world_size"):
            check_integer(f"tokenize {name}", getattr(self, name), "[1, inf)")
        check_integer("tokenize num_workers", self.num_workers, "[0, 1024]")
        check_integer("tokenize rank", self.rank, f"[0, {self.world_size - 1}]")
        check_budget(self.unreadable_budget)


def describe_store(
    path: str | Path,
    *,
    grid: tuple[int, int],
    codebook_size: int,
    tokenizer: str,
    image_size: ImageSize,
    **views: Any,
) -> StoreDescription:
    """Describes a token store of a data folder, for ``tokenize``.

    Args:
        path: The data folder.
        grid: Height and width of the token grid.
        codebook_size: Codebook size.
        tokenizer: Fingerprint of the tokenizer's weights.
        image_size: Size of the images that the tokenizer encodes: a side, or (height, width).
        views: The views of an image and the precision: the fields ``crops``, ``flip``, ``precision`` and
            ``augmentations`` of ``StoreDescription``.

    Raises:
        ValueError: if a number is out of range, or ``crops`` is above 1 although all images have the shape of the
            crops.
    """
    summary = read_manifest_summary(path)
    if views.get("crops", 1) > 1 and not views.get("augmentations"):
        _check_crops(summary.images, image_size)
    samples = cast("dict[Split, int]", dict(summary.samples))
    kind = summary.vectors
    return StoreDescription(
        grid,
        codebook_size,
        image_size,
        tokenizer,
        summary.fingerprint,
        summary.classes,
        samples,
        vector_dim=0 if kind is None else kind.dim,
        vector_dtype="" if kind is None else kind.dtype,
        **views,
    )


def tokenize(
    path: str | Path,
    store: str | Path,
    description: StoreDescription,
    *,
    encode: Callable[[Tensor], Tensor],
    in_channels: int,
    config: TokenizingConfig = TokenizingConfig(),  # frozen
    on_rows: Callable[[Split, int, int], object] = lambda split, rows, total: None,
) -> Outcome:
    """Makes the token store of a data folder, or resumes an interrupted one.

    1. Each rank takes its share of the parts of the store, without those that are already on disk.
    2. It encodes each part batch by batch and writes it as a whole. A batch is the same on every rank, so the store
       does not depend on ranks, workers or interruptions.
    3. The rank that finds all parts on disk joins them into the store.

    Args:
        path: The data folder.
        store: The folder of the store.
        description: The store, as ``describe_store`` describes it for this data folder.
        encode: Maps images (B, in_channels, H, W) uint8 on the CPU to tokens (B, N) int64 on any device.
        in_channels: Channels of the images for ``encode``, 1 or 3.
        config: Batches, processes and the budget of unreadable images.
        on_rows: Called with the split, the number of rows that were just finished (first those of an earlier run), and
            this rank's number of rows of that split.

    Returns:
        ``"found"`` if the store exists already; ``"made"`` if it is finished now; ``"incomplete"`` if this rank has
        finished its share and other ranks have not.

    Raises:
        ValueError: if shards or vectors differ from the manifest.
        DataBudgetError: if too many images are unreadable.
    """
    if is_complete(store, description):
        return "found"
    readers = {split: _open_split(path, split) for split in description.samples}
    parts = StoreParts(store, description, part_size=config.part_size)
    # Every world_size-th part, so that all ranks have equally many.
    share = parts.parts()[config.rank :: config.world_size]
    for split, reader in readers.items():
        reading = _PartReader(reader, description, in_channels, config)
        mirrors = description.mirrors_of(split)
        # 1. The parts that are not on disk yet.
        own = [part for part in share if part.split == split]
        left = [part for part in own if not parts.is_done(part)]
        total = _count_rows(own, mirrors)
        on_rows(split, total - _count_rows(left, mirrors), total)
        # 2. Encode and write the parts.
        for part, batches in reading.by_part(left):
            encoded = []
            for batch in batches:
                columns = [_encode(batch.content, encode, mirrors), batch.labels]
                encoded.append(columns if batch.vectors is None else [*columns, batch.vectors])
                on_rows(split, mirrors * len(batch.labels), total)
            parts.write(part, *(torch.cat(column).numpy() for column in zip(*encoded, strict=True)))
    # 3. Join the parts.
    return "made" if parts.finish() else "incomplete"


def _open_split(path: str | Path, split: Split) -> ShardReader:
    """Opens the shards of a split, after a check of its vectors, since the store gets hashes of what is read.

    Raises:
        ValueError: if shards or vectors differ from the manifest.
    """
    manifest = load_manifest(path, split)
    if manifest.vectors is not None:
        check_vectors(manifest)
    return ShardReader(manifest)


@dataclass(frozen=True)
class _PartReader:
    """A reader of the images of a split, in the batches in which they are encoded."""

    reader: ShardReader
    description: StoreDescription
    in_channels: int
    config: TokenizingConfig

    def by_part(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Iterator[Batch]]]:
        """Yields each part with its batches, crop by crop. Consume the batches of a part before the next part."""
        # One loader per crop and not per part: its workers keep decoding at the border between parts.
        for crop in sorted({part.crop for part in parts}):
            order = _PartOrder([part for part in parts if part.crop == crop], self.config.batch_size)
            batches = self._batches(order, crop)
            for part in order.parts:
                yield part, islice(batches, len(order.batches(part)))

    def _batches(self, order: _PartOrder, crop: int) -> Iterator[Batch]:
        images = ImageBatches(
            self.reader,
            _CropOrder(crop),
            image_size=self.description.image_size,
            in_channels=self.in_channels,
            augmentations=_augmentations_of(self.description) if crop else CENTER,
            vectors=self.reader.vector_reader,
        )
        return iter(
            make_loader(
                images,
                order,
                num_workers=self.config.num_workers,
                pin_memory=torch.cuda.is_available(),
                unreadable_budget=self.config.unreadable_budget,
            )
        )


class _CropOrder:
    """An order whose positions are the samples. The number of the crop is the epoch, which determines a random crop."""

    def __init__(self, crop: int) -> None:
        self.crop = crop

    def __call__(self, positions: range) -> Rows:
        """Returns the samples at some positions."""
        index = torch.arange(positions.start, positions.stop)
        return Rows(index, torch.full_like(index, self.crop), index, torch.ones_like(index, dtype=torch.bool))


class _PartOrder(Sampler[range]):
    """A sampler of the batches of some parts. No batch spans two parts, so batches do not depend on the ranks."""

    def __init__(self, parts: Sequence[Part], batch_size: int) -> None:
        self.parts = parts
        self.batch_size = batch_size

    def __len__(self) -> int:
        return sum(len(self.batches(part)) for part in self.parts)

    def __iter__(self) -> Iterator[range]:
        return (positions for part in self.parts for positions in self.batches(part))

    def batches(self, part: Part) -> list[range]:
        """Returns the positions of each batch of a part."""
        starts = range(part.start, part.stop, self.batch_size)
        return [range(start, min(start + self.batch_size, part.stop)) for start in starts]


def _encode(images: Tensor, encode: Callable[[Tensor], Tensor], mirrors: int) -> Tensor:
    """Encodes images (B, C, H, W) uint8, and mirrored ones if ``mirrors`` is 2, to (B, mirrors, N) int64 on the CPU."""
    views = [images, images.flip(-1)][:mirrors]
    return torch.stack([encode(view).cpu() for view in views], dim=1)


def _augmentations_of(description: StoreDescription) -> Augmentations:
    """Returns the augmentations of all crops after the central one."""
    listed = description.augmentations
    return build_augmentations(parse_any_json(listed, "augmentations") if listed else ["random_crop"])


def _check_crops(images: ImageRange, image_size: ImageSize) -> None:
    """Checks that the images do not all have the shape of the crops, for which all crops would be equal."""
    (height, width), (rows, columns) = (images.height[0], images.width[0]), height_width(image_size)
    is_one_size = (images.height[1], images.width[1]) == (height, width)
    if is_one_size and height * columns == width * rows:
        raise ValueError(
            f"tokenize crops must be 1 if all images have the shape of the crops, got more for "
            f"{pixels_text((height, width))} pixels; shards made without --image-size keep images of other shapes"
        )


def _count_rows(parts: Sequence[Part], mirrors: int) -> int:
    return mirrors * sum(part.stop - part.start for part in parts)

"""From a data folder to its token store, with a tokenizer that the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.data.batches import Batch, ImageBatches, loader
from maskgit_pl.data.order import Rows
from maskgit_pl.shards.manifest import ImageRange, Split, load_manifest, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.token_writer import Part, StoreParts
from maskgit_pl.shards.tokens import StoreDescription, is_complete

__all__ = ["PART_SAMPLES", "Outcome", "describe_store", "tokenize"]

PART_SAMPLES = 1024
Outcome = Literal["found", "made", "others at work"]


def describe_store(
    path: str | Path,
    *,
    grid: tuple[int, int],
    num_codes: int,
    tokenizer: str,
    image_size: int,
    crops: int = 1,
    flip: bool = False,
    precision: str = "float32",
) -> StoreDescription:
    """Describes the token store that ``tokenize`` makes with the same arguments.

    Raises:
        ValueError: if several crops are asked for and all images are square.
    """
    summary = read_manifest_summary(path)
    if crops > 1:
        _check_crops(summary.images)
    samples = cast("dict[Split, int]", dict(summary.samples))
    return StoreDescription(
        grid, num_codes, image_size, tokenizer, summary.fingerprint, summary.classes, samples, crops, flip, precision
    )


def tokenize(
    path: str | Path,
    store: str | Path,
    *,
    encode: Callable[[Tensor], Tensor],
    grid: tuple[int, int],
    num_codes: int,
    tokenizer: str,
    image_size: int,
    in_channels: int,
    crops: int = 1,
    flip: bool = False,
    precision: str = "float32",
    batch_size: int = 256,
    part_samples: int = PART_SAMPLES,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    unreadable_budget: float = 0.0,
    on_rows: Callable[[Split, int, int], object] = lambda split, rows, total: None,
) -> Outcome:
    """Make the token store of a data folder; an interrupted one is gone on with.

    Batches are the same whoever encodes them, so that the store does not depend on ranks, workers or interruptions.

    Args:
        path: The data folder.
        store: The folder of the store.
        encode: (B, C, H, W) uint8 images on the CPU -> (B, N) int64 tokens on any device.
        grid: Height and width of the token grid.
        num_codes: Codebook size.
        tokenizer: Fingerprint of the tokenizer's weights.
        image_size: Side of the images that ``encode`` is given.
        in_channels: Their channels, 1 or 3.
        crops: Crops of each training image: the central one, then random ones.
        flip: Whether training images are there mirrored too.
        precision: In which ``encode`` computes; noted in the store.
        batch_size: Images at a time.
        part_samples: Images that are put on disk at a time: what a kill may cost.
        num_workers: Processes that decode while this one encodes.
        rank: Which of the processes that share the work this is.
        num_ranks: How many they are; they need not run at the same time.
        unreadable_budget: Share of unreadable images that may be replaced, as in training; see ``UnreadableImages``.
        on_rows: Told the split, how many more rows are done (first those of an earlier run) and how many this rank
            has to do of that split.

    Returns:
        ``"found"`` if this very store is there already; ``"made"`` if it is finished now; ``"others at work"`` if this
        rank has done its share and the last one to do so will finish.

    Raises:
        ValueError: A number is out of range, several crops of square images, or shards are not what the manifest says.
        DataBudgetError: Too many images cannot be read.
    """
    _check_counts(crops=crops, batch_size=batch_size, num_ranks=num_ranks)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"tokenize rank: 0 to {num_ranks - 1} of {num_ranks} ranks is needed, got {rank}")
    description = describe_store(
        path,
        grid=grid,
        num_codes=num_codes,
        tokenizer=tokenizer,
        image_size=image_size,
        crops=crops,
        flip=flip,
        precision=precision,
    )
    if is_complete(store, description):
        return "found"
    readers = {split: ShardReader(load_manifest(path, split)) for split in description.samples}
    reading = _Reading(image_size, in_channels, batch_size, num_workers, unreadable_budget)
    parts = StoreParts(store, description, part_samples=part_samples)
    share = parts.parts()[rank::num_ranks]
    for split, reader in readers.items():
        mirrors = description.mirrors_of(split)
        own = [part for part in share if part.split == split]
        left = [part for part in own if not parts.is_done(part)]
        total = _rows(own, mirrors)
        on_rows(split, total - _rows(left, mirrors), total)
        for part, batches in reading.by_part(reader, left):
            encoded = []
            for batch in batches:
                encoded.append((_encoded(batch.content, encode, mirrors), batch.labels))
                on_rows(split, mirrors * len(batch.labels), total)
            tokens, labels = (torch.cat(column).numpy() for column in zip(*encoded, strict=True))
            parts.write(part, tokens, labels)
    return "made" if parts.finish() else "others at work"


@dataclass(frozen=True)
class _Reading:
    """How images come to the encoder; see ``tokenize``."""

    image_size: int
    in_channels: int
    batch_size: int
    num_workers: int
    unreadable_budget: float

    def by_part(self, reader: ShardReader, parts: Sequence[Part]) -> Iterator[tuple[Part, Iterator[Batch]]]:
        """The batches of each part, crop by crop; those of one are taken before the next is asked for."""
        for crop in sorted({part.crop for part in parts}):
            order = _PartOrder([part for part in parts if part.crop == crop], self.batch_size)
            batches = self._batches(reader, order, crop)
            for part in order.parts:
                yield part, islice(batches, len(order.batches(part)))

    def _batches(self, reader: ShardReader, order: _PartOrder, crop: int) -> Iterator[Batch]:
        images = ImageBatches(
            reader,
            _View(crop),
            image_size=self.image_size,
            in_channels=self.in_channels,
            crop="random" if crop else "center",
        )
        return iter(
            loader(
                images,
                order,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                unreadable_budget=self.unreadable_budget,
            )
        )


class _View:
    """Positions are samples; the epoch, from which the place of a random crop follows, is the number of the crop."""

    def __init__(self, crop: int) -> None:
        self.crop = crop

    def __call__(self, positions: range) -> Rows:
        """The samples themselves."""
        index = torch.arange(positions.start, positions.stop)
        return Rows(index, torch.full_like(index, self.crop), index, torch.ones_like(index, dtype=torch.bool))


class _PartOrder(Sampler[range]):
    """The batches of some parts; none reaches over two, so that they are the same for any number of ranks."""

    def __init__(self, parts: Sequence[Part], batch_size: int) -> None:
        self.parts = parts
        self.batch_size = batch_size

    def __len__(self) -> int:
        return sum(len(self.batches(part)) for part in self.parts)

    def __iter__(self) -> Iterator[range]:
        return (positions for part in self.parts for positions in self.batches(part))

    def batches(self, part: Part) -> list[range]:
        """The positions of each batch of a part."""
        starts = range(part.start, part.stop, self.batch_size)
        return [range(start, min(start + self.batch_size, part.stop)) for start in starts]


def _encoded(images: Tensor, encode: Callable[[Tensor], Tensor], mirrors: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, mirrors, N) int64 on the CPU."""
    views = [images, images.flip(-1)][:mirrors]
    return torch.stack([encode(view).cpu() for view in views], dim=1)


def _check_crops(images: ImageRange) -> None:
    """Several crops need images that are not square, as far as the smallest and largest sides say."""
    if images.height == images.width and images.height[0] == images.height[1]:
        raise ValueError(
            "tokenize crops: images that are not square are needed for more than one, got "
            f"{images.height[0]} x {images.width[0]}; all crops would be the same "
            "(shards made without --size keep what can be cropped)"
        )


def _rows(parts: Sequence[Part], mirrors: int) -> int:
    return mirrors * sum(part.stop - part.start for part in parts)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"tokenize {name}: at least 1 is needed, got {value}")

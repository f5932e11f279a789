"""Makes the token store of a data folder, with a tokenizer that the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from maskgit_pl.checks import check_integer
from maskgit_pl.data.batches import Batch, ImageBatches, make_loader
from maskgit_pl.data.order import Rows
from maskgit_pl.shards.manifest import ImageRange, Split, load_manifest, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.token_writer import Part, StoreParts
from maskgit_pl.shards.tokens import StoreDescription, is_complete
from maskgit_pl.shards.unreadable import check_budget

__all__ = ["PART_SIZE", "Outcome", "TokenizingConfig", "describe_store", "tokenize"]

PART_SIZE = 1024
Outcome = Literal["found", "made", "incomplete"]


@dataclass(frozen=True)
class TokenizingConfig:
    """Execution of ``tokenize``: none of it changes a token.

    Args:
        batch_size: Images at a time.
        part_size: Images that are written to disk at a time: what a kill may cost.
        num_workers: Processes that decode while this one encodes.
        rank: Number of this process among those that share the work, from 0.
        world_size: Processes that share the work; they need not run at the same time.
        unreadable_budget: Share of unreadable images that may be replaced, as in training; see ``UnreadableImages``.

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
    image_size: int,
    crops: int = 1,
    flip: bool = False,
    precision: str = "float32",
) -> StoreDescription:
    """Describes a token store of a data folder, for ``tokenize``.

    Args:
        path: The data folder.
        grid: Height and width of the token grid.
        codebook_size: Codebook size.
        tokenizer: Fingerprint of the tokenizer's weights.
        image_size: Side of the images that the tokenizer encodes.
        crops: Crops of each training image: the central one, then random ones.
        flip: Store each training image mirrored too.
        precision: Precision in which the tokenizer computes; noted in the store.

    Raises:
        ValueError: if a number is out of range, or several crops are asked for and all images are square.
    """
    summary = read_manifest_summary(path)
    if crops > 1:
        _check_crops(summary.images)
    samples = cast("dict[Split, int]", dict(summary.samples))
    return StoreDescription(
        grid,
        codebook_size,
        image_size,
        tokenizer,
        summary.fingerprint,
        summary.classes,
        samples,
        crops,
        flip,
        precision,
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

    1. Each rank takes its share of the parts of the store, and leaves out those that are on disk.
    2. It encodes the others batch by batch and writes each as a whole. Batches are the same whoever encodes them, so
       the store does not depend on ranks, workers or interruptions.
    3. The rank that finds all parts on disk joins them.

    Args:
        path: The data folder.
        store: The folder of the store.
        description: The store, as ``describe_store`` describes it for this data folder.
        encode: (B, in_channels, image_size, image_size) uint8 images on the CPU -> (B, N) int64 tokens on any device.
        in_channels: Channels of the images that ``encode`` is given, 1 or 3.
        config: Batches, processes and the budget of unreadable images.
        on_rows: Called with the split, how many more rows are done (first those of an earlier run) and how many this
            rank has to do of that split.

    Returns:
        ``"found"`` if this very store is there already; ``"made"`` if it is finished now; ``"incomplete"`` if this
        rank has done its share and the last one to do so will finish.

    Raises:
        ValueError: if shards are not what the manifest says.
        DataBudgetError: if too many images cannot be read.
    """
    if is_complete(store, description):
        return "found"
    readers = {split: ShardReader(load_manifest(path, split)) for split in description.samples}
    parts = StoreParts(store, description, part_size=config.part_size)
    share = parts.parts()[config.rank :: config.world_size]
    for split, reader in readers.items():
        reading = _PartReader(reader, description.image_size, in_channels, config)
        mirrors = description.mirrors_of(split)
        # 1. The parts that are left.
        own = [part for part in share if part.split == split]
        left = [part for part in own if not parts.is_done(part)]
        total = _count_rows(own, mirrors)
        on_rows(split, total - _count_rows(left, mirrors), total)
        # 2. Encode and write them.
        for part, batches in reading.by_part(left):
            encoded = []
            for batch in batches:
                encoded.append((_encode(batch.content, encode, mirrors), batch.labels))
                on_rows(split, mirrors * len(batch.labels), total)
            tokens, labels = (torch.cat(column).numpy() for column in zip(*encoded, strict=True))
            parts.write(part, tokens, labels)
    # 3. Join.
    return "made" if parts.finish() else "incomplete"


@dataclass(frozen=True)
class _PartReader:
    """The images of a split, in the batches that are encoded."""

    reader: ShardReader
    image_size: int
    in_channels: int
    config: TokenizingConfig

    def by_part(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Iterator[Batch]]]:
        """Yields the batches of each part, crop by crop; those of one are taken before the next is asked for."""
        for crop in sorted({part.crop for part in parts}):
            order = _PartOrder([part for part in parts if part.crop == crop], self.config.batch_size)
            batches = self._batches(order, crop)
            for part in order.parts:
                yield part, islice(batches, len(order.batches(part)))

    def _batches(self, order: _PartOrder, crop: int) -> Iterator[Batch]:
        images = ImageBatches(
            self.reader,
            _CropOrder(crop),
            image_size=self.image_size,
            in_channels=self.in_channels,
            crop="random" if crop else "center",
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
    """An order whose positions are samples. The epoch, which decides a random crop, is the number of the crop."""

    def __init__(self, crop: int) -> None:
        self.crop = crop

    def __call__(self, positions: range) -> Rows:
        """Returns the samples themselves."""
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


def _encode(images: Tensor, encode: Callable[[Tensor], Tensor], mirrors: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, mirrors, N) int64 on the CPU."""
    views = [images, images.flip(-1)][:mirrors]
    return torch.stack([encode(view).cpu() for view in views], dim=1)


def _check_crops(images: ImageRange) -> None:
    """Refuses several crops of images that are all square, as far as the smallest and largest sides say."""
    if images.height == images.width and images.height[0] == images.height[1]:
        raise ValueError(
            "tokenize crops: images that are not square are needed for more than one, got "
            f"{images.height[0]} x {images.width[0]}; all crops would be the same "
            "(shards made without --image-size keep what can be cropped)"
        )


def _count_rows(parts: Sequence[Part], mirrors: int) -> int:
    return mirrors * sum(part.stop - part.start for part in parts)

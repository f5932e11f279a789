"""From a data folder to its token store, with a tokenizer that the caller brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor

from maskgit_pl.data.batches import ImageBatches, loader
from maskgit_pl.data.order import OnceThrough, SplitOrder
from maskgit_pl.shards.manifest import Split, load_manifest, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.tokens import StoreDescription, TokenWriter, complete_store, is_complete

__all__ = ["tokenize"]


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
    batch_size: int = 256,
    num_workers: int = 0,
    on_rows: Callable[[Split, int], object] = lambda split, rows: None,
) -> bool:
    """Make the token store of a data folder; an interrupted one is gone on with.

    Args:
        path: The data folder.
        store: The folder of the store.
        encode: (B, C, H, W) uint8 images on the CPU -> (B, N) int64 tokens on any device.
        grid: Height and width of the token grid.
        num_codes: Codebook size.
        tokenizer: Fingerprint of the tokenizer's weights.
        image_size: Side of the images that ``encode`` is given.
        in_channels: Their channels, 1 or 3.
        batch_size: Images at a time.
        num_workers: Processes that decode.
        on_rows: Told the split and how many more rows are done, first those of an earlier run (for a progress bar).

    Returns:
        False if this very store is there already, True if it was made.
    """
    summary = read_manifest_summary(path)
    samples = cast("dict[Split, int]", dict(summary.samples))
    description = StoreDescription(
        grid, num_codes, image_size, tokenizer, summary.fingerprint, summary.classes, samples
    )
    if is_complete(store, description):
        return False
    for split, count in samples.items():
        reader = ShardReader(load_manifest(path, split))
        writer = TokenWriter(store, split, description, reader.labels(np.arange(count)))
        images = ImageBatches(reader, OnceThrough(count), image_size=image_size, in_channels=in_channels)
        left = SplitOrder(count, per_device=batch_size, start=writer.rows_done)
        on_rows(split, writer.rows_done)
        for batch in loader(images, left, num_workers=num_workers):
            tokens = encode(batch.content).cpu()[batch.valid]
            writer.write(tokens.numpy())
            on_rows(split, len(tokens))
        writer.finish()
    complete_store(store, description)
    return True

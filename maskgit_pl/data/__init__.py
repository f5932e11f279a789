"""Batches for training and validation from shards of images, a token store, a stream, or any map-style dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.data.batches import Batch, ImageBatches, TokenBatches, flip
    from maskgit_pl.data.config import ShardDataConfig, StreamConfig
    from maskgit_pl.data.indexed import IndexedDataModule, IndexedDataset
    from maskgit_pl.data.module import ShardData
    from maskgit_pl.data.order import (
        EvalBatchSampler,
        InOrder,
        ShuffledStream,
        TrainBatchSampler,
        WindowedStream,
        split_batch,
    )
    from maskgit_pl.data.stream import StreamError
    from maskgit_pl.data.tokenize_options import TokenizingConfig
    from maskgit_pl.data.tokenizing import describe_store, tokenize

__all__ = [
    "Batch",
    "EvalBatchSampler",
    "ImageBatches",
    "InOrder",
    "IndexedDataModule",
    "IndexedDataset",
    "ShardData",
    "ShardDataConfig",
    "ShuffledStream",
    "StreamConfig",
    "StreamError",
    "TokenBatches",
    "TokenizingConfig",
    "TrainBatchSampler",
    "WindowedStream",
    "describe_store",
    "flip",
    "split_batch",
    "tokenize",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Batch": "batches",
        "EvalBatchSampler": "order",
        "ImageBatches": "batches",
        "InOrder": "order",
        "IndexedDataModule": "indexed",
        "IndexedDataset": "indexed",
        "ShardData": "module",
        "ShardDataConfig": "config",
        "ShuffledStream": "order",
        "StreamConfig": "config",
        "StreamError": "stream",
        "TokenBatches": "batches",
        "TokenizingConfig": "tokenize_options",
        "TrainBatchSampler": "order",
        "WindowedStream": "order",
        "describe_store": "tokenizing",
        "flip": "batches",
        "split_batch": "order",
        "tokenize": "tokenizing",
    },
)

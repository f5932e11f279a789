"""Batches for training and validation from shards of images, a token store, a stream, or any map-style dataset."""

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
from maskgit_pl.data.tokenizing import TokenizingConfig, describe_store, tokenize

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

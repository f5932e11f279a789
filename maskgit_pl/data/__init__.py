"""Batches for training and validation, from shards of images or from a token store."""

from maskgit_pl.data.batches import Batch, ImageBatches, TokenBatches, flip
from maskgit_pl.data.config import ShardDataConfig, StreamConfig
from maskgit_pl.data.indexed import IndexedDataModule, IndexedDataset
from maskgit_pl.data.module import ShardData
from maskgit_pl.data.order import GlobalOrder, OnceThrough, ShuffledStream, SplitOrder, WindowedStream, split_batch
from maskgit_pl.data.shard_fetcher import StreamError
from maskgit_pl.data.tokenizing import TokenizingConfig, describe_store, tokenize

__all__ = [
    "Batch",
    "GlobalOrder",
    "ImageBatches",
    "IndexedDataModule",
    "IndexedDataset",
    "OnceThrough",
    "ShardData",
    "ShardDataConfig",
    "ShuffledStream",
    "SplitOrder",
    "StreamConfig",
    "StreamError",
    "TokenBatches",
    "TokenizingConfig",
    "WindowedStream",
    "describe_store",
    "flip",
    "split_batch",
    "tokenize",
]

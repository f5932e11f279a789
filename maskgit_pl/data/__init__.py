"""Batches for training and validation, from shards of images or from a token store."""

from maskgit_pl.data.batches import Batch, ImageBatches, TokenBatches, flip
from maskgit_pl.data.module import ShardData
from maskgit_pl.data.order import GlobalOrder, OnceThrough, ShuffledStream, SplitOrder, WindowedStream, split_batch
from maskgit_pl.data.stream import StreamConfig, StreamError
from maskgit_pl.data.tokenizing import describe_store, tokenize

__all__ = [
    "Batch",
    "GlobalOrder",
    "ImageBatches",
    "OnceThrough",
    "ShardData",
    "ShuffledStream",
    "SplitOrder",
    "StreamConfig",
    "StreamError",
    "TokenBatches",
    "WindowedStream",
    "describe_store",
    "flip",
    "split_batch",
    "tokenize",
]

"""Batches for training and validation from shards of images, a token store, a stream, or any map-style dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.registry import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.data.batches import Batch, flip
    from maskgit_pl.data.config import ShardDataConfig
    from maskgit_pl.data.dataset import IndexedDataModule, IndexedDataset
    from maskgit_pl.data.module import ShardData
    from maskgit_pl.data.order import InOrder, ShuffledStream, split_batch
    from maskgit_pl.data.stream import StreamConfig
    from maskgit_pl.data.token_store import TokenizingConfig
    from maskgit_pl.data.tokenizing import describe_store, tokenize

__all__ = [
    "Batch",
    "InOrder",
    "IndexedDataModule",
    "IndexedDataset",
    "ShardData",
    "ShardDataConfig",
    "ShuffledStream",
    "StreamConfig",
    "TokenizingConfig",
    "describe_store",
    "flip",
    "split_batch",
    "tokenize",
]
_HOMES = {
    "batches": ("Batch", "flip"),
    "config": ("ShardDataConfig",),
    "dataset": ("IndexedDataModule", "IndexedDataset"),
    "module": ("ShardData",),
    "order": ("InOrder", "ShuffledStream", "split_batch"),
    "stream": ("StreamConfig",),
    "token_store": ("TokenizingConfig",),
    "tokenizing": ("describe_store", "tokenize"),
}

__getattr__ = lazy_names(__name__, {name: module for module, names in _HOMES.items() for name in names})

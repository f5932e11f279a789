"""The LightningDataModule of both stages. A run that resumes asks the Trainer for its step and is in place."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.data.batches import Batch, ImageBatches, StepLoader, TokenBatches, loader
from maskgit_pl.data.order import (
    GlobalOrder,
    OnceThrough,
    Order,
    ShuffledStream,
    SplitOrder,
    WindowedStream,
    check_window,
    split_batch,
)
from maskgit_pl.data.stream import StreamBatches, StreamConfig, StreamOnce, check_stream
from maskgit_pl.shards.images import Crop, check_crop
from maskgit_pl.shards.manifest import DataSummary, Split, load_manifest, load_manifests, read_manifest_summary
from maskgit_pl.shards.reader import ShardReader
from maskgit_pl.shards.tokens import StoreDescription, TokenReader, open_store
from maskgit_pl.shards.unreadable import check_budget

__all__ = ["ShardData"]


class ShardData(LightningDataModule):
    """Training and validation batches over a data folder, of images or of the tokens made from them.

    Both sources give the same samples in the same order.

    Args:
        path: Data folder (data/README.md): shards with manifests.
        source: ``"images"`` decodes the shards, ``"tokens"`` reads a token store made from them, ``"stream"`` trains on
            shards that cannot be indexed; the folder is then used for validation, if at all.
        token_store: Folder of the token store; needed, and read, for ``"tokens"`` alone.
        image_size: Side of the images in pixels.
        in_channels: 1 for grey, 3 for RGB.
        crop: Where training crops lie in images that are not square: ``"center"`` or ``"random"``.
        global_batch: Samples of a step, over all ranks.
        max_batch_per_device: Most samples a device takes at once; micro-batch and accumulation follow from it.
        validation_batch: Samples of a validation batch on each rank.
        validation_samples: Validate on the first so many samples; None takes all.
        num_workers: Processes that read and decode, each rank; 0 reads in the training process.
        seed: Decides order and crops.
        shuffle_window: Shuffle within so many shards at a time, for disks that are slow to seek; None shuffles the
            whole split. See ``WindowedStream`` for what it costs.
        stream: What ``"stream"`` reads; see ``StreamBatches`` for what is then not exact.
        unreadable_budget: Share of the images seen that may be unreadable and replaced before the run ends; 10
            different ones are allowed in any case, 0 allows none. See ``UnreadableImages``.
    """

    def __init__(
        self,
        path: str,
        *,
        source: Literal["images", "tokens", "stream"] = "images",
        token_store: str | None = None,
        image_size: int = 256,
        in_channels: int = 3,
        crop: Crop = "center",
        global_batch: int = 256,
        max_batch_per_device: int = 32,
        validation_batch: int = 64,
        validation_samples: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_window: int | None = None,
        stream: StreamConfig | None = None,
        unreadable_budget: float = 1e-4,
    ) -> None:
        super().__init__()
        check_crop(crop)
        check_budget(unreadable_budget)
        check_window(shuffle_window)
        if num_workers < 0:
            raise ValueError(
                f"data.num_workers: at least 0 is needed (0: the training process reads), got {num_workers}"
            )
        if source not in ("images", "tokens", "stream"):
            raise ValueError(f"data.source: images, tokens or stream is needed, got {source!r}")
        if source == "stream":
            check_stream(stream, validation_samples)
        if source == "tokens" and token_store is None:
            raise ValueError("data.token_store: source tokens reads a token store, got none; `make tokenize` makes one")
        if source == "tokens" and crop != "center":
            raise ValueError(
                f"data.crop: tokens keep the crops that they were made with, got {crop!r}; leave the key out and use "
                "`maskgit tokenize --crops N`, or use source images"
            )
        self.path = path
        self.source = source
        self.token_store = token_store if source == "tokens" else None
        self.image_size = image_size
        self.in_channels = in_channels
        self.crop: Crop = crop
        self.global_batch = global_batch
        self.max_batch_per_device = max_batch_per_device
        self.validation_batch = validation_batch
        self.validation_samples = validation_samples
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.stream = stream if source == "stream" else None
        self.unreadable_budget = unreadable_budget

    @cached_property
    def summary(self) -> DataSummary:
        """Class names, counts, image sizes and fingerprint of the data folder."""
        return read_manifest_summary(self.path)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names; label i is ``class_names[i]``."""
        named = None if self.stream is None else self.stream.class_names
        return self.summary.classes if named is None else named

    @property
    def num_classes(self) -> int:
        """How many classes the labels name."""
        return len(self.class_names)

    @property
    def store(self) -> StoreDescription | None:
        """What the token store holds; None for source images."""
        return None if self._tokens is None else self._tokens["train"].description

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the stream goes through the train split once."""
        return math.ceil(self._train_samples / self.global_batch)

    def require_tokenizer(self, fingerprint: str) -> None:
        """Refuse a token store that another tokenizer made; nothing to do for source images.

        Raises:
            ValueError: It did; the text names both and the way out.
        """
        if self.token_store is not None:
            open_store(self.token_store, data=None, tokenizer=fingerprint)

    def setup(self, stage: str | None = None) -> None:
        """Check every shard's length and ends, or whose the token store is, before the first step.

        Raises:
            FileNotFoundError: Data folder, manifest or store is missing.
            ValueError: Shards are not what the manifest says, the store is of other data, or the batch does not divide.
        """
        if self.source != "tokens":
            for manifest in load_manifests(self.path, self._splits_of_folder).values():
                _ = ShardReader(manifest).index  # refuses labels that are no class
        else:
            for split in self._splits_of_folder:
                load_manifest(self.path, split, check=False)
        split_batch(self.global_batch, self.max_batch_per_device, self._world_size)
        _ = self.store

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches of this rank from the Trainer's step on."""
        per_device, accumulation = split_batch(self.global_batch, self.max_batch_per_device, self._world_size)
        order = GlobalOrder(
            self._train_samples,
            per_device=per_device,
            accumulation=accumulation,
            world_size=self._world_size,
            rank=self._rank,
            current_step=self._current_step,
        )
        if self.stream is not None:
            return self._loader(self._stream_batches(self.stream), order)
        return self._loader(self.batches("train", self._order(), crop=self.crop), order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank of the val split, each sample once."""
        samples = self._validation_samples
        order = SplitOrder(samples, per_device=self.validation_batch, world_size=self._world_size, rank=self._rank)
        if self.stream is not None and self.stream.validation_urls is not None:
            return self._loader(self._stream_once(self.stream, samples), order)
        return self._loader(self.batches("val", OnceThrough(samples)), order)

    def batches(self, split: Split, order: Order, *, crop: Crop = "center") -> ImageBatches | TokenBatches:
        """The dataset of a split: ``__getitems__(range of positions)`` gives a ``Batch``."""
        if self._tokens is not None:
            return TokenBatches(self._tokens[split], order, seed=self.seed)
        reader = ShardReader(load_manifest(self.path, split))
        return ImageBatches(
            reader, order, image_size=self.image_size, in_channels=self.in_channels, crop=crop, seed=self.seed
        )

    def _stream_batches(self, stream: StreamConfig) -> StreamBatches:
        return StreamBatches(
            stream,
            class_names=self.class_names,
            image_size=self.image_size,
            in_channels=self.in_channels,
            crop=self.crop,
            seed=self.seed,
            rank=self._rank,
            world_size=self._world_size,
            first_step=self._current_step(),
            unreadable_budget=self.unreadable_budget,
        )

    def _stream_once(self, stream: StreamConfig, samples: int) -> StreamOnce:
        return StreamOnce(
            stream,
            samples,
            class_names=self.class_names,
            image_size=self.image_size,
            in_channels=self.in_channels,
        )

    @property
    def _splits_of_folder(self) -> tuple[Split, ...]:
        """The splits that are read from the data folder."""
        if self.stream is None:
            return ("train", "val")
        return ("val",) if self.stream.validation_urls is None else ()

    @property
    def _train_samples(self) -> int:
        return self.summary.samples["train"] if self.stream is None else self.stream.samples

    @property
    def _validation_samples(self) -> int:
        if "val" not in self._splits_of_folder:
            assert self.validation_samples is not None  # check_stream
            return self.validation_samples
        samples = self.summary.samples["val"]
        return samples if self.validation_samples is None else min(samples, self.validation_samples)

    def _order(self) -> Order:
        if self.shuffle_window is None:
            return ShuffledStream(self.summary.samples["train"], self.seed)
        shards = load_manifest(self.path, "train", check=False).shards
        return WindowedStream([shard.samples for shard in shards], window=self.shuffle_window, seed=self.seed)

    def _loader(self, dataset: Dataset[Batch], order: Sampler[range]) -> StepLoader:
        return loader(
            dataset,
            order,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            unreadable_budget=self.unreadable_budget,
        )

    @cached_property
    def _tokens(self) -> dict[Split, TokenReader] | None:
        if self.token_store is None:
            return None
        return open_store(self.token_store, data=self.summary.fingerprint, image_size=self.image_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves a batch as it is; Lightning would search it for what can be moved."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))

    def _current_step(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

"""The LightningDataModule of both stages. A run that resumes asks the Trainer for its step and is in place."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.checks import check_choice, check_integer, shorten
from maskgit_pl.data.batches import Batch, ImageBatches, StepLoader, TokenBatches, loader
from maskgit_pl.data.order import (
    MOST_SAMPLES,
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
from maskgit_pl.shards.tokens import StoreDescription, TokenReader, check_origin, open_store
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
        check_integer("data.image_size", image_size, "[1, 8192]")
        check_integer("data.global_batch", global_batch, MOST_SAMPLES)
        check_integer("data.max_batch_per_device", max_batch_per_device, MOST_SAMPLES)
        check_integer("data.validation_batch", validation_batch, MOST_SAMPLES)
        check_integer("data.num_workers", num_workers, "[0, 1024]")
        check_integer("data.seed", seed, "[0, 4294967296)")
        if validation_samples is not None:
            check_integer("data.validation_samples", validation_samples, "[1, 4294967296]")
        if in_channels not in (1, 3):
            raise ValueError(f"data.in_channels must be 1 or 3, got {shorten(in_channels)}")
        check_choice("data.source", source, ("images", "tokens", "stream"))
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
        self._readers: dict[Split, ShardReader] = {}

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
        return None if self._tokens is None else next(iter(self._tokens.values())).description

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the stream goes through the train split once."""
        return math.ceil(self._train_samples / self.global_batch)

    def require_tokenizer(self, fingerprint: str, *, grid: tuple[int, int], num_codes: int) -> None:
        """Checks that the token store was made by a tokenizer; source images has none.

        Args:
            fingerprint: Of the tokenizer.
            grid: Its token grid.
            num_codes: Its codebook size.

        Raises:
            ValueError: if another tokenizer made it, or it has other tokens. The message names both and the way out.
        """
        if self.store is not None:
            check_origin(self.store, self.token_store, tokenizer=fingerprint, grid=grid, num_codes=num_codes)

    def setup(self, stage: str | None = None) -> None:
        """Checks the index and every shard's length and ends, or the whole token store, before the first step.

        Raises:
            FileNotFoundError: if data folder, manifest or store is missing.
            ValueError: if shards are not what the manifest says, the store is of other data or damaged, or the batch
                does not divide.
        """
        if self.source != "tokens":
            for split, manifest in load_manifests(self.path, self._splits_of_folder).items():
                self._readers[split] = ShardReader(manifest)
                _ = self._readers[split].index  # refuses labels that are no class
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
        if split not in self._readers:
            self._readers[split] = ShardReader(load_manifest(self.path, split))
        return ImageBatches(
            self._readers[split],
            order,
            image_size=self.image_size,
            in_channels=self.in_channels,
            crop=crop,
            seed=self.seed,
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
        return open_store(
            self.token_store,
            data=self.summary.fingerprint,
            image_size=self.image_size,
            classes=self.summary.classes,
            samples=self.summary.samples,
        )

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

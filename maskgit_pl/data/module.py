"""The LightningDataModule of shards, token stores and streams, for both training stages.

Used by ``maskgit train`` and the evaluation.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from functools import cached_property

from torch.utils.data import DataLoader, Dataset, Sampler

from maskgit_pl.data.augmentations import CENTER, Augmentations
from maskgit_pl.data.batches import Batch
from maskgit_pl.data.config import ShardDataConfig
from maskgit_pl.data.loader import ImageBatches, StepDataModule, TokenBatches, make_loader
from maskgit_pl.data.manifest import (
    DataSummary,
    ShardReader,
    Split,
    check_shards,
    describe_enlarging,
    read_manifest_summary,
)
from maskgit_pl.data.order import InOrder, Order, ShuffledStream, split_batch
from maskgit_pl.data.stream import StreamBatches
from maskgit_pl.data.token_store import TokenReader, augmentations_text, check_origin, open_store, read_data_summary
from maskgit_pl.distributed import rank_and_world

log = logging.getLogger(__name__)


class ShardData(StepDataModule):
    """A LightningDataModule of training and validation batches of images or tokens.

    The sources ``images`` and ``tokens`` give the same samples in the same order.

    Args:
        config: The folder, the source and the batches.
        summary: Summary of the folder; None reads it at first use.
    """

    def __init__(self, config: ShardDataConfig, summary: DataSummary | None = None) -> None:
        super().__init__()
        self.config = config
        if summary is not None:
            self.summary = summary
        self.global_batch = config.global_batch
        self.stream = config.stream if config.source == "stream" else None
        self._readers: dict[Split, ShardReader] = {}

    @cached_property
    def summary(self) -> DataSummary:
        """The class names, counts, image sizes and fingerprint of the data folder."""
        read = read_data_summary if self.config.source == "tokens" else read_manifest_summary
        return read(self.config.path)

    @property
    def fingerprint(self) -> str:
        """The SHA-256, hex, that identifies the data: a run may find the same data in another folder."""
        return self.summary.fingerprint if self.stream is None else self.stream.fingerprint

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names; label i is ``class_names[i]``."""
        return self.summary.classes

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def enlarging(self) -> str | None:
        """The sentence of ``describe_enlarging`` about the images of the folder; None for a stream or tokens."""
        if self.stream is not None or self.summary.images is None:
            return None
        return describe_enlarging(self.summary.images, self.config.image_size)

    def warn_if_enlarged(self) -> None:
        """Logs ``enlarging`` on rank 0, if there is one."""
        if self.enlarging is not None and rank_and_world()[0] == 0:
            log.warning("data %s: %s", self.config.path, self.enlarging)

    def require_tokenizer(self, fingerprint: str | None, *, grid: tuple[int, ...], codebook_size: int) -> None:
        """Checks that a tokenizer of this fingerprint (None: any), grid and codebook made the token store."""
        if self._tokens is not None:
            origin = {"tokenizer": fingerprint, "grid": grid, "codebook_size": codebook_size}
            check_origin(self._tokens["train"].description, self.config.token_store, **origin)

    def setup(self, stage: str | None = None) -> None:
        """Checks the data before the first step: the index, and the length and ends of each shard; or the token store.

        Raises:
            FileNotFoundError: if the data folder, a manifest or the store is missing.
            ValueError: if shards differ from the manifest, the store is damaged or made from other data, or the
                batch cannot be divided evenly among the ranks.
        """
        split_batch(self.config.global_batch, self.config.max_batch_per_device, self._world_size)
        if self._tokens is None:  # opens and checks the token store, if there is one
            self._open_shards(self._splits_of_folder)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns the micro-batches of this rank, from the Trainer's step to the end of the epoch."""
        # Micro-batch and accumulation depend on the number of ranks.
        per_device, accumulation = split_batch(
            self.config.global_batch, self.config.max_batch_per_device, self._world_size
        )
        samples = self.summary.samples["train"] if self.stream is None else self.stream.samples
        order = self._train_order(samples, per_device=per_device, accumulation=accumulation)
        if self.stream is not None:
            shards = self.stream.expand()
            random.Random(f"{self.config.seed}/{self._current_step()}").shuffle(shards)
            batches = StreamBatches(
                self.stream,
                self.class_names,
                shards=shards[self._rank :: self._world_size],
                image_size=self.config.image_size,
                in_channels=self.config.in_channels,
                augmentations=self.config.train_augmentations,
                seed=self.config.seed,
            )
            return self._loader(batches, order)
        shuffled, augmentations = ShuffledStream(samples, self.config.seed), self.config.train_augmentations
        return self._loader(self.batches("train", shuffled, augmentations=augmentations), order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns this rank's batches of the val split, each sample once over all ranks."""
        order = self._eval_order(self._validation_samples, per_device=self.config.validation_batch)
        return self._loader(self.batches("val", InOrder(self._validation_samples)), order)

    def batches(
        self, split: Split, order: Order, *, augmentations: Augmentations = CENTER
    ) -> ImageBatches | TokenBatches:
        """Returns a dataset of batches of a split, whose ``__getitems__`` takes a range of positions.

        Args:
            split: ``"train"`` or ``"val"``.
            order: Maps positions to samples.
            augmentations: Crops and flips; tokens keep the views of their store.
        """
        if self._tokens is not None:
            return TokenBatches(self._tokens[split], order, seed=self.config.seed)
        if split not in self._readers:  # without ``setup``, as in the evaluation
            self._open_shards((split,))
        return ImageBatches(
            self._readers[split],
            order,
            image_size=self.config.image_size,
            in_channels=self.config.in_channels,
            augmentations=augmentations,
            seed=self.config.seed,
        )

    def _open_shards(self, splits: Sequence[Split]) -> None:
        manifests = {split: self.summary.manifest(split) for split in splits}
        check_shards(manifests.values())
        self._readers |= {split: ShardReader(manifest) for split, manifest in manifests.items()}

    @property
    def _splits_of_folder(self) -> tuple[Split, ...]:
        """The splits that are read from the data folder."""
        return ("train", "val") if self.stream is None else ("val",)

    @property
    def _validation_samples(self) -> int:
        samples, limit = self.summary.samples["val"], self.config.validation_samples
        return samples if limit is None else min(samples, limit)

    def _loader(self, dataset: Dataset[Batch], order: Sampler[range] | list[range]) -> DataLoader[Batch]:
        workers, budget = self.config.num_workers, self.config.unreadable_budget
        return make_loader(dataset, order, num_workers=workers, unreadable_budget=budget)

    @cached_property
    def _tokens(self) -> dict[Split, TokenReader] | None:
        if self.config.source != "tokens" or self.config.token_store is None:
            return None
        augmentations = self.config.augmentations
        # The values that the store must share with the data and the settings of this run.
        return open_store(
            self.config.token_store,
            crops=self.config.views,
            augmentations=None if augmentations is None else augmentations_text(augmentations),
            data=self.summary.fingerprint,
            image_size=None if self.summary.images is None else self.config.image_size,
            classes=self.summary.classes,
            samples=self.summary.samples,
        )

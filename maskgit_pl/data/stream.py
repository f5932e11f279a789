"""Training and validation batches from shards that cannot be indexed: URLs, read one after the other.

``shard_fetcher`` downloads and checks the shards. Of the ``webdataset`` library, only the shuffle buffer is used, since
its reader unpickles members, runs ``pipe:`` commands and stops silently at a damaged header. Used by ``ShardData``.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskgit_pl.data.batches import Batch
from maskgit_pl.data.config import ShardDataConfig, check_stream, expand_urls
from maskgit_pl.data.shard_fetcher import ShardFetcher, StreamError, StreamSample
from maskgit_pl.randomness import permutation
from maskgit_pl.shards.images import Reason, UnreadableImageError
from maskgit_pl.shards.labels import Labels
from maskgit_pl.shards.scan import BAD_IMAGE
from maskgit_pl.shards.unreadable import Unreadable, UnreadableImages

__all__ = ["StreamBatches", "StreamEval"]

log = logging.getLogger(__name__)

_ENDLESS = 2**62  # a number of samples that no stream reaches


class StreamBatches(Dataset[Batch]):
    """A dataset of training batches from a stream.

    1. The list of shards is repeated endlessly, in another random order each time.
    2. The shards are dealt in turn to all workers of all ranks.
    3. Each worker keeps ``shuffle_buffer`` samples in memory and draws from them at random.

    ``index`` and ``position`` of a row are its position in the stream of the run, step * global batch + slot, so masks,
    flips and crops differ each time that a sample occurs. ``epoch`` is the number of complete passes through the list
    of shards, since the process started, before the row's shard was opened.

    Unlike with indexed shards, these are not exact:

    * Order: it depends on the number of ranks and workers. Within an epoch of ``samples``, a sample may occur twice or
      not at all, since workers read shards of different sizes at the same pace.
    * Resume: a resumed run starts another order of shards, drawn from (seed, step), from its beginning.
    * Fewer shards than workers: several workers read the same shards, in different orders.

    Unreadable images are skipped. Each worker ends the run if its unreadable images exceed the budget.

    Args:
        config: The shards, sizes, crop, seed and budget of unreadable images; ``source`` is ``"stream"``.
        class_names: Class names; labels are in [0, len(class_names)).
        rank: This rank, in [0, world_size).
        world_size: Number of ranks.
        first_step: The step at which the run starts or resumes.
    """

    def __init__(
        self,
        config: ShardDataConfig,
        *,
        class_names: tuple[str, ...],
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        self.config = config
        self.stream = check_stream(config.stream, config.validation_samples)
        self.labels = Labels(self.stream.labels, class_names)
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self._samples: Iterator[StreamSample] | None = None
        self._skipped: _SkippedImages | None = None

    def __getitems__(self, positions: range) -> Batch:
        """Returns the next samples of this worker, in the rows of the given positions.

        Args:
            positions: Consecutive positions of the stream; B is their number.

        Returns:
            The batch; content is (B, in_channels, H, W) uint8.

        Raises:
            StreamError: if a shard cannot be downloaded or is invalid.
            DataBudgetError: if too many images are unreadable.
        """
        if self._samples is None:
            self._skipped = _SkippedImages(self.config.unreadable_budget)
            self._samples = self._shuffle()
        position = torch.arange(positions.start, positions.stop)
        index = position % 2**32  # random_bits takes indices below 2**32
        # The samples come in the worker's own order; positions only number the rows.
        rows = [self._next(int(number)) for number in index]
        labels, epochs = (torch.tensor([getattr(sample, name) for _, sample in rows]) for name in ("label", "epoch"))
        content = torch.stack([image for image, _ in rows])
        valid = torch.ones_like(position, dtype=torch.bool)
        return Batch(content, labels, index, epochs, position, valid, replacement=torch.full_like(index, -1))

    def _next(self, index: int) -> tuple[Tensor, StreamSample]:
        """Returns the next sample that can be decoded."""
        assert self._samples is not None
        assert self._skipped is not None
        while True:
            sample = next(self._samples)
            numbers, seed = (torch.tensor([each]) for each in (index, sample.epoch)), self.config.seed
            (place,) = self.config.train_augmentations.draw(*numbers, seed=seed)
            try:
                image = sample.decode(self.config.image_size, self.config.in_channels, place)
            except UnreadableImageError as error:
                self._skipped.add(sample.url, sample.name, error.reason, str(error))
                continue
            self._skipped.add_readable()
            return image, sample

    def _shuffle(self) -> Iterator[StreamSample]:
        """Starts the endless sequence of samples of this worker."""
        import webdataset

        # 2. Worker ``own`` of all workers takes every (world_size * workers)-th shard.
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = self.rank * workers + number
        chance = random.Random(f"{self.config.seed}/{self.first_step}/{own}")
        size = self.stream.shuffle_buffer
        # 3. The buffer is full before the first sample is drawn.
        urls = islice(self._endless_urls(), own, None, self.world_size * workers)
        samples: Iterator[StreamSample] = webdataset.shuffle(size, initial=size, rng=chance)(self._read(urls))
        return samples

    def _endless_urls(self) -> Iterator[tuple[str, int]]:
        # 1. The same order on all workers.
        urls = expand_urls("urls", self.stream.urls)
        for epoch in count():
            order = permutation(
                torch.arange(len(urls)), len(urls), stream="order/stream", seed=self.config.seed, index=self.first_step,
                epoch=epoch,
            )  # fmt: skip
            yield from ((urls[number], epoch) for number in order.tolist())

    def _read(self, urls: Iterator[tuple[str, int]]) -> Iterator[StreamSample]:
        assert self._skipped is not None
        for shard in ShardFetcher(urls, self.stream, self.labels):
            # The scan found these by their headers; it names only the first.
            if BAD_IMAGE in shard.scan.faults:
                bad = shard.scan.faults[BAD_IMAGE]
                for number in range(bad.count):
                    name = f"{shard.url}, unreadable image {number + 1} of {bad.count}"
                    self._skipped.add(shard.url, name, "damaged", f"the first: {bad.first}")
            yield from shard.samples()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None, "_skipped": None}


class StreamEval(Dataset[Batch]):
    """A dataset of validation batches from shards in their order: position i is sample i.

    Each sample occurs once over all ranks and workers. Every worker reads the shards up to its last sample, but decodes
    only its own samples.

    Args:
        config: The shards and sizes; ``stream.validation_urls`` are read.
        num_samples: Number of samples.
        class_names: Class names; labels are in [0, len(class_names)).
    """

    def __init__(self, config: ShardDataConfig, num_samples: int, *, class_names: tuple[str, ...]) -> None:
        self.config = config
        self.stream = check_stream(config.stream, config.validation_samples)
        self.num_samples = num_samples
        self.labels = Labels(self.stream.labels, class_names)
        self._samples: Iterator[tuple[int, StreamSample]] = iter(())
        self._at = _ENDLESS  # number of the last sample that was decoded
        self._last: tuple[Tensor, int] | None = None

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; those past the end repeat the last sample and are not valid.

        Args:
            positions: Consecutive positions; B is their number.

        Returns:
            The batch; content is (B, in_channels, H, W) uint8.

        Raises:
            StreamError: if a shard is invalid, an image is unreadable, or there are too few samples.
        """
        position = torch.arange(positions.start, positions.stop)
        index = position.clamp(max=self.num_samples - 1)
        images, labels = zip(*(self._sample(number) for number in index.tolist()), strict=True)
        return Batch(
            torch.stack(images),
            torch.tensor(labels),
            index,
            torch.zeros_like(index),
            position,
            position < self.num_samples,
            replacement=torch.full_like(index, -1),
        )

    def _sample(self, number: int) -> tuple[Tensor, int]:
        """Returns image and label of a sample.

        1. The last sample again: it is kept.
        2. A sample before it: start again with the first shard, as at the start of each validation.
        3. Read on until the sample.
        """
        if number == self._at and self._last is not None:  # 1.
            return self._last
        if number < self._at:  # 2.
            self._samples = enumerate(self._read())
        for at, sample in self._samples:  # 3.
            if at == number:
                self._at, self._last = at, (self._decode(sample), sample.label)
                return self._last
        raise StreamError(
            "data.validation_samples must be at most the number of samples in data.stream.validation_urls, got "
            f"{self.num_samples}; sample {number} does not exist"
        )

    def _decode(self, sample: StreamSample) -> Tensor:
        return sample.decode(self.config.image_size, self.config.in_channels, None)

    def _read(self) -> Iterator[StreamSample]:
        urls = expand_urls("validation_urls", self.stream.validation_urls or [])
        for shard in ShardFetcher(((url, 0) for url in urls), self.stream, self.labels):
            bad = shard.scan.faults.get(BAD_IMAGE)
            if bad is not None:
                raise StreamError(f"stream {shard.url}: all validation images must be readable, got: {bad.first}")
            yield from shard.samples()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": iter(()), "_at": _ENDLESS, "_last": None}


class _SkippedImages:
    """A counter of the unreadable images of one worker, with the limits of indexed shards; see ``UnreadableImages``.

    Samples of a stream have no numbers, so they are numbered in the order in which they are read.

    Args:
        budget: Fraction of the samples that may be unreadable, in [0, 1].
    """

    def __init__(self, budget: float) -> None:
        self._known: dict[int, Unreadable] = {}
        self._seen = 0
        self._counter = UnreadableImages(self._known.__getitem__, num_samples=_ENDLESS, budget=budget)

    def add(self, url: str, name: str, reason: Reason, error: str) -> None:
        """Counts an unreadable image.

        Args:
            url: URL of its shard.
            name: The image's name in messages.
            reason: Kind of the fault.
            error: Message of the decoder.

        Raises:
            DataBudgetError: if there are too many.
        """
        log.warning("stream: skipped %s: %s", name, error)
        self._known[self._seen] = Unreadable(self._seen, url, name, reason, error)
        self._counter.add(np.array([self._seen]), np.array([self._seen + 1]))
        self._seen += 1

    def add_readable(self) -> None:
        """Counts a readable image."""
        self._counter.add(np.array([self._seen]), np.array([-1]))
        self._seen += 1

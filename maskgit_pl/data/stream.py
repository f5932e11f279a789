"""Training and validation batches from shards at URLs or paths that are not indexed. Used by ``ShardData``.

Each worker downloads a shard, scans it as ``maskgit data index`` does, and reads its samples, which ``webdataset``
shuffles. The order is not exact: it depends on the numbers of ranks and workers, a sample may occur twice in an epoch
or not at all, and a resumed run starts another order, drawn from (seed, step).
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from itertools import count, islice
from pathlib import Path

import torch
import webdataset
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskgit_pl.data.batches import Batch, stack_batch
from maskgit_pl.data.config import ShardDataConfig, StreamConfig, expand_urls
from maskgit_pl.data.images import Place, UnreadableImageError, decode_image, fit_image
from maskgit_pl.data.order import InOrder, Rows
from maskgit_pl.data.samples import ALWAYS_ALLOWED, MAX_IN_A_ROW, Labels, Sample, UnreadableSample
from maskgit_pl.data.scan import BAD_IMAGE, scan_shard
from maskgit_pl.data.tar import BLOCK, member_label
from maskgit_pl.errors import DataBudgetError, printable
from maskgit_pl.files import open_regular
from maskgit_pl.randomness import permutation

__all__ = ["StreamBatches", "StreamError", "StreamEval"]

log = logging.getLogger(__name__)

_SILENT_SECONDS = 60.0  # longest time in which a server may send nothing


class StreamError(ValueError):
    """A shard of a stream cannot be read, or has an incomplete sample. The message names it."""


class _Stream(Dataset[Batch]):
    """A dataset of batches of a stream.

    Args:
        config: The shards, sizes, crops, seed and budget of unreadable images; ``source`` is ``"stream"``.
        class_names: Class names; labels are in [0, len(class_names)).
    """

    def __init__(self, config: ShardDataConfig, class_names: tuple[str, ...]) -> None:
        assert config.stream is not None
        self.config = config
        self.stream: StreamConfig = config.stream
        self.labels = Labels(self.stream.labels, class_names)

    def _decode(self, sample: Sample, crop: Place) -> tuple[Tensor, int]:
        image = decode_image(sample.data, channels=self.config.in_channels, name=sample.name)
        return fit_image(image, image_size=self.config.image_size, crop=crop), sample.label


class StreamBatches(_Stream):
    """A dataset of training batches from a stream.

    1. The list of shards is repeated endlessly, in another random order each time.
    2. The shards are dealt in turn to all workers of all ranks.
    3. Each worker keeps ``shuffle_buffer`` samples in memory and draws from them at random.

    The rows are numbered by their positions in the stream of the run, step * global batch + slot: ``index`` and
    ``position`` are this number, ``epoch`` counts each ``samples`` of them. So masks, flips and crops differ each time
    that a sample occurs. Unreadable images are skipped. Each worker ends the run if those exceed the budget.

    Args:
        config: See ``_Stream``.
        class_names: See ``_Stream``.
        rank: This rank, in [0, world_size).
        world_size: Number of ranks.
        first_step: The step at which the run starts or resumes.
    """

    def __init__(
        self,
        config: ShardDataConfig,
        class_names: tuple[str, ...],
        *,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        super().__init__(config, class_names)
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self._samples: Iterator[Sample | UnreadableSample] | None = None
        self._seen = self._unreadable = 0

    def __getitems__(self, positions: range) -> Batch:
        """Returns the next samples of this worker, in the rows of the given positions.

        Raises:
            StreamError: if a shard cannot be read or has an incomplete sample.
            DataBudgetError: if too many images are unreadable.
        """
        if self._samples is None:
            self._samples = self._shuffle()
        samples, position = self._samples, torch.arange(positions.start, positions.stop)
        index, epoch = position % 2**32, position // self.stream.samples  # random_bits takes indices below 2**32
        crops = self.config.train_augmentations.draw(index, epoch, seed=self.config.seed)
        rows = Rows(index, epoch, position, torch.ones_like(position, dtype=torch.bool))
        return stack_batch([self._next(samples, crop) for crop in crops], rows)

    def _next(self, samples: Iterator[Sample | UnreadableSample], crop: Place) -> tuple[Tensor, int]:
        """Returns image and label of the next sample that can be decoded."""
        error = ""
        for sample in islice(samples, MAX_IN_A_ROW):
            self._seen += 1
            try:
                if isinstance(sample, Sample):
                    return self._decode(sample, crop)
                error = sample.error
            except UnreadableImageError as unreadable:
                error = str(unreadable)
            log.warning("stream: skipped %s", error)
            self._unreadable += 1
            budget = self.config.unreadable_budget
            allowed = ALWAYS_ALLOWED if budget > 0 else 0
            if self._unreadable > max(allowed, budget * self._seen):
                raise DataBudgetError(
                    f"data budget: unreadable images must be at most {budget:g} of all images, or {allowed} in total, "
                    f"in each worker, got {self._unreadable} in {self._seen} images; the last: {error}; repair or "
                    "leave out these images, or raise data.unreadable_budget"
                )
        raise DataBudgetError(f"data budget: {MAX_IN_A_ROW} images in a row cannot be read; the last: {error}")

    def _shuffle(self) -> Iterator[Sample | UnreadableSample]:
        """Starts the endless sequence of samples of this worker."""
        # 2. Worker ``own`` of all workers takes every (world_size * workers)-th shard.
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = self.rank * workers + number
        urls = islice(self._endless_urls(), own, None, self.world_size * workers)
        # 3. The buffer is full before the first sample is drawn.
        chance, size = random.Random(f"{self.config.seed}/{self.first_step}/{own}"), self.stream.shuffle_buffer
        samples: Iterator[Sample | UnreadableSample] = webdataset.shuffle(size, initial=size, rng=chance)(
            _read_samples(urls, self.labels)
        )
        return samples

    def _endless_urls(self) -> Iterator[str]:
        # 1. The same order on all workers.
        urls = expand_urls("urls", self.stream.urls)
        place, seed = torch.arange(len(urls)), self.config.seed
        for epoch in count():
            order = permutation(place, len(urls), stream="order/stream", seed=seed, index=self.first_step, epoch=epoch)
            yield from (urls[number] for number in order.tolist())


class StreamEval(_Stream):
    """A dataset of validation batches from ``stream.validation_urls`` in their order: position i is sample i.

    Each sample occurs once over all ranks and workers. Every worker reads the shards up to its last sample, but decodes
    only its own samples.
    """

    _samples: Iterator[tuple[int, Sample | UnreadableSample]] = iter(())
    _last: tuple[int, Sample | UnreadableSample] | None = None  # the sample that was read last, after its number

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; those past the end repeat the last sample and are not valid.

        Raises:
            StreamError: if a shard or an image cannot be read, a sample is incomplete, or there are too few samples.
        """
        assert self.config.validation_samples is not None
        rows = InOrder(self.config.validation_samples)(positions)
        return stack_batch([self._decode(self._read(number), None) for number in rows.index.tolist()], rows)

    def _read(self, number: int) -> Sample:
        """Reads on until a sample; the first shard again for an earlier one, as at the start of each validation."""
        if self._last is None or number < self._last[0]:
            urls = expand_urls("validation_urls", self.stream.validation_urls or [])
            self._samples, self._last = enumerate(_read_samples(urls, self.labels)), None
        while self._last is None or self._last[0] < number:
            self._last = next(self._samples, None)
            if self._last is None:
                raise StreamError(
                    "data.validation_samples must be at most the number of samples in data.stream.validation_urls, got "
                    f"{self.config.validation_samples}; sample {number} does not exist"
                )
        sample = self._last[1]
        if isinstance(sample, UnreadableSample):
            raise StreamError(f"stream {sample.error}")
        return sample


def _read_samples(urls: Iterable[str], labels: Labels) -> Iterator[Sample | UnreadableSample]:
    """Yields the samples of shards in their order, those whose image header cannot be read at the start of a shard.

    Raises:
        StreamError: if a shard cannot be read, is no complete tar, has no samples, or has another fault.
    """
    for url in urls:
        try:
            with _open_shard(url) as path, open(open_regular(path), "rb") as file:
                scan = scan_shard(path, labels, vectors=False)
                faults = dict(scan.faults)
                unreadable = faults.pop(BAD_IMAGE, None)
                if scan.damage or not (len(scan.rows) or scan.faults):
                    raise StreamError(f"stream {url}: must be a complete tar of samples: {scan.damage or 'no images'}")
                for fault, found in faults.items():
                    raise StreamError(f"stream {url}: {found.samples} samples {fault} (first {found.first})")
                if unreadable is not None:
                    yield from [UnreadableSample(f"{url}: {unreadable.first}")] * unreadable.samples
                for _, offset, size, label in scan.rows.tolist():
                    data = os.pread(file.fileno(), BLOCK + size, offset - BLOCK)  # after the header of the member
                    yield Sample(data[BLOCK:], "", label, member_label(url, data[:BLOCK], offset))
        except (OSError, HTTPException) as error:
            raise StreamError(f"stream {url}: cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def _open_shard(url: str) -> Iterator[Path]:
    """Returns a path, or that of a temporary copy: a server does not wait while training validates or saves."""
    if not re.match(r"https?:", url, re.IGNORECASE):
        yield Path(url)
        return
    with tempfile.TemporaryFile() as file:  # it has no name, so that nothing is left after a kill
        try:
            response = urllib.request.urlopen(url, timeout=_SILENT_SECONDS)
        except ValueError as error:  # of an invalid address
            raise StreamError(f"stream {printable(url)}: cannot be read: {error}") from error
        with response:
            shutil.copyfileobj(response, file)
        file.flush()
        yield Path(f"/dev/fd/{file.fileno()}")

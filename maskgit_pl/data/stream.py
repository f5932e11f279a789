"""Training from shards that cannot be indexed: URLs, read one after the other.

Each shard is fetched whole into a temporary file while the one before is in use, and walked there as ``maskgit data
index`` walks it: a cut-off, damaged or hostile tar, half samples and labels that are no class are found before a
sample of it is used. Of the ``webdataset`` library only the shuffle buffer is used: its reader unpickles members, runs
``pipe:`` commands and ends in silence at a damaged header.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from threading import Thread
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.data.batches import Batch
from maskgit_pl.files import open_regular
from maskgit_pl.randomness import permutation, random_uniform
from maskgit_pl.shards.braces import MAX_NAMES, expand_braces
from maskgit_pl.shards.images import Crop, Reason, UnreadableImageError, load_square
from maskgit_pl.shards.scan import BAD_IMAGE, MAX_CLASSES, Labels, ShardScan, scan_shard
from maskgit_pl.shards.tar import BLOCK
from maskgit_pl.shards.unreadable import Unreadable, UnreadableImages
from maskgit_pl.text import printable

__all__ = ["StreamBatches", "StreamConfig", "StreamError", "StreamOnce", "check_stream"]

log = logging.getLogger(__name__)

_SCHEMES = (
    "abfs", "az", "file", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "s3", "sftp", "ssh", "webhdfs"
)  # fmt: skip
_CHUNK = 2**20
_MAX_SHARD_BYTES = 64 * 2**30
_ENDLESS = 2**62


class StreamError(ValueError):
    """A shard of a stream cannot be reached or is not what it must be; the text names it."""


@dataclass(frozen=True)
class StreamConfig:
    """What ``data.source: stream`` reads.

    Args:
        urls: Training shards: https, s3, gs, file and so on, or local paths; braces count:
            ``https://host/train-{00000..01023}.tar``. Uncompressed tars, as data/README.md describes them.
        samples: Samples in all of them, about: so many are an epoch.
        classes: Class names, or how many classes there are; None takes those of the data folder.
        validation_urls: Shards to validate on, in this order; None validates on the val split of the data folder.
        labels: Where labels come from: ``"cls"``, ``"json:FIELD"`` or ``"none"``.
        shuffle_buffer: Samples, as file bytes, that each worker holds and draws from.
        stall_seconds: A shard of which nothing comes for so long ends the run.
        attempts: Times that a shard is asked for before it counts as unreachable.

    Raises:
        ValueError: A number is out of range, no URL, or one that is not read.
    """

    urls: str | list[str]
    samples: int
    classes: int | list[str] | None = None
    validation_urls: str | list[str] | None = None
    labels: str = "cls"
    shuffle_buffer: int = 1000
    stall_seconds: float = 60.0
    attempts: int = 3

    def __post_init__(self) -> None:
        check_integer("data.stream.samples", self.samples, "[1, 1099511627776]")
        check_integer("data.stream.shuffle_buffer", self.shuffle_buffer, "[1, 16777216]")
        check_integer("data.stream.attempts", self.attempts, "[1, 1000]")
        check_number("data.stream.stall_seconds", self.stall_seconds, "(0, 1000000]")
        if isinstance(self.classes, int):
            check_integer("data.stream.classes", self.classes, f"[1, {MAX_CLASSES}]")
        Labels(self.labels)
        expand_urls("urls", self.urls)
        if self.validation_urls is not None:
            expand_urls("validation_urls", self.validation_urls)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One for each class, if the stream names them; a number where there is only a count."""
        if isinstance(self.classes, int):
            return tuple(str(label) for label in range(self.classes))
        return None if self.classes is None else tuple(self.classes)

    @property
    def fingerprint(self) -> str:
        """Sha256, hex, of where the samples come from; not of the samples, which nobody has seen."""
        what = [expand_urls("urls", self.urls), self.class_names, self.labels]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def check_stream(config: StreamConfig | None, validation_samples: int | None) -> StreamConfig:
    """The stream, of which nothing is missing.

    Raises:
        ValueError: Nothing to read, or URLs to validate on without how many samples of them.
    """
    if config is None:
        raise ValueError("data.stream: source stream reads data.stream.urls, got none")
    if config.validation_urls is not None and validation_samples is None:
        raise ValueError("data.validation_samples: a number is needed with data.stream.validation_urls, got none")
    return config


def expand_urls(name: str, urls: str | Sequence[str]) -> list[str]:
    """Braces unfolded, each URL checked.

    Raises:
        ValueError: if there are none or too many, or one is a kind of location that is not read.
    """
    patterns = [urls] if isinstance(urls, str) else list(urls)
    found: list[str] = []
    for pattern in patterns:
        try:
            found += expand_braces(pattern)
        except ValueError as error:
            raise ValueError(f"data.stream.{name}: {error}") from error
        if len(found) > MAX_NAMES:
            raise ValueError(f"data.stream.{name} must name at most {MAX_NAMES} shards, got more")
    if not found or not all(found):
        raise ValueError(f"data.stream.{name}: at least one URL is needed, got {patterns}")
    for url in found:
        scheme = re.match(r"([A-Za-z][\w+.-]*):", url)
        if scheme is not None and (scheme[1].lower() not in _SCHEMES or "::" in url):
            raise ValueError(
                f"data.stream.{name}: a path or a URL of {', '.join(_SCHEMES)} is needed, got {url!r}; "
                "commands and chains of file systems are not run"
            )
    return found


class StreamBatches(Dataset[Batch]):
    """Training batches from a stream.

    The list of shards is gone through again and again, in another order each time, and dealt to all workers of all
    ranks in turn; each holds ``shuffle_buffer`` samples and draws from them at random. ``index`` and ``position`` of a
    row are its place in the stream of the run, step * global batch + slot, so that masks, flips and crops differ each
    time a sample comes; ``epoch`` is how often the list of shards had been gone through, since the process began, when
    the row's shard was opened.

    What is not exact, as it is with indexed shards:

    * order: it depends on the number of ranks and workers, and within an epoch of ``samples`` a sample may come twice
      or not at all, as workers go through shards of different sizes at the same pace;
    * resuming: a resumed run begins another order of shards, drawn from (seed, step); samples are not gone on with;
    * shards fewer than workers: several workers then read the same ones, in other orders.

    Unreadable images are passed over, and each worker ends the run when it has met more than the budget allows.

    Args:
        config: What to read.
        class_names: Of the labels.
        image_size: Side of the images in pixels.
        in_channels: 1 or 3.
        crop: ``"center"`` or ``"random"``.
        seed: Decides the order of shards, what is drawn from the buffer, and the crops.
        rank: This rank.
        world_size: Ranks.
        first_step: At which the run begins or goes on.
        unreadable_budget: Share of unreadable images that may be passed over; see ``UnreadableImages``.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        class_names: tuple[str, ...],
        image_size: int,
        in_channels: int,
        crop: Crop = "center",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
        unreadable_budget: float = 0.0,
    ) -> None:
        self.config = config
        self.labels = Labels(config.labels, class_names)
        self.image_size = image_size
        self.in_channels = in_channels
        self.crop: Crop = crop
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.unreadable_budget = unreadable_budget
        self._samples: Iterator[_Sample] | None = None
        self._passed: _PassedOver | None = None

    def __getitems__(self, positions: range) -> Batch:
        """The next samples of this worker, whichever the positions; content is uint8 (B, C, image_size, image_size).

        Raises:
            StreamError: A shard cannot be reached or read.
            DataBudgetError: Too many images cannot be decoded.
        """
        if self._samples is None:
            self._passed = _PassedOver(self.unreadable_budget)
            self._samples = self._shuffled()
        position = torch.arange(positions.start, positions.stop)
        index = position % 2**32  # as far as random numbers count
        rows = [self._next(int(number)) for number in index]
        labels, epochs = (torch.tensor([getattr(sample, name) for _, sample in rows]) for name in ("label", "epoch"))
        content = torch.stack([image for image, _ in rows])
        valid = torch.ones_like(position, dtype=torch.bool)
        return Batch(content, labels, index, epochs, position, valid, replacement=torch.full_like(index, -1))

    def _next(self, index: int) -> tuple[Tensor, _Sample]:
        """The next sample that can be decoded."""
        assert self._samples is not None
        assert self._passed is not None
        while True:
            sample = next(self._samples)
            place = None
            if self.crop == "random":
                top, left = random_uniform("crop", seed=self.seed, index=index, epoch=sample.epoch, count=2)[0].tolist()
                place = top, left
            try:
                image = sample.decode(self.image_size, self.in_channels, place)
            except UnreadableImageError as error:
                self._passed.add(sample.url, sample.name, error.reason, str(error))
                continue
            self._passed.found_one()
            return image, sample

    def _shuffled(self) -> Iterator[_Sample]:
        import webdataset

        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = self.rank * workers + number
        chance = random.Random(f"{self.seed}/{self.first_step}/{own}")
        size = self.config.shuffle_buffer
        urls = islice(self._endless_urls(), own, None, self.world_size * workers)
        samples: Iterator[_Sample] = webdataset.shuffle(size, initial=size, rng=chance)(self._read(urls))
        return samples

    def _endless_urls(self) -> Iterator[tuple[str, int]]:
        urls = expand_urls("urls", self.config.urls)
        for epoch in count():
            order = permutation(
                torch.arange(len(urls)), len(urls), stream="order/stream", seed=self.seed, index=self.first_step,
                epoch=epoch,
            )  # fmt: skip
            yield from ((urls[number], epoch) for number in order.tolist())

    def _read(self, urls: Iterator[tuple[str, int]]) -> Iterator[_Sample]:
        assert self._passed is not None
        for shard in _Fetcher(urls, self.config, self.labels):
            if BAD_IMAGE in shard.walk.faults:
                bad = shard.walk.faults[BAD_IMAGE]
                for number in range(bad.count):
                    name = f"{shard.url}, unreadable image {number + 1} of {bad.count}"
                    self._passed.add(shard.url, name, "damaged", f"the first: {bad.first}")
            yield from shard.samples()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": None, "_passed": None}


class StreamOnce(Dataset[Batch]):
    """Validation batches from shards in their order: position i is sample i, each once over all ranks and workers.

    Every worker of every rank reads the shards up to its last sample and decodes its own samples alone.

    Args:
        config: What to read.
        num_samples: How many.
        class_names: Of the labels.
        image_size: Side of the images in pixels.
        in_channels: 1 or 3.
    """

    def __init__(
        self,
        config: StreamConfig,
        num_samples: int,
        *,
        class_names: tuple[str, ...],
        image_size: int,
        in_channels: int,
    ) -> None:
        self.config = config
        self.num_samples = num_samples
        self.labels = Labels(config.labels, class_names)
        self.image_size = image_size
        self.in_channels = in_channels
        self._samples: Iterator[tuple[int, _Sample]] = iter(())
        self._at = _ENDLESS  # of the last sample that was taken
        self._last: tuple[Tensor, int] | None = None

    def __getitems__(self, positions: range) -> Batch:
        """The samples at some positions; those past the end repeat the last one and are not valid."""
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
        """A sample by number: the one before again, one that follows, or from the beginning."""
        if number == self._at and self._last is not None:
            return self._last
        if number < self._at:
            self._samples = enumerate(self._read())
        for at, sample in self._samples:
            if at == number:
                self._at, self._last = at, (sample.decode(self.image_size, self.in_channels, None), sample.label)
                return self._last
        raise StreamError(
            f"data.validation_samples: at most as many as data.stream.validation_urls hold, got {self.num_samples}; "
            f"sample {number} is not there"
        )

    def _read(self) -> Iterator[_Sample]:
        urls = expand_urls("validation_urls", self.config.validation_urls or [])
        for shard in _Fetcher(((url, 0) for url in urls), self.config, self.labels):
            bad = shard.walk.faults.get(BAD_IMAGE)
            if bad is not None:
                raise StreamError(f"stream {shard.url}: to validate, images that can be read are needed: {bad.first}")
            yield from shard.samples()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": iter(()), "_at": _ENDLESS, "_last": None}


class _Sample(NamedTuple):
    data: bytes
    label: int
    url: str
    name: str
    epoch: int

    def decode(self, image_size: int, channels: int, crop: tuple[float, float] | None) -> Tensor:
        return load_square(self.data, image_size=image_size, channels=channels, crop=crop, name=self.name)


class _PassedOver:
    """Unreadable images of one worker, numbered as they come, for the rule that indexed shards have."""

    def __init__(self, budget: float) -> None:
        self._waiting: list[Unreadable] = []  # since the last image that could be read
        self._known: dict[int, Unreadable] = {}
        self._seen = 0
        self._counter = UnreadableImages(self._known.__getitem__, num_samples=_ENDLESS, budget=budget)

    def add(self, url: str, name: str, reason: Reason, error: str) -> None:
        """One more; raises ``DataBudgetError`` if it is one too many."""
        log.warning("stream: passed over %s: %s", name, error)
        self._known[self._seen] = Unreadable(self._seen, url, name, reason, error)
        self._counter.add(np.array([self._seen]), np.array([self._seen + 1]))
        self._seen += 1

    def found_one(self) -> None:
        """An image could be read."""
        self._counter.add(np.array([self._seen]), np.array([-1]))
        self._seen += 1


class _Shard(NamedTuple):
    """A shard as an open file of this machine; its temporary file, if it has one, has no name any more."""

    url: str
    descriptor: int
    epoch: int
    walk: ShardScan

    def samples(self) -> Iterator[_Sample]:
        """Its whole samples, in their order."""
        try:
            for _, offset, size, label in self.walk.rows.tolist():
                data = os.pread(self.descriptor, size, offset)
                header = os.pread(self.descriptor, 100, offset - BLOCK)
                member = printable(header.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
                yield _Sample(data, label, self.url, f"{self.url}:{member}", self.epoch)
        finally:
            os.close(self.descriptor)


class _Fetcher:
    """Brings shards here, each while the one before is in use.

    Args:
        urls: In the order of use, each with its epoch.
        config: How patiently.
        labels: Where labels come from.
    """

    def __init__(self, urls: Iterator[tuple[str, int]], config: StreamConfig, labels: Labels) -> None:
        self.urls = urls
        self.config = config
        self.labels = labels
        self._alive = time.monotonic()  # when something came last

    def __iter__(self) -> Iterator[_Shard]:
        following = self._begin()
        while following is not None:
            url, epoch, coming = following
            descriptor, walk = self._awaited(url, coming)
            following = self._begin()
            yield _Shard(url, descriptor, epoch, walk)

    def _begin(self) -> tuple[str, int, Future[tuple[int, ShardScan]]] | None:
        """Begin to fetch the next shard in a thread that ends with the process, whatever it waits for."""
        url, epoch = next(self.urls, (None, 0))
        if url is None:
            return None
        future: Future[tuple[int, ShardScan]] = Future()
        self._alive = time.monotonic()
        Thread(target=self._fetch, args=(url, future), daemon=True).start()
        return url, epoch, future

    def _awaited(self, url: str, coming: Future[tuple[int, ShardScan]]) -> tuple[int, ShardScan]:
        """What was fetched.

        Raises:
            StreamError: Nothing came for ``stall_seconds``, or it is not a shard.
        """
        patience = self.config.stall_seconds
        while True:
            try:
                return coming.result(timeout=max(0.01, self._alive + patience - time.monotonic()))
            except NotYetError:
                if time.monotonic() - self._alive >= patience:
                    raise StreamError(
                        f"stream {url}: nothing came for {patience:g} s (data.stream.stall_seconds)"
                    ) from None

    def _fetch(self, url: str, future: Future[tuple[int, ShardScan]]) -> None:
        try:
            future.set_result(self._shard(url))
        except Exception as error:
            future.set_exception(error)

    def _shard(self, url: str) -> tuple[int, ShardScan]:
        local = _local_path(url)
        if local is not None:
            try:
                descriptor = open_regular(local)
            except OSError as error:
                raise StreamError(f"stream {url}: cannot be read ({error.strerror})") from error
            return self._walked(url, descriptor)
        with tempfile.TemporaryFile(prefix="maskgit-stream-") as file:
            self._download_patiently(url, file)
            return self._walked(url, os.dup(file.fileno()))

    def _download_patiently(self, url: str, file: IO[bytes]) -> None:
        """Fill a file.

        Raises:
            StreamError: In none of the attempts.
        """
        for attempt in range(1, self.config.attempts + 1):
            try:
                return self._download(url, file)
            except ImportError as error:
                raise StreamError(f"stream {url}: {error}; install with pip what it names") from error
            except StreamError:
                raise
            except Exception as error:  # every file system has errors of its own, and its own idea of "not found"
                cause = error if error.__cause__ is None else error.__cause__
                what = f"{type(cause).__name__}: {cause}"
                if attempt == self.config.attempts:
                    raise StreamError(f"stream {url}: not reached in {attempt} attempts ({what})") from error
                log.warning("stream %s: attempt %d of %d: %s", url, attempt, self.config.attempts, what)
                self._alive = time.monotonic()
                time.sleep(attempt)
        return None

    def _download(self, url: str, file: IO[bytes]) -> None:
        import fsspec  # type: ignore[import-untyped]  # has no types

        file.seek(0)
        file.truncate()
        size = 0
        with fsspec.open(url, "rb") as source:
            while block := source.read(_CHUNK):
                self._alive = time.monotonic()
                size += file.write(block)
                if size > _MAX_SHARD_BYTES:
                    raise StreamError(f"stream {url}: at most {_MAX_SHARD_BYTES} bytes a shard are read")
        file.flush()

    def _walked(self, url: str, descriptor: int) -> tuple[int, ShardScan]:
        """The open file and what it holds.

        Raises:
            StreamError: It is not a whole tar, holds no sample, or has samples that are not whole.
        """
        path = Path(f"/dev/fd/{descriptor}")
        try:
            walk = scan_shard(path, self.labels)
            if walk.damage:
                raise StreamError(f"stream {url}: a whole, uncompressed tar is needed, got: {walk.damage}")
            wrong = [
                f"{fault.count} {text} (first {fault.first.removeprefix(f'{path.name}:')})"
                for text, fault in walk.faults.items()
                if text != BAD_IMAGE
            ]
            if wrong:
                raise StreamError(f"stream {url}: whole samples are needed, got {'; '.join(wrong)}")
            if not len(walk.rows):
                raise StreamError(f"stream {url}: a sample of an image and a label is needed, got none")
        except BaseException:
            os.close(descriptor)
            raise
        self._alive = time.monotonic()
        return descriptor, walk


def _local_path(url: str) -> Path | None:
    if re.match(r"[A-Za-z][\w+.-]*:", url) is None:
        return Path(url)
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None

"""Training and validation batches from shards that are not indexed, at URLs or paths, read one after the other.

``webdataset`` groups the members of the shards into samples and shuffles these. Three of its parts are not used:
its opener runs ``curl`` and ``pipe:`` commands, its tar reader takes a damaged header for the end of a shard and reads
members of any size, and its decoders unpickle. Used by ``ShardData``.
"""

from __future__ import annotations

import logging
import os
import random
import re
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import count, islice
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskgit_pl.data.batches import Batch
from maskgit_pl.data.config import ShardDataConfig, check_stream, expand_urls
from maskgit_pl.data.image_bytes import MAX_IMAGE_BYTES
from maskgit_pl.data.images import Place, UnreadableImageError, load_image
from maskgit_pl.data.samples import ALWAYS_ALLOWED, MAX_IN_A_ROW, Labels
from maskgit_pl.data.scan import IMAGE_EXTENSIONS
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.files import open_regular
from maskgit_pl.randomness import permutation

__all__ = ["StreamBatches", "StreamError", "StreamEval"]

log = logging.getLogger(__name__)

_SILENT_SECONDS = 60.0  # longest time in which a server may send nothing
_MAX_SHARD_BYTES = 2**36
_MAX_LABEL_BYTES = 2**20
_MAX_HEADERS = 2**20  # bytes between two members
_MAX_HEADER = 2**14  # bytes of one that holds a name or other fields; tarfile searches them in quadratic time
_MAX_NAME = 4096  # characters
_CHUNK = 2**16  # bytes
_LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


class StreamError(ValueError):
    """A shard of a stream cannot be read, or has an incomplete sample. The message names it."""


class _Sample(NamedTuple):
    data: bytes  # of the image file
    label: int
    name: str  # URL of the shard and key, for messages

    def decode(self, config: ShardDataConfig, crop: Place) -> Tensor:
        size, channels = config.image_size, config.in_channels
        return load_image(self.data, image_size=size, channels=channels, crop=crop, name=self.name)


class StreamBatches(Dataset[Batch]):
    """A dataset of training batches from a stream.

    1. The list of shards is repeated endlessly, in another random order each time.
    2. The shards are dealt in turn to all workers of all ranks.
    3. Each worker keeps ``shuffle_buffer`` samples in memory and draws from them at random.

    The rows are numbered by their positions in the stream of the run, step * global batch + slot: ``index`` and
    ``position`` are this number, ``epoch`` counts each ``samples`` of them. So masks, flips and crops differ each time
    that a sample occurs.

    Unlike with indexed shards, the order is not exact: it depends on the numbers of ranks and workers, a sample may
    occur twice in an epoch or not at all, and a resumed run starts another order, drawn from (seed, step).

    Unreadable images are skipped. Each worker ends the run if those exceed the budget.

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
        self._samples: Iterator[_Sample] | None = None
        self._seen = self._unreadable = 0

    def __getitems__(self, positions: range) -> Batch:
        """Returns the next samples of this worker, in the rows of the given positions.

        Args:
            positions: Consecutive positions of the stream; B is their number.

        Returns:
            The batch; content is (B, in_channels, H, W) uint8.

        Raises:
            StreamError: if a shard cannot be read or has an incomplete sample.
            DataBudgetError: if too many images are unreadable.
        """
        if self._samples is None:
            self._samples = self._shuffle()
        position = torch.arange(positions.start, positions.stop)
        index = position % 2**32  # random_bits takes indices below 2**32
        epoch = position // self.stream.samples
        crops = self.config.train_augmentations.draw(index, epoch, seed=self.config.seed)
        rows = [self._next(self._samples, crop) for crop in crops]
        return _batch(rows, index, epoch, position, torch.ones_like(position, dtype=torch.bool))

    def _next(self, samples: Iterator[_Sample], crop: Place) -> tuple[Tensor, int]:
        """Returns image and label of the next sample that can be decoded."""
        for _ in range(MAX_IN_A_ROW):
            sample = next(samples)
            self._seen += 1
            try:
                return sample.decode(self.config, crop), sample.label
            except UnreadableImageError as error:
                log.warning("stream: skipped %s", error)
                self._unreadable += 1
                budget = self.config.unreadable_budget
                allowed = ALWAYS_ALLOWED if budget > 0 else 0
                if self._unreadable > max(allowed, budget * self._seen):
                    raise DataBudgetError(
                        f"data budget: unreadable images must be at most {budget:g} of all images, or {allowed} in "
                        f"total, in each worker, got {self._unreadable} in {self._seen} images; the last: {error}; "
                        "repair or leave out these images, or raise data.unreadable_budget"
                    ) from error
        raise DataBudgetError(f"data budget: {MAX_IN_A_ROW} images in a row cannot be read; the last: {sample.name}")

    def _shuffle(self) -> Iterator[_Sample]:
        """Starts the endless sequence of samples of this worker."""
        import webdataset

        # 2. Worker ``own`` of all workers takes every (world_size * workers)-th shard.
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own = self.rank * workers + number
        urls = islice(self._endless_urls(), own, None, self.world_size * workers)
        # 3. The buffer is full before the first sample is drawn.
        chance = random.Random(f"{self.config.seed}/{self.first_step}/{own}")
        size = self.stream.shuffle_buffer
        shuffle = webdataset.shuffle(size, initial=size, rng=chance)
        samples: Iterator[_Sample] = shuffle(_read_samples(urls, self.labels))
        return samples

    def _endless_urls(self) -> Iterator[str]:
        # 1. The same order on all workers.
        urls = expand_urls("urls", self.stream.urls)
        for epoch in count():
            order = permutation(
                torch.arange(len(urls)), len(urls), stream="order/stream", seed=self.config.seed, index=self.first_step,
                epoch=epoch,
            )  # fmt: skip
            yield from (urls[number] for number in order.tolist())


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
        self._samples: Iterator[tuple[int, _Sample]] = iter(())
        self._last: tuple[int, _Sample] | None = None  # the sample that was read last, after its number

    def __getitems__(self, positions: range) -> Batch:
        """Returns the batch at some positions; those past the end repeat the last sample and are not valid.

        Args:
            positions: Consecutive positions; B is their number.

        Returns:
            The batch; content is (B, in_channels, H, W) uint8.

        Raises:
            StreamError: if a shard cannot be read, has an incomplete sample, or there are too few samples.
            UnreadableImageError: if an image is unreadable.
        """
        position = torch.arange(positions.start, positions.stop)
        index = position.clamp(max=self.num_samples - 1)
        samples = [self._sample(number) for number in index.tolist()]
        rows = [(sample.decode(self.config, None), sample.label) for sample in samples]
        return _batch(rows, index, torch.zeros_like(index), position, position < self.num_samples)

    def _sample(self, number: int) -> _Sample:
        """Reads on until a sample; the first shard again for an earlier one, as at the start of each validation."""
        if self._last is None or number < self._last[0]:
            urls = expand_urls("validation_urls", self.stream.validation_urls or [])
            self._samples, self._last = enumerate(_read_samples(urls, self.labels)), None
        while self._last is None or self._last[0] < number:
            self._last = next(self._samples, None)
            if self._last is None:
                raise StreamError(
                    "data.validation_samples must be at most the number of samples in data.stream.validation_urls, got "
                    f"{self.num_samples}; sample {number} does not exist"
                )
        return self._last[1]


def _batch(rows: list[tuple[Tensor, int]], index: Tensor, epoch: Tensor, position: Tensor, valid: Tensor) -> Batch:
    images, labels = zip(*rows, strict=True)
    replacement = torch.full_like(index, -1)
    return Batch(torch.stack(images), torch.tensor(labels), index, epoch, position, valid, replacement=replacement)


def _read_samples(urls: Iterable[str], labels: Labels) -> Iterator[_Sample]:
    """Yields the samples of shards in their order.

    Raises:
        StreamError: if a shard is not a complete tar, has no samples, or has an incomplete sample.
    """
    from webdataset.tariterators import group_by_keys

    for members in group_by_keys(_read_members(urls, labels), handler=_refuse_repeated):
        name = members["__key__"]
        images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
        if len(images) != 1 or (labels.extension is not None and labels.extension not in members):
            wanted = "one image" if labels.extension is None else f"one image and one .{labels.extension}"
            found = ", ".join(f".{extension}" for extension in members if not extension.startswith("__"))
            raise StreamError(f"stream {name}: a sample must have {wanted} side by side in its shard, got {found}")
        label = 0 if labels.extension is None else labels.read(members[labels.extension], name=name)
        yield _Sample(images[0], label, name)


def _refuse_repeated(error: Exception) -> bool:
    raise StreamError(f"stream {error.args[0]}") from error  # webdataset's text begins with the member's name


def _read_members(urls: Iterable[str], labels: Labels) -> Iterator[dict[str, Any]]:
    """Yields the images and labels of shards in the form of ``webdataset``; an empty one ends a shard.

    The name of a shard is part of their names, and thus of the keys of samples.
    """
    for url in urls:
        try:
            for name, data in _read_tar(url, {*IMAGE_EXTENSIONS, labels.extension}):
                yield {"fname": f"{url}/{name}", "data": data, "__url__": url}
        except Exception as error:  # urllib, http.client and tarfile raise many kinds
            got = f"{type(error).__name__}: {error}"
            raise StreamError(f"stream {url}: must be a complete, uncompressed tar with samples, got {got}") from error
        yield {}


def _read_tar(url: str, extensions: set[str | None]) -> Iterator[tuple[str, bytes]]:
    """Yields the names and bytes of the members with some extensions.

    1. The memory of a member and of its headers is bounded, also if they are hostile.
    2. Nothing but zeros may follow the end of the archive.
    """
    from webdataset.tariterators import base_plus_ext

    found = 0
    with _open(url) as file:
        shard = _BoundedFile(file)
        with tarfile.open(fileobj=shard, mode="r|", tarinfo=_Header) as tar:  # type: ignore[call-overload]  # it only reads
            for member in iter(tar.next, None):
                tar.members, tar.pax_headers = [], {}  # they would grow with the shard
                shard.left = _MAX_HEADERS + tar.offset - tar.fileobj.tell()  # headers may change member.size
                if len(member.name) > _MAX_NAME:
                    raise tarfile.ReadError(f"a member's name of more than {_MAX_NAME} characters")
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is a sparse file")
                extension = (base_plus_ext(member.name)[1] or "").lower()
                if member.isreg() and extension in extensions:
                    limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else _MAX_LABEL_BYTES
                    if member.size > limit:  # 1.
                        raise tarfile.ReadError(f"{member.name} has more than {limit} bytes")
                    yield member.name, tar.extractfile(member).read()
                    found += 1
            while rest := tar.fileobj.read(_CHUNK):  # 2.
                if any(rest):
                    raise tarfile.ReadError("more bytes after the end of the archive")
    if not found:
        raise tarfile.ReadError("no images or labels")


def _open(url: str) -> IO[bytes]:
    """Opens a file, or a temporary copy of what a server sends: it does not wait while training validates or saves."""
    if not re.match(r"https?:", url, re.IGNORECASE):
        return os.fdopen(open_regular(url), "rb")
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        response = stack.enter_context(urllib.request.urlopen(url, timeout=_SILENT_SECONDS))
        while data := response.read(_CHUNK):
            if file.tell() > _MAX_SHARD_BYTES:
                raise tarfile.ReadError(f"more than {_MAX_SHARD_BYTES} bytes")
            file.write(data)
        file.seek(0)
        response.close()
        stack.pop_all()
    return file


class _BoundedFile:
    """A file of which no more than ``left`` bytes can be read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.left = _MAX_HEADERS

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise tarfile.ReadError(f"more than {_MAX_HEADERS} bytes of headers or zeros in a row")
        return data


class _Header(tarfile.TarInfo):
    """A header of a tar. A damaged or missing one is an error, which ``tarfile`` takes for the end of the archive.

    The size of headers with names and other fields is bounded.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the end of the archive
                raise
            raise tarfile.ReadError(f"{error}, in place of a member or the end") from error

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _LONG_HEADERS and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]  # typeshed lacks it

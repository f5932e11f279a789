"""Training batches from shards at URLs or paths that are not indexed. Used by ``ShardData``.

Each worker downloads a shard, scans it as ``maskgit data index`` does, and reads its samples, which
``webdataset`` shuffles. The order is not exact: it depends on the numbers of ranks and workers, a sample may
occur twice in an epoch or not at all, and a resumed run starts another order, drawn from (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from http.client import HTTPException
from itertools import count, islice
from pathlib import Path
from typing import cast

import torch
import webdataset
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from maskgit_pl.checks import ImageSize, check_integers, height_width
from maskgit_pl.data.augmentations import Augment, Augmentations
from maskgit_pl.data.batches import Batch
from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.index import expand_braces
from maskgit_pl.data.loader import MAX_IN_A_ROW
from maskgit_pl.data.samples import Labels, Sample
from maskgit_pl.data.scan import BAD_IMAGE, scan_shard
from maskgit_pl.data.tar import BLOCK, member_label
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.files import open_regular
from maskgit_pl.randomness import permutation
from maskgit_pl.text import printable, size_text

log = logging.getLogger(__name__)

_SILENT_SECONDS = 60.0  # longest time in which a server may send nothing
_MAX_SHARD_BYTES = 2**35  # of a copy in TMPDIR


@dataclass(frozen=True)
class StreamConfig:
    """The training shards that ``data.source: stream`` reads. Class names and val are those of the data folder.

    Args:
        urls: Uncompressed tars (see data/README.md): http or https URLs, or local paths. Braces are expanded:
            ``https://host/train-{00000..01023}.tar``.
        samples: Approximate number of samples in all shards; this is an epoch.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``.
        shuffle_buffer: Number of samples, as file bytes, that each worker keeps in memory and draws from.

    Raises:
        ValueError: if a number is out of range, there is no URL, or a URL has another scheme.
    """

    urls: str | list[str]
    samples: int
    labels: str = "cls"
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        check_integers(self, "data.stream.", samples="[1, 2**40]", shuffle_buffer="[1, 2**24]")
        Labels(self.labels)
        self.expand()

    def expand(self) -> list[str]:
        """Returns all URLs, with their braces expanded."""
        patterns = [self.urls] if isinstance(self.urls, str) else self.urls
        urls = [url for pattern in patterns for url in expand_braces(pattern, name="data.stream.urls")]
        # A recipe may come from elsewhere: "file:" or "ftp:" would read other things.
        wrong = (url for url in urls if not url or re.match(r"(?!https?://)[a-z][\w+.-]*:", url, re.IGNORECASE))
        if not urls or (wrong_url := next(wrong, None)) is not None:
            raise ValueError(
                "data.stream.urls must be paths, or URLs that begin with https:// or http://, got "
                f"{wrong_url if urls else urls!r}; copy the shards of other places to a folder"
            )
        return urls

    @property
    def fingerprint(self) -> str:
        """The SHA-256, hex, of the URLs and the source of the labels; the samples themselves are not known."""
        return hashlib.sha256(json.dumps([self.expand(), self.labels]).encode()).hexdigest()


@dataclass(eq=False)
class StreamBatches(Dataset[Batch]):
    """A dataset of training batches from a stream.

    1. The list of shards is repeated endlessly, in another random order each time.
    2. The shards are dealt in turn to all workers of all ranks.
    3. Each worker keeps ``shuffle_buffer`` samples in memory and draws from them at random.

    The rows are numbered by their positions in the stream of the run, step * global batch + slot: ``index`` and
    ``position`` are this number, ``epoch`` counts each ``samples`` of them. So masks, flips and crops differ each time
    that a sample occurs. Unreadable images are skipped with a warning; 100 in a row end the run.

    Args:
        stream: The shards.
        class_names: Class names; labels are in [0, len(class_names)).
        image_size: Side of square images, or (height, width), in pixels.
        in_channels: Channels of the images, 1 or 3.
        augmentations: Crops and flips.
        seed: Seed of the order and the augmentations, in [0, 2**32).
        rank: This rank, in [0, world_size).
        world_size: Number of ranks.
        first_step: The step at which the run starts or resumes.
    """

    stream: StreamConfig
    class_names: tuple[str, ...]
    _: KW_ONLY
    image_size: ImageSize
    in_channels: int
    augmentations: Augmentations
    seed: int
    rank: int = 0
    world_size: int = 1
    first_step: int = 0

    def __post_init__(self) -> None:
        self.labels = Labels(self.stream.labels, self.class_names)
        self._samples: Iterator[Sample] | None = None

    def __getitems__(self, positions: range) -> Batch:
        """Returns the next samples of this worker, in the rows of the given positions.

        Raises:
            ValueError: if a shard cannot be read or has an incomplete sample. The message names it.
            DataBudgetError: if 100 images in a row are unreadable.
        """
        if self._samples is None:
            self._samples = self._shuffle()
        samples, position = self._samples, torch.arange(positions.start, positions.stop)
        index, epoch = position % 2**32, position // self.stream.samples  # random_bits takes indices below 2**32
        drawn = self.augmentations.draw(index, epoch, seed=self.seed)
        images, labels = zip(*(self._next(samples, augment) for augment in drawn), strict=True)
        valid, replacement = torch.ones_like(position, dtype=torch.bool), torch.full_like(position, -1)
        return Batch(torch.stack(images), torch.tensor(labels), index, epoch, position, valid, replacement)

    def _next(self, samples: Iterator[Sample], augment: Augment) -> tuple[Tensor, int]:
        """Returns image and label of the next sample that can be decoded."""
        for sample in islice(samples, MAX_IN_A_ROW):
            try:
                image = decode_image(sample.data, channels=self.in_channels, name=sample.name)
            except UnreadableImageError as error:
                log.warning("stream: skipped %s", error)
                continue
            return augment(image, height_width(self.image_size)), sample.label
        raise DataBudgetError(f"stream: {MAX_IN_A_ROW} images in a row cannot be read, the last is {sample.name}")

    def _shuffle(self) -> Iterator[Sample]:
        """Starts the endless sequence of samples of this worker."""
        # 2. Worker ``index`` of all workers takes every (world_size * workers)-th shard.
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index = self.rank * workers + number
        urls = islice(self._endless_urls(), index, None, self.world_size * workers)
        # 3. The buffer is full before the first sample is drawn.
        chance, size = random.Random(f"{self.seed}/{self.first_step}/{index}"), self.stream.shuffle_buffer
        samples = _read_samples(urls, self.labels)
        return cast("Iterator[Sample]", webdataset.shuffle(size, initial=size, rng=chance)(samples))

    def _endless_urls(self) -> Iterator[str]:
        # 1. The same order on all workers.
        urls = self.stream.expand()
        positions, seed = torch.arange(len(urls)), self.seed
        for epoch in count():
            order = permutation(
                positions, len(urls), stream="order/stream", seed=seed, index=self.first_step, epoch=epoch
            )
            yield from (urls[number] for number in order.tolist())


def _read_samples(urls: Iterable[str], labels: Labels) -> Iterator[Sample]:
    """Yields the samples of shards in their order, without those whose image header cannot be read.

    Raises:
        ValueError: if a shard cannot be read, is no complete tar, has no samples, or has another fault.
    """
    for url in urls:
        name = f"stream {printable(url)}"
        try:
            with _open_shard(url) as path, open(open_regular(path), "rb") as file:
                scan = scan_shard(path, labels, vectors=False)
                unreadable = scan.faults.pop(BAD_IMAGE, None)
                faults = [f"{entry.samples} {fault} (first {entry.first})" for fault, entry in scan.faults.items()]
                if scan.damage or faults or not len(scan.rows):
                    raise ValueError(
                        f"not a complete tar of samples: {scan.damage or '; '.join(faults) or 'no images'}"
                    )
                if unreadable is not None:
                    log.warning("%s: skipped %d images (first %s)", name, unreadable.samples, unreadable.first)
                for _, offset, size, label in scan.rows.tolist():
                    data = os.pread(file.fileno(), BLOCK + size, offset - BLOCK)  # after the header of the member
                    yield Sample(data[BLOCK:], "", label, member_label(url, data[:BLOCK], offset))
        except (OSError, HTTPException, ValueError) as error:
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(f"{name}: cannot be read: {kind}{error}") from error


@contextmanager
def _open_shard(url: str) -> Iterator[Path]:
    """Returns a path, or that of a temporary copy: a server does not wait while training validates or saves."""
    if not re.match(r"https?:", url, re.IGNORECASE):
        yield Path(url)
        return
    with tempfile.TemporaryFile() as file:  # it has no name, so that nothing is left after a kill
        with urllib.request.urlopen(url, timeout=_SILENT_SECONDS) as response:
            for block in iter(partial(response.read, 2**20), b""):
                file.write(block)
                if file.tell() > _MAX_SHARD_BYTES:
                    raise ValueError(f"more than {size_text(_MAX_SHARD_BYTES)}")
        file.flush()
        yield Path(f"/dev/fd/{file.fileno()}")

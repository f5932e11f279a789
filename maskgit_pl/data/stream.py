"""Training batches from shards at trusted URLs, which webdataset reads. Order and resume are not exact."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Any

import torch
import webdataset
from torch import Tensor
from torch.utils.data import Dataset

from maskgit_pl.checks import ImageSize, check_integers, height_width
from maskgit_pl.data.augmentations import Augmentations
from maskgit_pl.data.batches import Batch
from maskgit_pl.data.image_bytes import UnreadableImageError
from maskgit_pl.data.images import decode_image
from maskgit_pl.data.index import expand_braces
from maskgit_pl.data.samples import Labels
from maskgit_pl.data.scan import IMAGE_EXTENSIONS
from maskgit_pl.text import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamConfig:
    """The training shards that ``data.source: stream`` reads. Class names and val are those of the data folder.

    Args:
        urls: Tars at http or https URLs, or local paths, with braces: ``https://host/train-{00000..01023}.tar``.
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
        # A recipe of a stranger must run nothing: webdataset runs "pipe:", and older ones a shell for curl 'URL'.
        wrong = [url for url in urls if not re.fullmatch(r"https?://[^\s']+|(?![\w+.-]+:|-).+", url)]
        if wrong or not urls:
            raise ValueError(
                "data.stream.urls must be paths, or URLs that begin with https:// or http:// and have no quotes, got "
                f"{wrong[0] if wrong else urls!r}; copy the shards of other places to a folder"
            )
        return urls

    @property
    def fingerprint(self) -> str:
        """The SHA-256, hex, of the URLs and the source of the labels; the samples themselves are not known."""
        return hashlib.sha256(json.dumps([self.expand(), self.labels]).encode()).hexdigest()


@dataclass(eq=False)
class StreamBatches(Dataset[Batch]):
    """A dataset of training batches, whose rows are numbered by step * global batch + slot.

    This number is ``index`` and ``position``, and ``epoch`` counts each ``stream.samples`` of them: masks, flips and
    crops differ each time that a sample occurs.

    Args:
        stream: The source of the labels, the number of samples, and the size of the buffer.
        class_names: Class names; labels are in [0, len(class_names)).
        shards: The URLs of this rank, in random order.
        image_size: Side of square images, or (height, width), in pixels.
        in_channels: Channels of the images, 1 or 3.
        augmentations: Crops and flips.
        seed: Seed of the order and the augmentations, in [0, 2**32).
    """

    stream: StreamConfig
    class_names: tuple[str, ...]
    _: KW_ONLY
    shards: list[str]
    image_size: ImageSize
    in_channels: int
    augmentations: Augmentations
    seed: int

    def __post_init__(self) -> None:
        self.labels = Labels(self.stream.labels, self.class_names)
        self._samples: Iterator[tuple[Tensor, int]] | None = None

    def __getitems__(self, positions: range) -> Batch:
        """Returns the next samples of this worker, in the rows of the given positions."""
        if self._samples is None:  # in the worker
            self._samples = self._read_samples() if self.shards else iter(())
        position = torch.arange(positions.start, positions.stop)
        index, epoch = position % 2**32, position // self.stream.samples  # random_bits takes indices below 2**32
        samples = list(islice(self._samples, len(position)))
        if len(samples) < len(position):
            raise ValueError("data.stream.urls must name a shard with images for each worker of each rank, got too few")
        drawn = self.augmentations.draw(index, epoch, seed=self.seed)
        size = height_width(self.image_size)
        images = [augment(image, size) for augment, (image, _) in zip(drawn, samples, strict=True)]
        labels = torch.tensor([label for _, label in samples])
        valid, replacement = torch.ones_like(position, dtype=torch.bool), torch.full_like(position, -1)
        return Batch(torch.stack(images), labels, index, epoch, position, valid, replacement)

    def _read_samples(self) -> Iterator[tuple[Tensor, int]]:
        # The rank has its shards already: webdataset would ask the environment of a worker for it. Older versions take
        # seed 0 for none.
        order: dict[str, Any] = {"nodesplitter": None, "shardshuffle": len(self.shards), "detshuffle": True}
        source = webdataset.WebDataset(self.shards, handler=_handle, seed=1 + self.seed, empty_check=False, **order)
        size = self.stream.shuffle_buffer
        shuffled = source.shuffle(size, initial=size, rng=random.Random(self.seed))
        return iter(shuffled.map(self._decode, handler=_handle).repeat())

    def _decode(self, sample: dict[str, Any]) -> tuple[Tensor, int]:
        name, extension = f"{sample['__url__']}:{sample['__key__']}", self.labels.extension
        image = next((sample[kind] for kind in IMAGE_EXTENSIONS if kind in sample), None)
        if image is None or (extension is not None and extension not in sample):
            raise ValueError(f"{name} without an image or a label ({self.stream.labels})")
        label = 0 if extension is None else self.labels.read(sample[extension], name=name)
        return decode_image(image, channels=self.in_channels, name=name), label


def _handle(error: Exception) -> bool:
    """Skips an image that cannot be read. Another error ends the run; webdataset adds the URL to its arguments."""
    parts = [part for part in (*error.args, getattr(error, "filename", None)) if isinstance(part, str)]
    text = printable(": ".join(parts))
    if not isinstance(error, UnreadableImageError):
        raise ValueError(f"data.stream.urls must name shards that can be read, URLs by curl, got {text}") from error
    log.warning("stream: skipped %s", text)
    return True

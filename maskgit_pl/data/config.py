"""Configuration of the data of a run: the recipe's group ``data``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maskgit_pl.checks import check_choice, check_integer, check_number, check_seed, shorten
from maskgit_pl.data.order import BATCH_SIZE_RANGE, check_window
from maskgit_pl.shards.braces import MAX_NAMES, expand_braces
from maskgit_pl.shards.images import Crop, check_crop
from maskgit_pl.shards.scan import MAX_CLASSES, Labels
from maskgit_pl.shards.unreadable import check_budget

__all__ = ["ShardDataConfig", "StreamConfig", "check_stream", "expand_urls"]

_SCHEMES = (
    "abfs", "az", "file", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "s3", "sftp", "ssh", "webhdfs"
)  # fmt: skip


@dataclass(frozen=True)
class StreamConfig:
    """The shards that ``data.source: stream`` reads.

    Args:
        urls: Training shards: https, s3, gs, file and so on, or local paths; braces count:
            ``https://host/train-{00000..01023}.tar``. Uncompressed tars, as data/README.md describes them.
        samples: Approximate number of samples in all of them: an epoch.
        classes: Class names, or how many classes there are; None takes those of the data folder.
        validation_urls: Shards to validate on, in this order; None validates on the val split of the data folder.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``.
        shuffle_buffer: Samples, as file bytes, that each worker holds and draws from.
        stall_seconds: A shard of which no byte arrives for so long ends the run.
        attempts: Number of times that a shard is asked for before it counts as unreachable.

    Raises:
        ValueError: if a number is out of range, there is no URL, or one is of a kind that is not read.
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
        """One name for each class; numbers if there is only a count, None if the stream names no classes."""
        if isinstance(self.classes, int):
            return tuple(str(label) for label in range(self.classes))
        return None if self.classes is None else tuple(self.classes)

    @property
    def fingerprint(self) -> str:
        """SHA-256, hex, of the URLs, classes and labels; the samples themselves are not known."""
        what = [expand_urls("urls", self.urls), self.class_names, self.labels]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def check_stream(config: StreamConfig | None, validation_samples: int | None) -> StreamConfig:
    """Checks that a stream has what training and validation need.

    Returns:
        ``config``.

    Raises:
        ValueError: if there is no stream, or there are validation URLs without a number of validation samples.
    """
    if config is None:
        raise ValueError("data.stream: source stream reads data.stream.urls, got none")
    if config.validation_urls is not None and validation_samples is None:
        raise ValueError("data.validation_samples: a number is needed with data.stream.validation_urls, got none")
    return config


def expand_urls(name: str, urls: str | Sequence[str]) -> list[str]:
    """Expands the braces of URLs and checks each URL.

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


@dataclass(frozen=True)
class ShardDataConfig:
    """The data of a run and how it is put into batches.

    Args:
        path: Data folder (data/README.md): shards with manifests.
        source: ``"images"`` decodes the shards, ``"tokens"`` reads a token store made from them, ``"stream"`` trains on
            shards that cannot be indexed; the folder is then used for validation, if at all.
        token_store: Folder of the token store; needed, and read, only for ``"tokens"``.
        image_size: Side of the images in pixels.
        in_channels: 1 for grey, 3 for RGB.
        crop: Place of training crops in images that are not square: ``"center"`` or ``"random"``.
        global_batch: Samples of a step, over all ranks.
        max_batch_per_device: Most samples a device takes at once; micro-batch and accumulation follow from it.
        validation_batch: Samples of a validation batch on each rank.
        validation_samples: Validate on the first so many samples; None takes all.
        num_workers: Processes that read and decode, each rank; 0 reads in the training process.
        seed: Seed of order and crops, in [0, 2**32).
        shuffle_window: Shuffle within so many shards at a time, for disks that are slow to seek; None shuffles the
            whole split. See ``WindowedStream`` for what it costs.
        stream: The shards of ``"stream"``; see ``StreamBatches`` for what is then not exact.
        unreadable_budget: Share of the images seen that may be unreadable and replaced before the run ends; 10
            different ones are allowed in any case, 0 allows none. See ``UnreadableImages``.

    Raises:
        ValueError: if a value is out of range, or the source lacks what it reads.
    """

    path: str
    source: Literal["images", "tokens", "stream"] = "images"
    token_store: str | None = None
    image_size: int = 256
    in_channels: int = 3
    crop: Crop = "center"
    global_batch: int = 256
    max_batch_per_device: int = 32
    validation_batch: int = 64
    validation_samples: int | None = None
    num_workers: int = 0
    seed: int = 0
    shuffle_window: int | None = None
    stream: StreamConfig | None = None
    unreadable_budget: float = 1e-4

    def __post_init__(self) -> None:
        check_crop(self.crop)
        check_budget(self.unreadable_budget)
        check_window(self.shuffle_window)
        check_integer("data.image_size", self.image_size, "[1, 8192]")
        for name in ("global_batch", "max_batch_per_device", "validation_batch"):
            check_integer(f"data.{name}", getattr(self, name), BATCH_SIZE_RANGE)
        check_integer("data.num_workers", self.num_workers, "[0, 1024]")
        check_seed("data.seed", self.seed)
        if self.validation_samples is not None:
            check_integer("data.validation_samples", self.validation_samples, "[1, 4294967296]")
        if self.in_channels not in (1, 3):
            raise ValueError(f"data.in_channels must be 1 or 3, got {shorten(self.in_channels)}")
        check_choice("data.source", self.source, ("images", "tokens", "stream"))
        if self.source == "stream":
            check_stream(self.stream, self.validation_samples)
        if self.source == "tokens":
            self._check_tokens()

    def _check_tokens(self) -> None:
        if self.token_store is None:
            raise ValueError("data.token_store: source tokens reads a token store, got none; `make tokenize` makes one")
        if self.crop != "center":
            raise ValueError(
                f"data.crop: tokens keep the crops that they were made with, got {self.crop!r}; leave the key out and "
                "use `maskgit tokenize --crops N`, or use source images"
            )

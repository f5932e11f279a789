"""Configuration of the data of a run: the group ``data`` of a recipe. Used by ``ShardData`` and ``maskgit train``."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from maskgit_pl.checks import (
    ImageSize,
    check_channels,
    check_choice,
    check_image_size,
    check_integer,
    check_number,
    check_seed,
)
from maskgit_pl.data.augmentations import Augmentations, build_augmentations
from maskgit_pl.data.images import Crop
from maskgit_pl.data.order import BATCH_SIZE_RANGE
from maskgit_pl.data.reader import MAX_NAMES, expand_braces
from maskgit_pl.data.samples import MAX_CLASSES, Labels

__all__ = ["ShardDataConfig", "StreamConfig", "expand_urls"]


@dataclass(frozen=True)
class StreamConfig:
    """The shards that ``data.source: stream`` reads.

    Args:
        urls: Training shards, uncompressed tars (see data/README.md): http or https URLs, or local paths. Braces are
            expanded: ``https://host/train-{00000..01023}.tar``.
        samples: Approximate number of samples in all shards; this is an epoch.
        classes: Class names, or the number of classes; None takes the classes of the data folder.
        validation_urls: Shards for validation, read in this order; None validates on the val split of the data folder.
        labels: Source of the labels: ``"cls"``, ``"json:FIELD"`` or ``"none"``.
        shuffle_buffer: Number of samples, as file bytes, that each worker keeps in memory and draws from.

    Raises:
        ValueError: if a number is out of range, there is no URL, or a URL has another scheme.
    """

    urls: str | list[str]
    samples: int
    classes: int | list[str] | None = None
    validation_urls: str | list[str] | None = None
    labels: str = "cls"
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        check_integer("data.stream.samples", self.samples, "[1, 1099511627776]")
        check_integer("data.stream.shuffle_buffer", self.shuffle_buffer, "[1, 16777216]")
        if isinstance(self.classes, int):
            check_integer("data.stream.classes", self.classes, f"[1, {MAX_CLASSES}]")
        Labels(self.labels)
        expand_urls("urls", self.urls)
        if self.validation_urls is not None:
            expand_urls("validation_urls", self.validation_urls)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names: numbers if only their count is given, None if the stream has no class names."""
        if isinstance(self.classes, int):
            return tuple(str(label) for label in range(self.classes))
        return None if self.classes is None else tuple(self.classes)

    @property
    def fingerprint(self) -> str:
        """The SHA-256, hex, of the URLs, classes and labels; the samples themselves are not known."""
        content = [expand_urls("urls", self.urls), self.class_names, self.labels]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def expand_urls(name: str, urls: str | list[str]) -> list[str]:
    """Expands the braces of ``urls`` or ``validation_urls`` and checks each URL.

    Raises:
        ValueError: if there are no URLs or too many, or one has another scheme.
    """
    found: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        try:
            found += expand_braces(pattern)
        except ValueError as error:
            raise ValueError(f"data.stream.{name}: {error}") from error
        if len(found) > MAX_NAMES:
            raise ValueError(f"data.stream.{name} must name at most {MAX_NAMES} shards, got more")
    if not found or not all(found):
        raise ValueError(f"data.stream.{name} must have at least 1 URL and no empty one, got {urls!r}")
    # A recipe may come from elsewhere: "file:" or "ftp:" would read other things.
    for url in found:
        if re.match(r"(?!https?://)[a-z][\w+.-]*:", url, re.IGNORECASE):
            raise ValueError(
                f"data.stream.{name} must be paths, or URLs that begin with https:// or http://, got {url!r}; copy the "
                "shards of other places to a folder"
            )
    return found


@dataclass(frozen=True)
class ShardDataConfig:
    """The data of a run and its batches.

    Args:
        path: Data folder: shards with manifests (see data/README.md).
        source: ``"images"`` decodes the shards, ``"tokens"`` reads a token store made from them, ``"stream"`` trains on
            shards that cannot be indexed and uses the folder only for validation, if at all.
        token_store: Folder of the token store; required for ``"tokens"``, else unused.
        image_size: Side of square images, or [height, width], in pixels. The largest part of an image with this shape
            is cropped and resized.
        in_channels: 1 for grey, 3 for RGB. Files are converted, and transparent images are composited over white.
        augmentations: Crops and flips of the training images: names or mappings of registered augmentations, in the
            order in which they are applied. With ``"tokens"``, ``maskgit tokenize`` applies them. None is
            ``[center_crop]``.
        crop: Short for ``augmentations: [center_crop]`` (``"center"``) or ``[random_crop]`` (``"random"``).
        views: Number of views of each training image in the token store: the central crop, then augmented ones (random
            crops without ``augmentations``). Training draws one of them in each epoch. None is 1, or the number that an
            existing store has.
        global_batch: Number of samples per step, over all ranks.
        max_batch_per_device: Largest micro-batch of a device; micro-batch and accumulation are derived from it.
        validation_batch: Number of samples of a validation batch on each rank.
        validation_samples: Number of samples to validate on, the first of the split; None takes all.
        num_workers: Number of processes on each rank that read and decode; 0 reads in the training process.
        seed: Seed of order and crops, in [0, 2**32).
        shuffle_window: Number of shards to shuffle within at a time, for disks with slow seeks; None shuffles the whole
            split. See ``WindowedStream`` for its effect on batches.
        stream: The shards of ``"stream"``; see ``StreamBatches`` for its limits.
        unreadable_budget: Fraction of the images seen that may be unreadable and replaced, in [0, 1]. Above 0, 10
            different images are always allowed; 0 allows none. See ``UnreadableImages``.
        vectors: True reads the vector of each sample, which conditions the network of stage 2 together with the class.

    Raises:
        ValueError: if a value is out of range, or a setting of the source is missing.
    """

    path: str
    source: Literal["images", "tokens", "stream"] = "images"
    token_store: str | None = None
    image_size: ImageSize = 256
    in_channels: int = 3
    augmentations: list[str | dict[str, Any]] | None = None
    crop: Crop = "center"
    views: int | None = None
    global_batch: int = 256
    max_batch_per_device: int = 32
    validation_batch: int = 64
    validation_samples: int | None = None
    num_workers: int = 0
    seed: int = 0
    shuffle_window: int | None = None
    stream: StreamConfig | None = None
    unreadable_budget: float = 1e-4
    vectors: bool = False

    def __post_init__(self) -> None:
        # All values are checked here, before data is read or a process group starts.
        _ = self.train_augmentations  # raises if a name or a value is wrong
        object.__setattr__(self, "image_size", check_image_size("data.image_size", self.image_size, "[1, 8192]"))
        check_channels("data.in_channels", self.in_channels)
        check_seed("data.seed", self.seed)
        check_number("data.unreadable_budget", self.unreadable_budget, "[0, 1]")
        for name in ("global_batch", "max_batch_per_device", "validation_batch"):
            check_integer(f"data.{name}", getattr(self, name), BATCH_SIZE_RANGE)
        check_integer("data.num_workers", self.num_workers, "[0, 1024]")
        for name, interval in (("views", "[1, 65536]"), ("validation_samples", "[1, 4294967296]")):
            if getattr(self, name) is not None:
                check_integer(f"data.{name}", getattr(self, name), interval)
        if self.shuffle_window is not None:
            check_integer("data.shuffle_window", self.shuffle_window, "[1, inf)")
        check_choice("data.source", self.source, ("images", "tokens", "stream"))
        if self.source == "stream":
            self._check_stream()
        if self.source == "tokens":
            self._check_tokens()

    @cached_property
    def train_augmentations(self) -> Augmentations:
        """The augmentations of the training images."""
        try:
            return build_augmentations(self.augmentations, crop=self.crop)
        except ValueError as error:
            raise ValueError(
                f"data.{error}" if str(error).startswith(("crop", "augmentations")) else f"data: {error}"
            ) from error

    def _check_stream(self) -> None:
        if self.stream is None:
            raise ValueError("data.stream.urls must be given for data.source: stream, got none")
        if self.stream.validation_urls is not None and self.validation_samples is None:
            raise ValueError("data.validation_samples must be given with data.stream.validation_urls, got none")
        if self.vectors:
            raise ValueError(
                "data.vectors must be false for data.source: stream, which reads no vectors, got true; index the "
                "shards with `maskgit data index`, and use data.source: images or tokens"
            )

    def _check_tokens(self) -> None:
        if self.token_store is None:
            raise ValueError(
                "data.token_store must be given for data.source: tokens, got none; `maskgit tokenize` makes one"
            )
        if self.crop != "center":
            raise ValueError(
                f"data.crop must be 'center' for data.source: tokens, got {self.crop!r}; for random crops, use "
                "data.views, or data.source: images"
            )

"""The configuration of data and batches, the group ``data`` of a recipe, and the keys of modules that follow from it.

Imports no Lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

from maskgit_pl.checks import ImageSize, check_channels, check_choice, check_image_size, check_integers, check_number
from maskgit_pl.data.augmentations import Augmentations, build_augmentations
from maskgit_pl.data.order import BATCH_SIZE_RANGE
from maskgit_pl.data.stream import StreamConfig


@dataclass(frozen=True)
class ShardDataConfig:
    """The data of a run and its batches.

    Args:
        path: Data folder: shards with manifests (see data/README.md), or a token store, which has no images.
        source: ``"images"`` decodes the shards, ``"tokens"`` reads a token store made from them, ``"stream"``
            trains on shards that cannot be indexed and uses the folder for validation and the class names.
        token_store: Folder of the token store; required for ``"tokens"``, else unused.
        image_size: Side of square images, or [height, width], in pixels. The largest part of an image with
            this shape is cropped and resized.
        in_channels: 1 for grey, 3 for RGB. Files are converted, and transparent images are composited over white.
        augmentations: Crops and flips of the training images: names or mappings of registered augmentations,
            in the order in which they are applied. With ``"tokens"``, ``maskgit tokenize`` applies them. None
            is the central crop.
        views: Number of views of each training image in the token store: the central crop, then augmented
            ones (random crops without ``augmentations``). Training draws one of them in each epoch. None is
            1, or the number that an existing store has.
        global_batch: Number of samples per step, over all ranks.
        max_batch_per_device: Largest micro-batch of a device; micro-batch and accumulation are derived from it.
        validation_batch: Number of samples of a validation batch on each rank.
        validation_samples: Number of samples to validate on, the first of the split; None takes all.
        num_workers: Number of processes on each rank that read and decode; 0 reads in the training process.
        seed: Seed of order and crops, in [0, 2**32).
        stream: The shards of ``"stream"``.
        unreadable_budget: Fraction of the images seen that may be unreadable and replaced, in [0, 1]. Above
            0, 10 different images are always allowed; 0 allows none. See ``UnreadableImages``. Streams skip them.

    Raises:
        ValueError: if a value is out of range, or a setting of the source is missing.
    """

    path: str
    source: Literal["images", "tokens", "stream"] = "images"
    token_store: str | None = None
    image_size: ImageSize = 256
    in_channels: int = 3
    augmentations: list[str | dict[str, Any]] | None = None
    views: int | None = None
    global_batch: int = 256
    max_batch_per_device: int = 32
    validation_batch: int = 64
    validation_samples: int | None = None
    num_workers: int = 0
    seed: int = 0
    stream: StreamConfig | None = None
    unreadable_budget: float = 1e-4

    def __post_init__(self) -> None:
        # All values are checked here, before data is read or a process group starts.
        _ = self.train_augmentations  # raises if a name or a value is wrong
        object.__setattr__(self, "image_size", check_image_size("data.image_size", self.image_size, "[1, 8192]"))
        check_channels("data.in_channels", self.in_channels)
        check_number("data.unreadable_budget", self.unreadable_budget, "[0, 1]")
        check_integers(
            self,
            "data.",
            global_batch=BATCH_SIZE_RANGE,
            max_batch_per_device=BATCH_SIZE_RANGE,
            validation_batch=BATCH_SIZE_RANGE,
            num_workers="[0, 1024]",
            seed="[0, 2**32)",
            views="[1, 65536]",
            validation_samples="[1, 2**32]",
        )
        check_choice("data.source", self.source, ("images", "tokens", "stream"))
        if self.source == "stream" and self.stream is None:
            raise ValueError("data.stream.urls must be given for data.source: stream, got none")
        if self.source == "tokens" and self.token_store is None:
            raise ValueError(
                "data.token_store must be given for data.source: tokens, got none; `maskgit tokenize` makes one"
            )

    @cached_property
    def train_augmentations(self) -> Augmentations:
        """The augmentations of the training images."""
        return build_augmentations(self.augmentations)


def derive_values(config_class: type[Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the tree of a recipe with the keys of the module that follow from those of data.

    Args:
        config_class: Dataclass of the module's configuration.
        tree: Nested mappings of plain values, with the keys ``data`` and ``model``.
    """
    data, model = dict(tree.get("data", {})), {"network": {}, **tree.get("model", {})}
    names = {field.name for field in fields(config_class)}
    for name in ("seed", "global_batch", "image_size"):
        if name in names:
            model[name] = data.get(name, getattr(ShardDataConfig, name))
    if "image_size" in names:  # stage 1
        in_channels = data.get("in_channels", ShardDataConfig.in_channels)
        model["network"] = {**model["network"], "in_channels": in_channels}
    return {**tree, "data": data, "model": model}

"""The options that measurements share, classifier configurations, and decodings in measurements. Imports no torch.

All commands that measure models use it. ``run_folders`` finds what the options are applied to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from maskgit_pl.checks import (
    ImageSize,
    check_channels,
    check_image_size,
    check_integer,
    check_number,
    height_width,
    pixels_text,
)
from maskgit_pl.data.manifest import DataSummary, read_manifest_summary
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.run_folders import RunFolders
from maskgit_pl.files import read_json
from maskgit_pl.registry import describe

__all__ = [
    "PLOT_STEPS",
    "SMALL_TRAINING",
    "CASConfig",
    "ClassifierConfig",
    "MeasurementOptions",
    "Spec",
    "TokenizerOptions",
    "check_tokenizer_data",
    "choose_plot_steps",
    "decoding_key",
    "default_steps",
    "default_training",
    "describe_decoding",
    "round_to_classes",
    "with_steps",
]

Spec = str | dict[str, Any]  # name, or mapping with arguments, of a selector or schedule
PLOT_STEPS = (2, 3, 4, 6, 8, 12, 16, 24)  # values of T in the curves of mask schedules
_LEAST_IMAGES = 4  # each half of the real images needs two for a covariance
_SMALL_IMAGES = 64  # pixels; smaller images do not need more than 18 layers
_MAX_CONFIG_BYTES = 8_000_000


@dataclass(frozen=True)
class MeasurementOptions:
    """The options of every measurement of a run.

    Args:
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch; it does not change results.
        device: Device such as ``cpu``, ``cuda`` or ``cuda:1``; None for a GPU if there is one.
        dtype: Arithmetic of the transformer, as ``distributed.parse_dtype`` reads it; only of a single run.
        num_workers: Number of processes that read real images.
        classifier: Folder of the classifier of the data, which is trained if it is missing; None for
            ``runs/DATA-classifier/small``.
        negative_model: Weaker model of guidance (see ``pipeline.GenerateOptions``), only of a single run; None for that
            of the model's ``decoding.json``, if it names one.

    Raises:
        ValueError: if ``batch_size`` is less than 1.
    """

    seed: int = 0
    batch_size: int = 100
    device: str | None = None
    dtype: str | None = None
    num_workers: int = 0
    classifier: Path | None = None
    negative_model: Path | str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


def round_to_classes(num_images: int, num_classes: int, *, name: str = "num_images") -> int:
    """Returns ``num_images``, rounded down to a multiple of the number of classes.

    Args:
        num_images: Number of images.
        num_classes: Number of classes.
        name: Name of the number in errors.

    Raises:
        ValueError: if there are fewer than 2 images per class.
    """
    if num_images < 2 * num_classes:
        raise ValueError(f"{name} must be >= {2 * num_classes} (2 per class), got {num_images}")
    return num_images - num_images % num_classes


@dataclass(frozen=True)
class TokenizerOptions(MeasurementOptions):
    """Options of ``evaluate_tokenizer``; see ``MeasurementOptions`` for the others.

    The seed is not used, and ``dtype`` is the arithmetic of the tokenizer.

    Args:
        num_images: Number of random val images, >= 4; None for all.
        lpips: ``vgg=FILE``, ``alex=FILE`` or ``squeeze=FILE`` for LPIPS; None leaves it out.
        tile: Edge of the tiles in pixels, by which images of any height and width are reconstructed at their own size;
            None crops and resizes them to the image size of the tokenizer.
        tile_overlap: Least number of pixels that neighbouring tiles share, in [0, ``tile``); None for a quarter of a
            tile.

    Raises:
        ValueError: if a number is out of range, or there is an overlap without a tile.
    """

    num_images: int | None = None
    lpips: str | None = None
    tile: int | None = None
    tile_overlap: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images is not None:
            check_integer("num_images", self.num_images, f"[{_LEAST_IMAGES}, inf)")
        if self.tile is not None:
            check_integer("tile", self.tile, "[1, 8192]")
        if self.tile_overlap is not None:
            if self.tile is None:
                raise ValueError(f"tile_overlap must be given with tile, got only {self.tile_overlap}; give the tile")
            check_integer("tile_overlap", self.tile_overlap, f"[0, {self.tile - 1}]")

    @property
    def overlap(self) -> int:
        """The overlap of tiles, in pixels."""
        assert self.tile is not None
        return self.tile // 4 if self.tile_overlap is None else self.tile_overlap


def check_tokenizer_data(folders: RunFolders, options: TokenizerOptions) -> DataSummary:
    """Checks that a data folder fits a tokenizer, from JSON files only.

    Raises:
        FileNotFoundError: if there are no data.
        ValueError: if there are too few val images, they are smaller than those of the tokenizer, or they have colours
            that it does not take.
    """
    summary = read_manifest_summary(folders.data)
    config = read_json(folders.pretrained / "tokenizer" / "config.json", max_bytes=_MAX_CONFIG_BYTES)
    network = config.get("network")
    name = f"tokenizer {folders.pretrained}"
    channels = check_channels(f"{name}: in_channels", network.get("in_channels") if isinstance(network, dict) else None)
    size = check_image_size(f"{name}: image_size", config.get("image_size"), "[1, 8192]")
    where, images = f"data {folders.data}", summary.samples.get("val", 0)
    least = max(_LEAST_IMAGES, options.num_images or 0)
    if images < least:
        raise ValueError(f"{where}: the val split must have >= {least} images, got {images}; lower --num-images")
    if channels == 1 and summary.channels != 1:
        raise ValueError(f"{where}: the images must be grey for this tokenizer, got colour; choose others with --data")
    smallest = (summary.images.height[0], summary.images.width[0])
    if options.tile is None and any(have < need for have, need in zip(smallest, height_width(size), strict=True)):
        raise ValueError(
            f"{where}: the images must have >= {pixels_text(size)} pixels, those of the tokenizer, got "
            f"{pixels_text(smallest)}; choose larger images with --data, or give --tile to reconstruct them at their "
            "own size"
        )
    return summary


@dataclass(frozen=True)
class ClassifierConfig:
    """The network and the training of a classifier.

    Args:
        width: Channels of the first convolution of the small network.
        max_steps: Number of training steps.
        batch: Images per step, >= 2.
        peak_rate: Learning rate at the peak of the one-cycle schedule.
        weight_decay: Weight decay of AdamW.
        seed: Seed of weights, order and flips.
        model: ``"small"``, or the timm name of a network, e.g. ``resnet18``.
        flip_probability: Probability of a horizontal flip of a training image, in [0, 1]; use 0 for digits and letters.
        precision: Precision of the Lightning trainer.

    Raises:
        ValueError: if a number is out of range.
    """

    width: int = 24
    max_steps: int = 900
    batch: int = 128
    peak_rate: float = 4e-3
    weight_decay: float = 0.02
    seed: int = 0
    model: str = "small"
    flip_probability: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        check_integer("classifier max_steps", self.max_steps, "[1, inf)")
        check_integer("classifier batch", self.batch, "[2, inf)")  # BatchNorm requires two
        check_number("classifier peak_rate", self.peak_rate, "(0, inf)")
        check_number("classifier flip_probability", self.flip_probability, "[0, 1]")


SMALL_TRAINING = ClassifierConfig()


@dataclass(frozen=True)
class CASConfig(ClassifierConfig):
    """The network and the training of the classification accuracy score (CAS). See ``ClassifierConfig``.

    Generated and real images use the same configuration. ``"auto"`` selects the paper's network resnet50, or resnet18
    for images with sides below 64 pixels. The default training is short, for thousands of images: it takes two minutes
    on one CPU core with resnet18 and grey images of 28 pixels. For the paper's 1.2 million images, set ``max_steps`` to
    about 90 epochs (450,000 steps of 256 images), ``batch`` to 256 and ``precision`` to bf16-mixed.
    """

    model: str = "auto"
    max_steps: int = 500
    batch: int = 64
    peak_rate: float = 1e-3
    weight_decay: float = 0.05

    def for_images(self, image_size: ImageSize) -> CASConfig:
        """Returns the configuration with ``"auto"`` replaced by the network for this image size."""
        if self.model != "auto":
            return self
        return replace(self, model="resnet18" if max(height_width(image_size)) < _SMALL_IMAGES else "resnet50")


def default_training(model: str) -> ClassifierConfig:
    """Returns the default training of a network from random weights.

    Args:
        model: ``"small"``, or the timm name of a network; timm networks use a smaller learning rate.
    """
    if model == SMALL_TRAINING.model:
        return SMALL_TRAINING
    return ClassifierConfig(model=model, max_steps=1000, batch=64, peak_rate=1e-3, weight_decay=0.05)


def default_steps(num_tokens: int, usual: Sequence[int]) -> tuple[int, ...]:
    """Returns the usual numbers of steps that do not exceed the number of tokens.

    Args:
        num_tokens: N.
        usual: Numbers of steps; if all of them exceed N, N is returned.
    """
    return tuple(number for number in usual if number <= num_tokens) or (num_tokens,)


def choose_plot_steps(num_tokens: int, steps: Iterable[int] = PLOT_STEPS) -> tuple[int, ...]:
    """Returns the sorted, distinct numbers of steps that are at most half the number of tokens.

    With more steps, a step decides fewer than two tokens on average.

    Args:
        num_tokens: N.
        steps: Numbers of steps to choose from.

    Raises:
        ValueError: if no number of steps is left.
    """
    most = max(2, num_tokens // 2)  # at least 2, even for 2 or 3 tokens
    wanted = tuple(sorted({number for number in steps if number <= most}))
    if not wanted:
        raise ValueError(f"num_steps must be <= {most}, half the number of tokens, got only {list(steps)}")
    return wanted


def with_steps(decoding: DecodingConfig, num_steps: int) -> DecodingConfig:
    """Returns the decoding with another number of steps, and without ``tokens_per_step``, whose length is T."""
    return replace(decoding, num_steps=num_steps, tokens_per_step=None)


def decoding_key(decoding: DecodingConfig) -> dict[str, Any]:
    """Returns the ledger key of a decoding: token selector, guidance, and all fields that differ from their default.

    Rows remain valid when a field is added.
    """
    usual = {field.name: field.default for field in fields(DecodingConfig)}
    given = {name: value for name, value in asdict(decoding).items() if value != usual[name]}
    named = {"token_selector": decoding.token_selector, "guidance": decoding.guidance}
    changed: dict[str, Any] = json.loads(json.dumps({**named, **given}, sort_keys=True))
    return changed


def describe_decoding(decoding: DecodingConfig, *, steps: bool = True) -> str:
    """Returns a decoding in one line, without fields that have their default.

    Args:
        decoding: The decoding.
        steps: True to begin with the number of steps.
    """
    temperature = decoding.sampling_temperature
    parts = [f"T {decoding.num_steps}"] if steps else []
    parts += [describe(decoding.token_selector), f"guidance {describe(decoding.guidance)}"]
    shown = f"{temperature[0]:g} to {temperature[1]:g}" if isinstance(temperature, tuple) else f"{temperature:g}"
    parts += [f"temperature {shown}"] if temperature != 1 else []
    for name in ("top_k", "top_p", "tokens_per_step", "mask_schedule"):
        value = getattr(decoding, name)
        parts += [] if value is None else [f"{name} {describe(value) if isinstance(value, str | dict) else value}"]
    return ", ".join(parts)

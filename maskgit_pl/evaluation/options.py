"""The options that measurements share, classifier configurations, and decodings in measurements. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from maskgit_pl.checks import ImageSize, check_choice, check_integer, check_number, height_width
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.registry import describe

Spec = str | dict[str, Any]  # name, or mapping with arguments, of a selector, a schedule or a feature network
Dtype = Literal["auto", "float32", "bfloat16"]
Precision = Literal["32-true", "bf16-mixed"]

CLASSIFIER = "classifier"  # label of the classifier of the data at hand
FEATURES: tuple[Spec, ...] = (CLASSIFIER, "lite0")
_SMALL_IMAGES = 64  # pixels; smaller images do not need more than 18 layers
_BOUNDS = {  # of the integers below
    "batch_size": "[1, inf)",
    "num_workers": "[0, inf)",
    "seed": "[0, 2**32)",
    "num_images": "[4, inf)",  # each half needs two for a covariance
    "likelihood_images": "[2, inf)",
}


@dataclass(frozen=True)
class MeasurementOptions:
    """Options of every measurement.

    Args:
        batch_size: Images per batch; it does not change results.
        device: cpu, cuda, cuda:1, mps ... (default: a GPU if there is one).
        num_workers: Processes that read real images (default: 0).
    """

    batch_size: int = 100
    device: str | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name in _BOUNDS):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), _BOUNDS[name])


@dataclass(frozen=True)
class ModelOptions(MeasurementOptions):
    """Options of the measurements of one model.

    Args:
        seed: Seed of the first image; image i has seed + i (default: 0).
        dtype: Arithmetic of the transformer; auto: bfloat16 on devices with instructions for it, else float32
            (default: auto on a GPU, else that of the weights).
        negative_model: Weaker model that guidance moves away from, such as an early checkpoint of the run: a
            run or a folder of `maskgit export` (default: that of the folder, or none).
    """

    seed: int = 0
    dtype: Dtype | None = None
    negative_model: Path | str | None = None


@dataclass(frozen=True)
class EvaluationOptions(ModelOptions):
    """Options of ``evaluate``.

    Args:
        data: Data folder (default: that of the training).
        num_images: Number of generated images, at least 2 per class, and of real ones beside them; see
            --reconstruction-images and --likelihood-images for the other measurements.
        features: Feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings.
        out: Results; pictures, ledger and images are written beside it (default: RUN/evaluation.json).
        num_steps: Number of decoding steps (default: the model's own).
        reference: Statistics or images of ADM in a .npz file, in place of the val split.
        reconstruction_images: Number of real images to reconstruct, at least as many as are generated (default: all
            of the val split).
        likelihood_images: Number of real images for the likelihood.
        resume: Keep the measurements of an interrupted evaluation.
        lpips: torchvision's weight file of VGG-16, for the LPIPS of reconstructions (default: it is not measured).

    Raises:
        ValueError: if a number is out of range.
    """

    data: Path | None = None
    num_images: int = 1000
    features: Sequence[Spec] = FEATURES
    out: Path | None = None
    num_steps: int | None = None
    reference: Path | None = None
    reconstruction_images: int | None = None
    likelihood_images: int = 2000
    resume: bool = False
    lpips: Path | None = None


@dataclass(frozen=True)
class TuningOptions(ModelOptions):
    """Options of ``tune``.

    In Python, None stands for all selectors or schedules, and an empty list of schedules keeps the model's own.

    Args:
        data: Data folder (default: that of the training).
        trials: Number of trials, with those of earlier calls.
        metric: fid, kid or another metric of `maskgit plugins metrics`, in the features of the data's own
            classifier, or class_agreement with it.
        num_images: Images generated for each trial, at least 2 per class.
        out: Folder of the study, the page and the ledger (default: RUN/tuning, and the ledger of RUN/evaluation).
        num_steps: Numbers of decoding steps to try (default: 4,6,8,12,16, at most the tokens per image).
        selectors: Token selectors to try: names, or mappings such as {name: remdm, eta: 0.4}, whose
            arguments are fixed (default: all).
        schedules: Mask schedules to try besides the model's own: names, mappings such as {name: pow,
            exponent: 2.5}, or pow (any exponent); own: only the model's (default: all).
    """

    data: Path | None = None
    trials: int = 40
    metric: str = "fid"
    num_images: int = 500
    out: Path | None = None
    num_steps: Sequence[int] | None = None
    selectors: Sequence[Spec] | None = None
    schedules: Sequence[Spec] | None = None


@dataclass(frozen=True)
class ReportOptions(MeasurementOptions):
    """Options of tables, figures and ablations.

    Args:
        data: Data folder (default: that of the training).
        seed: Seed of the first image; image i has seed + i (default: 0).
        num_images: Images generated for each row.
        features: Feature networks: classifier, lite0, inception[=FILE], timm:MODEL=FILE, or mappings; the
            first one ranks results.
        reference: Statistics or images of ADM in a .npz file, in place of the val split.
        results: Folder of the pages and the ledger, whose measurements are reused.

    Raises:
        ValueError: if a number is out of range.
    """

    data: Path | None = None
    seed: int = 0
    num_images: int = 1000
    features: Sequence[Spec] = FEATURES
    reference: Path | None = None
    results: Path = Path("results")


def round_to_classes(num_images: int, num_classes: int) -> int:
    """Returns ``num_images``, rounded down to a multiple of the number of classes, at least 2 per class."""
    if num_images < 2 * num_classes:
        raise ValueError(f"num_images must be >= {2 * num_classes} (2 per class), got {num_images}")
    return num_images - num_images % num_classes


def refuse_options_of_images(options: EvaluationOptions | ReportOptions) -> None:
    """Refuses the options that need images, for a model of tokens of another tokenizer."""
    for name in ("features", "reference", "reconstruction_images", "lpips"):
        value, default = (getattr(owner, name, None) for owner in (options, type(options)))
        if value != default:
            raise ValueError(f"{name} must be left out for tokens of another tokenizer, got {value}")


@dataclass(frozen=True)
class TokenizerOptions(MeasurementOptions):
    """Options of ``evaluate_tokenizer``.

    Args:
        num_images: Number of random val images, at most all (default: all).
        dtype: Arithmetic of the tokenizer; auto: bfloat16 on devices with instructions for it, else float32
            (default: auto on a GPU, else that of the weights).
        lpips: torchvision's weight file of VGG-16, for the LPIPS of reconstructions (default: it is not measured).

    Raises:
        ValueError: if a number is out of range.
    """

    num_images: int | None = None
    lpips: Path | None = None
    dtype: Dtype | None = None


@dataclass(frozen=True)
class ClassifierConfig:
    """The network and the training of a classifier.

    Args:
        width: Channels of the first convolution of the small network.
        max_steps: Number of training steps.
        batch: Images per step, >= 2.
        peak_rate: Learning rate at the peak of the one-cycle schedule.
        weight_decay: Weight decay of AdamW.
        seed: Seed of weights and order.
        model: ``"small"``, or the timm name of a network, e.g. ``resnet18``.
        precision: Arithmetic of the training: float32, or bfloat16 by autocast.

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
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        check_integer("max_steps", self.max_steps, "[1, inf)")
        check_integer("batch size of the classifier", self.batch, "[2, inf)")  # BatchNorm requires two
        check_number("learning rate of the classifier", self.peak_rate, "(0, inf)")
        check_choice("precision", self.precision, get_args(Precision))


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
    """Returns the default training of a network; timm networks use a smaller learning rate than ``small``."""
    if model == SMALL_TRAINING.model:
        return SMALL_TRAINING
    return ClassifierConfig(model=model, max_steps=1000, batch=64, peak_rate=1e-3, weight_decay=0.05)


def default_steps(num_tokens: int, usual: Sequence[int]) -> tuple[int, ...]:
    """Returns the usual numbers of steps that do not exceed the number N of tokens; N if all of them do."""
    return tuple(number for number in usual if number <= num_tokens) or (num_tokens,)


def with_steps(decoding: DecodingConfig, num_steps: int) -> DecodingConfig:
    """Returns the decoding with another number of steps, and without ``tokens_per_step``, whose length is T."""
    return replace(decoding, num_steps=num_steps, tokens_per_step=None)


def decoding_key(decoding: DecodingConfig) -> dict[str, Any]:
    """Returns the ledger key of a decoding: token selector, guidance, and all fields that differ from their default.

    Rows remain valid when a field is added.
    """
    usual = {field.name: field.default for field in fields(DecodingConfig)}
    always = ("token_selector", "guidance")
    key = {name: value for name, value in asdict(decoding).items() if name in always or value != usual[name]}
    plain: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True))
    return plain


def describe_decoding(decoding: DecodingConfig) -> str:
    """Returns a decoding in one line, without fields that have their default."""
    temperature = decoding.sampling_temperature
    parts = [f"T {decoding.num_steps}", describe(decoding.token_selector), f"guidance {describe(decoding.guidance)}"]
    text = f"{temperature[0]:g} to {temperature[1]:g}" if isinstance(temperature, tuple) else f"{temperature:g}"
    parts += [f"temperature {text}"] if temperature != 1 else []
    for name in ("top_k", "tokens_per_step", "mask_schedule"):
        value = getattr(decoding, name)
        parts += [] if value is None else [f"{name} {describe(value) if isinstance(value, str | dict) else value}"]
    return ", ".join(parts)

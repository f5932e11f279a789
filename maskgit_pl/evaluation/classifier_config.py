"""Configurations of classifiers and their training, for feature metrics and CAS. The file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.image_format import ImageSize, height_width

__all__ = ["SMALL_TRAINING", "CASConfig", "ClassifierConfig", "default_training"]

_SMALL_IMAGES = 64  # pixels; smaller images do not need more than 18 layers


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


SMALL_TRAINING = ClassifierConfig()


def default_training(model: str) -> ClassifierConfig:
    """Returns the default training of a network from random weights.

    Args:
        model: ``"small"``, or the timm name of a network; timm networks use a smaller learning rate.
    """
    if model == SMALL_TRAINING.model:
        return SMALL_TRAINING
    return ClassifierConfig(model=model, max_steps=1000, batch=64, peak_rate=1e-3, weight_decay=0.05)

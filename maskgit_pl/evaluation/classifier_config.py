"""Networks and trainings of classifiers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from maskgit_pl.checks import check_integer, check_number

__all__ = ["SMALL_TRAINING", "CASConfig", "ClassifierConfig", "default_training"]

_SMALL_IMAGES = 64  # pixels; below, a network of 18 layers has seen all there is


@dataclass(frozen=True)
class ClassifierConfig:
    """Network and training of the classifier.

    Args:
        width: Of the small network: channels of the first convolution.
        max_steps: Training steps.
        batch: Images of a step, at least 2.
        peak_rate: Learning rate at the peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        seed: Of weights, order and flips.
        model: ``"small"``, or timm's name of a network, e.g. ``resnet18``.
        flip_probability: Chance that a training image is mirrored, left to right; not for digits and letters.
        precision: Lightning's word for the numbers that it computes in.

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
        check_integer("classifier batch", self.batch, "[2, inf)")  # BatchNorm needs two
        check_number("classifier peak_rate", self.peak_rate, "(0, inf)")
        check_number("classifier flip_probability", self.flip_probability, "[0, 1]")


@dataclass(frozen=True)
class CASConfig(ClassifierConfig):
    """Network and training of the classification accuracy score; arguments as of ``ClassifierConfig``.

    The same for generated and for real images. ``"auto"`` is the paper's network, the training a short one for
    thousands of images, with AdamW and one cycle of the learning rate: two minutes of one processor core with resnet18
    and grey images of 28 pixels. For the paper's 1.2 million images set ``max_steps`` to some 90 epochs (450,000 steps
    of 256), ``batch`` to 256 and ``precision`` to bf16-mixed.
    """

    model: str = "auto"
    max_steps: int = 500
    batch: int = 64
    peak_rate: float = 1e-3
    weight_decay: float = 0.05

    def for_images(self, image_size: int) -> CASConfig:
        """Returns the same with resnet50 in place of ``"auto"``, and with resnet18 for images below 64 pixels."""
        if self.model != "auto":
            return self
        return replace(self, model="resnet18" if image_size < _SMALL_IMAGES else "resnet50")


SMALL_TRAINING = ClassifierConfig()


def default_training(model: str) -> ClassifierConfig:
    """Returns the training of a network from random weights; one of timm's takes smaller steps than the small one."""
    if model == SMALL_TRAINING.model:
        return SMALL_TRAINING
    return ClassifierConfig(model=model, max_steps=1000, batch=64, peak_rate=1e-3, weight_decay=0.05)

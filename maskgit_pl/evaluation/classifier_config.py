"""Networks and trainings of classifiers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maskgit_pl.checks import check_integer, check_number

__all__ = ["SMALL_TRAINING", "ClassifierConfig", "default_training"]


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


SMALL_TRAINING = ClassifierConfig()


def default_training(model: str) -> ClassifierConfig:
    """Returns the training of a network from random weights; one of timm's takes smaller steps than the small one."""
    if model == SMALL_TRAINING.model:
        return SMALL_TRAINING
    return ClassifierConfig(model=model, max_steps=1000, batch=64, peak_rate=1e-3, weight_decay=0.05)

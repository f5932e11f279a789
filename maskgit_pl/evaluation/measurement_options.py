"""The options that all measurements of a run share, and rules for their numbers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MeasurementOptions", "default_steps", "round_to_classes"]


@dataclass(frozen=True)
class MeasurementOptions:
    """The options of every measurement of a run.

    Args:
        seed: Seed of the first image; image i has ``seed + i``.
        batch_size: Images per batch; it does not change results.
        device: Device such as ``cpu``, ``cuda`` or ``cuda:1``; None for a GPU if there is one.
        dtype: Arithmetic of the transformer, as ``devices.parse_dtype`` reads it; only of a single run.
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


def default_steps(num_tokens: int, usual: Sequence[int]) -> tuple[int, ...]:
    """Returns the usual numbers of steps that do not exceed the number of tokens.

    Args:
        num_tokens: N.
        usual: Numbers of steps; if all of them exceed N, N is returned.
    """
    return tuple(number for number in usual if number <= num_tokens) or (num_tokens,)


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

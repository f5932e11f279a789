"""A classifier of a data folder, which measures what a model generates. Importing this file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.checks import check_integer
from maskgit_pl.evaluation.classifier_config import SMALL_TRAINING, ClassifierConfig
from maskgit_pl.evaluation.progress import Bars, no_bars

if TYPE_CHECKING:
    from maskgit_pl.data import ShardData
    from maskgit_pl.evaluation.classifier import Accuracy

__all__ = ["TrainedClassifier", "train_classifier"]

_VALIDATION_BATCH = 200


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier that is kept.

    Args:
        folder: Where it is.
        accuracy: On the real val split.
        was_there: Whether it was trained before.
        num_classes: Classes of the data.
    """

    folder: Path
    accuracy: Accuracy
    was_there: bool
    num_classes: int


def train_classifier(
    data: Path | str,
    *,
    config: ClassifierConfig = SMALL_TRAINING,
    image_size: int | None = None,
    num_workers: int = 0,
    device: str | None = None,
    out: Path | None = None,
    bars: Bars = no_bars,
) -> TrainedClassifier:
    """Trains a classifier on the train split of a data folder, keeps it, and measures it on the val split.

    One that is there, of the same data and configuration, is not trained again.

    Args:
        data: Data folder.
        config: Network and training, such as ``default_training("resnet18")``.
        image_size: Edge of the images, in pixels; None for that of the images where they are all alike.
        num_workers: Processes that read.
        device: ``cpu``, ``cuda`` ...; None for a GPU if there is one.
        out: Folder of the classifier; None for ``runs/DATA-classifier/MODEL``.
        bars: Shows the progress.

    Raises:
        FileNotFoundError: if there is no such data folder.
        ValueError: if images have several sizes and none is given, or the network is unknown.
    """
    from maskgit_pl.shards.manifest import read_manifest_summary

    check_integer("num_workers", num_workers, "[0, inf)")
    if image_size is not None:
        check_integer("image_size", image_size, "[1, inf)")
    images = read_manifest_summary(Path(data)).images  # before anything heavy is imported
    size = _image_size(data, sorted({*images.height, *images.width}), image_size)
    from maskgit_pl.devices import check_device, default_device
    from maskgit_pl.evaluation import classifier_training
    from maskgit_pl.networks.classifier import check_model

    check_model(config.model)
    place = default_device() if device is None else str(check_device(device))
    source = _open_data(Path(data), size, num_workers)
    folder = out or Path("runs") / f"{Path(data).resolve().name}-classifier" / config.model
    was_there = classifier_training.is_trained(folder, source, config)
    advance = bars(f"training {config.model}", config.max_steps)
    classifier = classifier_training.obtain_classifier(
        folder, source, config=config, on_step=lambda: advance(1), device=place
    )
    on_images = bars("real images", source.summary.samples["val"])
    accuracy = classifier_training.measure_accuracy(classifier.to(place), source, on_images=on_images)
    return TrainedClassifier(folder, accuracy, was_there, source.num_classes)


def _image_size(data: Path | str, sizes: list[int], wanted: int | None) -> int:
    """Returns the edge that was asked for, or that all images have."""
    if wanted is None and len(sizes) > 1:
        raise ValueError(
            f"image_size must be given for data {data}, whose images have edges of {sizes[0]} to {sizes[-1]} pixels"
        )
    return sizes[0] if wanted is None else wanted


def _open_data(folder: Path, size: int, num_workers: int) -> ShardData:
    from maskgit_pl.data import ShardData, ShardDataConfig
    from maskgit_pl.shards.manifest import read_manifest_summary

    data = ShardData(
        ShardDataConfig(
            str(folder),
            image_size=size,
            in_channels=read_manifest_summary(folder).channels,
            validation_batch=_VALIDATION_BATCH,
            num_workers=num_workers,
        )
    )
    data.setup()
    return data

"""``train_classifier``: a classifier of a data folder, whose features measure generated images.

Importing this file does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.checks import check_integer
from maskgit_pl.evaluation.classifier_config import SMALL_TRAINING, ClassifierConfig
from maskgit_pl.evaluation.opening import open_images
from maskgit_pl.files import check_writable
from maskgit_pl.image_format import ImageSize, check_image_size, pixels_text
from maskgit_pl.progress import Bars, no_bars

if TYPE_CHECKING:
    from maskgit_pl.evaluation.classifier import Accuracy

__all__ = ["TrainedClassifier", "train_classifier"]


@dataclass(frozen=True)
class TrainedClassifier:
    """A stored classifier.

    Args:
        folder: Folder of the classifier.
        accuracy: Accuracy on the real val split.
        is_reused: True if the folder already held it.
        num_classes: Number of classes.
    """

    folder: Path
    accuracy: Accuracy
    is_reused: bool
    num_classes: int


def train_classifier(
    data: Path | str,
    *,
    config: ClassifierConfig = SMALL_TRAINING,
    image_size: ImageSize | None = None,
    num_workers: int = 0,
    device: str | None = None,
    out: Path | None = None,
    bars: Bars = no_bars,
) -> TrainedClassifier:
    """Trains a classifier on the train split of a data folder, stores it, and measures it on the val split.

    A stored classifier of the same data and configuration is not trained again.

    Args:
        data: Data folder.
        config: Network and training, such as ``default_training("resnet18")``.
        image_size: Side of square images, or (height, width), in pixels; None for the size of the images, if all have
            the same.
        num_workers: Number of processes that read images.
        device: Device such as ``cpu`` or ``cuda``; None for a GPU if there is one.
        out: Folder of the classifier; None for ``runs/DATA-classifier/MODEL``.
        bars: Progress bars.

    Raises:
        FileNotFoundError: if the data folder does not exist.
        FileExistsError: if the folder holds another network.
        ValueError: if ``image_size`` is None and the images have several sizes, the network is unknown, or the folder
            cannot be written.
    """
    from maskgit_pl.data.manifest import read_manifest_summary

    check_integer("num_workers", num_workers, "[0, inf)")
    if image_size is not None:
        check_image_size("image_size", image_size, "[1, inf)")
    summary = read_manifest_summary(Path(data))  # before torch is imported
    least, largest = zip(summary.images.height, summary.images.width, strict=True)
    if image_size is None and least != largest:
        raise ValueError(
            f"image_size must be given for data {data}, whose images have {pixels_text(least)} to "
            f"{pixels_text(largest)} pixels"
        )
    from maskgit_pl.devices import find_device
    from maskgit_pl.evaluation import classifier_training
    from maskgit_pl.networks.feature_networks import check_model

    check_model(config.model)
    place = find_device(device)
    source = open_images(Path(data), image_size or least, summary.channels, num_workers=num_workers)
    folder = out or Path("runs") / f"{Path(data).resolve().name}-classifier" / config.model
    check_writable("out", folder, is_folder=True)
    classifier_training.check_classifier_folder(folder)
    is_reused = classifier_training.is_trained(folder, source, config)
    advance = bars(f"training {config.model}", config.max_steps)
    classifier = classifier_training.obtain_classifier(
        folder, source, config=config, on_step=lambda: advance(1), device=place
    )
    on_images = bars("real images", source.summary.samples["val"])
    accuracy = classifier_training.measure_accuracy(classifier.to(place), source, on_images=on_images)
    return TrainedClassifier(folder, accuracy, is_reused, source.num_classes)

"""A classifier of a data folder, which measures what a model generates. Importing this file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskgit_pl.checks import check_integer, check_number
from maskgit_pl.evaluation.progress import Bars, no_bars

if TYPE_CHECKING:
    from maskgit_pl.data import ShardData
    from maskgit_pl.evaluation.classifier import Accuracy, ClassifierConfig

__all__ = ["ClassifierOptions", "TrainedClassifier", "train_classifier"]

_VALIDATION_BATCH = 200


@dataclass(frozen=True)
class ClassifierOptions:
    """Options of ``train_classifier``; what is None is the default of the network.

    Args:
        steps: Training steps; 900, or 1000 of timm's networks.
        batch: Images of a step; 128, or 64 of timm's networks.
        learning_rate: Its peak; 4e-3, or 1e-3 of timm's networks.
        flip: Share of the images that is mirrored.
        precision: Lightning's word for the numbers that it computes in.
        image_size: Edge of the images, in pixels; that of the images where they are all alike.
        num_workers: Processes that read.
        seed: Of weights, order and flips.
        device: ``cpu``, ``cuda`` ...; None for a GPU if there is one.
    """

    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    flip: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    image_size: int | None = None
    num_workers: int = 0
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        bounds = {"steps": "[1, inf)", "batch": "[2, inf)", "image_size": "[1, inf)", "num_workers": "[0, inf)"}
        for name, interval in bounds.items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), interval)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, "(0, inf)")
        check_number("flip", self.flip, "[0, 1]")


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
    model: str = "small",
    out: Path | None = None,
    options: ClassifierOptions = ClassifierOptions(),  # frozen
    bars: Bars = no_bars,
) -> TrainedClassifier:
    """Trains a classifier on the train split of a data folder, keeps it, and measures it on the val split.

    One that is there, of the same data and options, is not trained again.

    Args:
        data: Data folder.
        model: ``small``, or timm's name of a network.
        out: Folder of the classifier; None for ``runs/DATA-classifier/MODEL``.
        options: The training.
        bars: Shows the progress.

    Raises:
        FileNotFoundError: if there is no such data folder.
        ValueError: if images have several sizes and none is given, or the network is unknown.
    """
    from maskgit_pl.shards.manifest import read_manifest_summary

    images = read_manifest_summary(Path(data)).images  # before anything heavy is imported
    size = _image_size(data, sorted({*images.height, *images.width}), options.image_size)
    import torch

    from maskgit_pl.devices import check_device
    from maskgit_pl.evaluation import classifier_training
    from maskgit_pl.networks.classifier import check_model

    check_model(model)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    device = gpu if options.device is None else str(check_device(options.device))
    config, source = _config(model, options), _open_data(Path(data), size, options.num_workers)
    folder = out or Path("runs") / f"{Path(data).resolve().name}-classifier" / model
    was_there = classifier_training.is_trained(folder, source, config)
    advance = bars(f"training {model}", config.max_steps)
    classifier = classifier_training.obtain_classifier(
        folder, source, config=config, on_step=lambda: advance(1), device=device
    )
    on_images = bars("real images", source.summary.samples["val"])
    accuracy = classifier_training.measure_accuracy(classifier.to(device), source, on_images=on_images)
    return TrainedClassifier(folder, accuracy, was_there, source.num_classes)


def _config(model: str, options: ClassifierOptions) -> ClassifierConfig:
    from maskgit_pl.evaluation.classifier import default_training

    given: dict[str, Any] = {
        "max_steps": options.steps,
        "batch": options.batch,
        "peak_rate": options.learning_rate,
    }
    return replace(
        default_training(model),
        seed=options.seed,
        flip_probability=options.flip,
        precision=options.precision,
        **{name: value for name, value in given.items() if value is not None},
    )


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

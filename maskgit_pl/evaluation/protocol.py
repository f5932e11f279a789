"""The measurement of a pretrained folder, step by step, always the same way: what ``maskgit evaluate`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.data import ShardData
from maskgit_pl.evaluation.classifier import Classifier, Judgement
from maskgit_pl.evaluation.metrics import class_agreement, diversity
from maskgit_pl.pipeline import MaskGIT

__all__ = ["Protocol", "RealImages", "Samples", "check_data", "judge_real_images", "measure_samples"]


@dataclass(frozen=True)
class Protocol:
    """What decides the numbers beside the model and the data.

    Args:
        num_images: Images generated, spread evenly over the classes.
        num_steps: T.
        seed: Of the first image.
        diversity_per_class: Images of a class that diversity is measured on, at most.
        batch_size: Images at a time; changes the time alone.

    Raises:
        ValueError: A number out of range.
    """

    num_images: int = 1000
    num_steps: int = 8
    seed: int = 0
    diversity_per_class: int = 100
    batch_size: int = 100

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("num_steps", 1), ("diversity_per_class", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation {name}: at least {least} is needed, got {getattr(self, name)}")

    def labels(self, num_classes: int) -> list[int]:
        """The class of each image, class by class, so that the images of a batch share their first step.

        Raises:
            ValueError: Fewer than two images a class.
        """
        each = self.num_images // num_classes
        if each < 2:
            raise ValueError(
                f"--num-images: at least 2 for each of the {num_classes} classes are needed, got {self.num_images}"
            )
        return [label for label in range(num_classes) for _ in range(each)]


@dataclass(frozen=True)
class RealImages:
    """The real val images as the classifier sees them.

    Args:
        judgement: Its classes and features.
        labels: (n,) int64: their classes.
    """

    judgement: Judgement
    labels: Tensor

    @property
    def accuracy(self) -> float:
        """The classifier's own accuracy: what agreement can be expected of real images."""
        return class_agreement(self.judgement.classes, self.labels)


@dataclass(frozen=True)
class Samples:
    """Generated images and what was measured on them.

    Args:
        images: (n, C, H, W) uint8, class by class.
        labels: (n,) int64.
        guidance_scales: Scale of each step.
        class_agreement: Share taken for the class asked for.
        diversity: Beside real images; 1 as varied.
        seconds_per_image: Wall clock, tokens and decoding.
    """

    images: Tensor
    labels: Tensor
    guidance_scales: tuple[float, ...]
    class_agreement: float
    diversity: float
    seconds_per_image: float


def check_data(pipe: MaskGIT, data: ShardData) -> None:
    """Refuses data whose classes are not the model's.

    Raises:
        ValueError: With both.
    """
    if data.class_names != pipe.class_names:
        raise ValueError(
            f"data {data.path}: the classes must be the model's {list(pipe.class_names[:10])}, "
            f"got {list(data.class_names[:10])}; name the data it was trained on with --data"
        )


@torch.inference_mode()
def judge_real_images(
    classifier: Classifier, data: ShardData, *, on_images: Callable[[int], object] = lambda count: None
) -> RealImages:
    """Runs the classifier over the val split.

    Args:
        classifier: Trained on the train split.
        data: The real images.
        on_images: Told how many more are done, for a progress bar.
    """
    judgements, labels = [], []
    for batch in data.val_dataloader():
        judgements.append(classifier.judge(batch.content[batch.valid]))
        labels.append(batch.labels[batch.valid])
        on_images(len(labels[-1]))
    classes = torch.cat([judgement.classes for judgement in judgements])
    features = torch.cat([judgement.features for judgement in judgements])
    return RealImages(Judgement(classes, features), torch.cat(labels))


def measure_samples(
    pipe: MaskGIT,
    classifier: Classifier,
    real: RealImages,
    protocol: Protocol,
    *,
    guidance_scale: float | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Samples:
    """Generates images of every class and measures them.

    Args:
        pipe: The model.
        classifier: Judges the images.
        real: What diversity is compared with.
        protocol: How many images, how decoded.
        guidance_scale: As of ``MaskGIT.generate``; None is the model's own.
        on_step: Called after each step of each batch.
    """
    labels = protocol.labels(len(pipe.class_names))
    start = time.perf_counter()
    images = pipe.generate(
        labels,
        num_steps=protocol.num_steps,
        guidance_scale=guidance_scale,
        seed=protocol.seed,
        batch_size=protocol.batch_size,
        output_type="pt",
        callback=lambda step: on_step(),
    )
    seconds = time.perf_counter() - start
    judgement, asked = classifier.judge(images), torch.tensor(labels)
    decoding = pipe.decoding_with(num_steps=protocol.num_steps, guidance_scale=guidance_scale)
    return Samples(
        images,
        asked,
        guidance_scales=decoding.scales(),
        class_agreement=class_agreement(judgement.classes, asked),
        diversity=diversity(
            judgement.features, asked, real.judgement.features, real.labels, per_class=protocol.diversity_per_class
        ),
        seconds_per_image=seconds / len(labels),
    )

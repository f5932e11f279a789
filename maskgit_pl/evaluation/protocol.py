"""The measurement of a model, step by step, always the same way: what ``compare`` and ``tune`` run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.data import ShardData, ShuffledStream
from maskgit_pl.decoding import DecodingConfig, DecodingStep
from maskgit_pl.evaluation.classifier import Classifier, Judgement
from maskgit_pl.evaluation.metrics import Distances, FeatureDistances, class_agreement, diversity
from maskgit_pl.pipeline import MaskGIT

__all__ = [
    "METRICS",
    "Protocol",
    "RealImages",
    "Samples",
    "check_data",
    "check_decoding",
    "judge_real_images",
    "measure_decoding",
    "real_floor",
]

# What decodings are judged by, and whether more is better; every number is named after the network that it stands on.
METRICS = {"class_agreement": True, "diversity": True, "fid/classifier": False, "kid/classifier": False}
_FLOOR_BATCH = 200


@dataclass(frozen=True)
class Protocol:
    """What decides the numbers beside the model and the data.

    Args:
        num_images: Images generated, spread evenly over the classes.
        seed: Of the first image.
        diversity_per_class: Images of a class that diversity is measured on, at most.
        batch_size: Images at a time; changes the time alone.

    Raises:
        ValueError: A number out of range.
    """

    num_images: int = 1000
    seed: int = 0
    diversity_per_class: int = 100
    batch_size: int = 100

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("diversity_per_class", 2), ("batch_size", 1)):
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

    @cached_property
    def distances(self) -> FeatureDistances:
        """What measures other images' distance from these; made once."""
        return FeatureDistances(self.judgement.features)


@dataclass(frozen=True)
class Samples:
    """Generated images and what was measured on them.

    Args:
        images: (n, C, H, W) uint8, class by class.
        labels: (n,) int64.
        guidance_scales: Scale of each step.
        class_agreement: Share taken for the class asked for.
        diversity: Beside real images; 1 as varied.
        distances: From the real val images, in the classifier's features.
        steps_taken: Steps in which an image still had masked tokens, the mean over images; T unless the token selector
            may end early.
        seconds_per_image: Wall clock, tokens and decoding.
    """

    images: Tensor
    labels: Tensor
    guidance_scales: tuple[float, ...]
    class_agreement: float
    diversity: float
    distances: Distances
    steps_taken: float
    seconds_per_image: float

    def numbers(self) -> dict[str, Any]:
        """What was measured, in plain values; distances are named after the network whose features they are of."""
        return {
            "class_agreement": self.class_agreement,
            "diversity": self.diversity,
            "fid/classifier": self.distances.fid,
            "kid/classifier": self.distances.kid,
            "steps_taken": self.steps_taken,
            "seconds_per_image": self.seconds_per_image,
        }


def check_data(pipe: MaskGIT, data: ShardData) -> None:
    """Refuses data whose classes are not the model's.

    Raises:
        ValueError: With both.
    """
    if data.class_names != pipe.class_names:
        raise ValueError(
            f"data {data.config.path}: the classes must be the model's {list(pipe.class_names[:10])}, "
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


def real_floor(classifier: Classifier, data: ShardData, real: RealImages, *, num_images: int) -> Distances:
    """What distance real images have: as many images of the train split, drawn at random, from the val split.

    A generator cannot be expected to come below it. The classifier was trained on them, which raises it a little.

    Args:
        classifier: As of ``judge_real_images``.
        data: The real images.
        real: What it says about the val split.
        num_images: At most so many; the train split may have fewer.
    """
    count = min(num_images, data.summary.samples["train"])
    batches = data.batches("train", ShuffledStream(data.summary.samples["train"], seed=0))
    judgements = [
        classifier.judge(batches.__getitems__(range(first, min(first + _FLOOR_BATCH, count))).content)
        for first in range(0, count, _FLOOR_BATCH)
    ]
    return real.distances(torch.cat([judgement.features for judgement in judgements]))


def check_decoding(pipe: MaskGIT, decoding: DecodingConfig) -> None:
    """Refuses, before time is spent, a way of decoding that the model cannot follow.

    Raises:
        TypeError: A part does not take its arguments.
        ValueError: An unknown name, a number out of range, more steps than tokens, guidance without a null class.
    """
    pipe.check_decoding(decoding)
    if any(decoding.scales()) and pipe.transformer.network.config.null_label is None:
        raise ValueError(
            f"guidance {decoding.guidance}: this model has no null class (it was trained with class_dropout 0); "
            "take scale 0, or train with model.network.class_dropout 0.1"
        )


def measure_decoding(
    pipe: MaskGIT,
    classifier: Classifier,
    real: RealImages,
    protocol: Protocol,
    decoding: DecodingConfig,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> Samples:
    """Generates images of every class and measures them.

    Args:
        pipe: The model.
        classifier: Judges the images.
        real: What diversity and distances are compared with.
        protocol: How many images, from which seed.
        decoding: How they are decoded.
        on_step: Called after each step of each batch.
    """
    labels, taken = protocol.labels(len(pipe.class_names)), 0

    def count(step: DecodingStep) -> None:
        nonlocal taken
        taken += int(step.was_masked.any(1).sum())
        on_step()

    start = time.perf_counter()
    images = pipe.generate(
        labels, decoding=decoding, seed=protocol.seed, batch_size=protocol.batch_size, output_type="pt", callback=count
    )
    seconds = time.perf_counter() - start
    judgement, asked = classifier.judge(images), torch.tensor(labels)
    features = judgement.features
    return Samples(
        images,
        asked,
        guidance_scales=decoding.scales(),
        class_agreement=class_agreement(judgement.classes, asked),
        diversity=diversity(
            features, asked, real.judgement.features, real.labels, per_class=protocol.diversity_per_class
        ),
        distances=real.distances(features),
        steps_taken=taken / len(labels),
        seconds_per_image=seconds / len(labels),
    )

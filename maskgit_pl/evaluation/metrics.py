"""Metrics of generated images in the features of one network, relative to real images.

``Evaluator`` computes them with ``FeatureMetrics``. Class agreement and diversity come from the classifier of the data.
``opening`` and ``tokenizer_measurement`` open the feature networks that a command names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.data import ShardData
from maskgit_pl.errors import printable
from maskgit_pl.evaluation.classifier import obtain_classifier, read_classifier_config
from maskgit_pl.evaluation.distances import PRECISION_NEIGHBOURS, Metrics, distances
from maskgit_pl.evaluation.features import Extractor, ImageFeatures, extract, iter_image_batches, shorten_digest
from maskgit_pl.evaluation.options import SMALL_TRAINING
from maskgit_pl.evaluation.reference import Reference
from maskgit_pl.networks.features import ClassifierSpec, FeatureNetworkSpec, parse_feature_network
from maskgit_pl.processes import Bars, no_bars

__all__ = [
    "CLASSIFIER",
    "FeatureMetrics",
    "check_features",
    "class_agreement",
    "diversity",
    "mean_pairwise_distance",
    "open_extractors",
]

CLASSIFIER = "classifier"  # label of the classifier of the data at hand


@dataclass(frozen=True)
class FeatureMetrics:
    """A feature network with the real images that it compares with.

    Args:
        extractor: The network, on its device.
        reference: Features or statistics of real images: the val split or a file.
        labels: (m,) int64: classes of the real images; None if unknown.

    Raises:
        ValueError: if the reference has no origin.
    """

    extractor: Extractor
    reference: Reference
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.reference.origin is None:
            raise ValueError(
                f"reference of {self.extractor.label}: origin must be given, because it is part of the ledger key"
            )

    @property
    def columns(self) -> dict[str, Any]:
        """The ledger columns that identify the network and its reference."""
        features, origin = self.reference.features, self.reference.origin
        assert origin is not None
        return {
            "network": self.extractor.label,
            "judge": shorten_digest(self.extractor.digest),
            "knows_classes": self.extractor.knows_classes,
            "real_images": None if features is None else len(features),
            "reference_file": origin.file,
            "reference": shorten_digest(origin.digest),
        }

    @property
    def accuracy(self) -> float | None:
        """The accuracy of the data's classifier on the real images; None for other networks."""
        features = self.reference.features
        if features is None or features.logits is None or self.labels is None or self.extractor.label != CLASSIFIER:
            return None
        return class_agreement(features.logits.argmax(1), self.labels)

    def last_metric(self, num_images: int, metrics: Metrics) -> str:
        """Returns the metric that is present only in a complete row, by which the ledger recognises one.

        Args:
            num_images: Number of generated images.
            metrics: Metrics that the row must have.
        """
        features = self.reference.features
        # Precision is the last metric; it is left out for few images and in a fast measurement.
        few = features is None or min(num_images, len(features)) <= PRECISION_NEIGHBOURS
        return "fid" if few or metrics == "fast" else "precision"

    def __call__(
        self,
        read: Callable[[range], Tensor],
        count: int,
        labels: Tensor | None = None,
        *,
        metrics: Metrics = "all",
        on_images: Callable[[int], object] = lambda count: None,
    ) -> dict[str, float]:
        """Computes the metrics of images; the ranks share the work.

        Args:
            read: Returns the (b, C, H, W) uint8 images of a range of rows.
            count: Number n of images.
            labels: (n,) int64: requested classes; only the classifier of the data uses them.
            metrics: See ``distances``.
            on_images: Called after each batch with its number of images.

        Returns:
            Values by name, without the label of the network.
        """
        extractor = self.extractor
        features = extract([extractor], iter_image_batches(read, count), on_images=on_images)[extractor.label]
        numbers = distances(features, self.reference, metrics=metrics)
        # Only the classifier of the data predicts the classes that were requested.
        if labels is not None and extractor.label == CLASSIFIER and features.logits is not None:
            numbers["class_agreement"] = class_agreement(features.logits.argmax(1), labels)
            numbers |= self._diversity(features, labels)
        return numbers

    def _diversity(self, features: ImageFeatures, labels: Tensor) -> dict[str, float]:
        """Returns the diversity; nothing if no real images are known or their classes have no distances."""
        real = self.reference.features
        if real is None or self.labels is None:
            return {}
        try:
            return {"diversity": diversity(features.pooled, labels, real.pooled, self.labels)}
        except ValueError:  # no class has 2 images of both kinds, or all real images of a class are equal
            return {}


def class_agreement(predicted: Tensor, requested: Tensor) -> float:
    """Computes the fraction of images that the classifier assigns to the requested class.

    Args:
        predicted: (n,) int64: classes that the classifier predicts.
        requested: (n,) int64: classes that the images were generated for.

    Returns:
        The fraction, in [0, 1].

    Raises:
        ValueError: if the shapes differ, or there are no images.
    """
    if predicted.shape != requested.shape or requested.numel() == 0:
        raise ValueError(
            "class agreement: predictions and requested classes must have the same shape (n,) with n >= 1, got "
            f"{tuple(predicted.shape)} and {tuple(requested.shape)}"
        )
    return float((predicted == requested).double().mean())


def diversity(
    generated: Tensor, generated_labels: Tensor, real: Tensor, real_labels: Tensor, *, per_class: int = 100
) -> float:
    """Computes the diversity of generated images within their classes, relative to real images.

    ::

        diversity = mean over classes of d(generated) / mean over classes of d(real)

    Here d is the mean pairwise distance of the features of a class. It is 1 for images as diverse as real ones, and 0
    for images that are all equal. Both kinds take the same number of images of a class: the first ``per_class``, or
    fewer if one kind has fewer. Classes with fewer than 2 images of either kind are left out.

    Args:
        generated: (n, D) float features of generated images.
        generated_labels: (n,) int64: classes that the images were generated for.
        real: (m, D) float features of real images.
        real_labels: (m,) int64: classes of the real images.
        per_class: Maximum number of images per class, >= 2.

    Raises:
        ValueError: if no class has 2 images of both kinds, or the real images of each class are equal.
    """
    pairs = []  # mean distances (generated, real) of each class
    for label in sorted(set(generated_labels.tolist())):
        ours, theirs = generated[generated_labels == label], real[real_labels == label]
        # The mean distance of few images has more noise, so that both kinds take the same number.
        count = min(len(ours), len(theirs), per_class)
        if count >= 2:
            pairs.append([mean_pairwise_distance(ours[:count]), mean_pairwise_distance(theirs[:count])])
    if not pairs:
        raise ValueError("diversity: at least one class must have 2 generated and 2 real images, got none")
    # The ratio of the means, not the mean of the ratios: a class with very similar real images does not dominate.
    of_generated, of_real = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
    if of_real == 0:
        raise ValueError(
            "diversity: the real images of at least one class must differ, got equal features in every class"
        )
    return float(of_generated / of_real)


def mean_pairwise_distance(features: Tensor) -> float:
    """Computes the mean L2 distance over all pairs of different rows.

    Args:
        features: (n, D) float, n >= 2.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"mean pairwise distance: the number of rows must be >= 2, got {len(features)}")
    return float(torch.nn.functional.pdist(features.double()).mean())


def open_extractors(
    classifier: Path,
    data: ShardData,
    *,
    features: Sequence[str | dict[str, Any]],
    device: torch.device | str,
    bars: Bars = no_bars,
    replaces: bool = False,
) -> list[Extractor]:
    """Opens feature networks, and trains the classifier of the data if it is missing.

    Args:
        classifier: Folder of the classifier that ``classifier`` stands for.
        data: The images that it is trained on.
        features: Feature networks: names or mappings.
        device: Device of the networks.
        bars: Progress bars.
        replaces: True to replace a classifier of other data in the folder.

    Raises:
        FileExistsError: if the folder of the classifier holds something else.
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    # "classifier" without a folder stands for the classifier of the data at hand.
    judge = ClassifierSpec(str(classifier))
    # Its training takes minutes: all other networks are opened before.
    others = {place: Extractor.create(spec, device=device) for place, spec in _other_networks(features)}
    if CLASSIFIER in features:
        train = bars("classifier: training", SMALL_TRAINING.max_steps)
        obtain_classifier(classifier, data, replaces=replaces, on_step=lambda: train(1))
    return [
        others[place] if place in others else Extractor.create(judge, device=device) for place in range(len(features))
    ]


def check_features(
    features: Sequence[str | dict[str, Any]], reference: Path | None = None, *, classifier: Path | None = None
) -> None:
    """Checks the networks and the reference file of a measurement that comes after hours of training.

    Args:
        features: Feature networks: names or mappings. The classifier of the data may be missing.
        reference: File in the layout of ADM to compare with; None for the val split.
        classifier: Folder of the data's classifier; None for the one that all runs of the data share.

    Raises:
        FileExistsError: if the folder of the classifier holds something else.
        FileNotFoundError: if there is no such file.
        TypeError: if a network does not accept its arguments.
        ValueError: if a network is unknown, its weights are missing, or their SHA-256 does not match.
    """
    for _, spec in _other_networks(features):
        Extractor.create(spec)
    if classifier is not None and CLASSIFIER in features:
        read_classifier_config(classifier)
    if reference is not None and not reference.is_file():
        raise FileNotFoundError(f"reference {printable(reference)}: no such file; name another one")


def _other_networks(features: Sequence[str | dict[str, Any]]) -> list[tuple[int, FeatureNetworkSpec]]:
    """Returns the place and the network of all features except the classifier of the data at hand."""
    return [(place, parse_feature_network(spec)) for place, spec in enumerate(features) if spec != CLASSIFIER]

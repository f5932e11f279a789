"""Metrics of images in the features of one network, relative to real images. ``Evaluator`` uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maskgit_pl.evaluation.digests import shorten_digest
from maskgit_pl.evaluation.distances import PRECISION_NEIGHBOURS, Metrics, distances
from maskgit_pl.evaluation.features import Extractor, ImageFeatures, extract, iter_image_batches
from maskgit_pl.evaluation.metrics import class_agreement, diversity
from maskgit_pl.evaluation.reference import Reference

__all__ = ["CLASSIFIER", "FeatureMetrics"]

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

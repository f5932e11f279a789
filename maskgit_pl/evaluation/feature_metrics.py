"""The numbers of images in the features of one network, beside a reference of real images."""

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

CLASSIFIER = "classifier"  # label of the network that knows the classes of the data


@dataclass(frozen=True)
class FeatureMetrics:
    """A feature network and the real images that it compares with.

    Args:
        extractor: The network, on the device where it works.
        reference: Features or statistics of the val split, or of what stands in its place.
        labels: (m,) int64: classes of the reference; None where they are not known.

    Raises:
        ValueError: if the reference does not say what it was made from.
    """

    extractor: Extractor
    reference: Reference
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.reference.origin is None:
            raise ValueError(f"reference of {self.extractor.label}: must have an origin, which its rows are found by")

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a ledger that say which network measured and what it compared with."""
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
        """Accuracy of a classifier of the data on the real images; None of another network."""
        features = self.reference.features
        if features is None or features.logits is None or self.labels is None or self.extractor.label != CLASSIFIER:
            return None
        return class_agreement(features.logits.argmax(1), self.labels)

    def last_number(self, num_images: int, metrics: Metrics) -> str:
        """Returns the name of a number that only a row with all of the metrics of so many images has."""
        features = self.reference.features
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
        """Measures other images; the ranks share the work.

        Args:
            read: Gives some of the images: (b, C, H, W) uint8.
            count: Number of images.
            labels: (n,) int64: the classes asked for, where the network knows the data's own.
            metrics: See ``distances``.
            on_images: Called with the number of images of each batch that is done.
        """
        extractor = self.extractor
        features = extract([extractor], iter_image_batches(read, count), on_images=on_images)[extractor.label]
        numbers = distances(features, self.reference, metrics=metrics)
        if labels is not None and extractor.label == CLASSIFIER and features.logits is not None:
            numbers["class_agreement"] = class_agreement(features.logits.argmax(1), labels)
            numbers |= self._diversity(features, labels)
        return numbers

    def _diversity(self, features: ImageFeatures, labels: Tensor) -> dict[str, float]:
        """Returns the diversity beside the real images; nothing where too few images of a class are there."""
        real = self.reference.features
        if real is None or self.labels is None or int(labels.bincount().max()) < 2:
            return {}
        return {"diversity": diversity(features.pooled, labels, real.pooled, self.labels)}

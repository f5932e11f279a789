"""Class agreement and diversity of generated images, from the predictions and features of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["class_agreement", "diversity", "mean_pairwise_distance"]


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
    distances = []  # (generated, real) of each class
    for label in sorted(set(generated_labels.tolist())):
        ours, theirs = generated[generated_labels == label], real[real_labels == label]
        # The mean distance of few images has more noise, so that both kinds take the same number.
        count = min(len(ours), len(theirs), per_class)
        if count >= 2:
            distances.append([mean_pairwise_distance(ours[:count]), mean_pairwise_distance(theirs[:count])])
    if not distances:
        raise ValueError("diversity: at least one class must have 2 generated and 2 real images, got none")
    # The ratio of the means, not the mean of the ratios: a class with very similar real images does not dominate.
    of_generated, of_real = torch.tensor(distances, dtype=torch.float64).mean(0).tolist()
    if of_real == 0:
        raise ValueError(
            "diversity: the real images of at least one class must differ, got equal features in every class"
        )
    return float(of_generated / of_real)

"""How well generated images show their class, and how varied they are beside real ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["class_agreement", "diversity", "mean_pairwise_distance"]


def class_agreement(predicted: Tensor, asked: Tensor) -> float:
    """Computes the share of images that are taken for the class asked for.

    Args:
        predicted: (n,) int64: the classifier's classes.
        asked: (n,) int64: the classes they were generated for.

    Raises:
        ValueError: if the two differ in length, or are empty.
    """
    if predicted.shape != asked.shape or asked.numel() == 0:
        raise ValueError(
            f"class agreement: one prediction an image is needed, got {tuple(predicted.shape)} for {tuple(asked.shape)}"
        )
    return float((predicted == asked).double().mean())


def mean_pairwise_distance(features: Tensor) -> float:
    """Computes the mean L2 distance over all pairs of distinct rows of (n, D) features.

    Raises:
        ValueError: if there are fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"mean pairwise distance: at least 2 rows are needed, got {len(features)}")
    return float(torch.nn.functional.pdist(features.double()).mean())


def diversity(
    generated: Tensor, generated_labels: Tensor, real: Tensor, real_labels: Tensor, *, per_class: int = 100
) -> float:
    """Computes how varied the images of a class are beside real ones: 1 as varied, 0 all alike.

    Mean over classes of the mean pairwise distance of generated features, divided by the same of real features. Of each
    class the first ``per_class`` images are taken, as many generated as real; classes with fewer than two are left out.

    Args:
        generated: (n, D) features of generated images.
        generated_labels: (n,) int64: the classes asked for.
        real: (m, D) features of real images.
        real_labels: (m,) int64: their classes.
        per_class: Most images of a class, at least 2.

    Raises:
        ValueError: if no class has two images of both kinds, or real images of all classes are alike.
    """
    distances = []
    for label in sorted(set(generated_labels.tolist())):
        ours, theirs = generated[generated_labels == label], real[real_labels == label]
        count = min(len(ours), len(theirs), per_class)
        if count >= 2:
            distances.append([mean_pairwise_distance(ours[:count]), mean_pairwise_distance(theirs[:count])])
    if not distances:
        raise ValueError("diversity: a class with 2 generated and 2 real images is needed, got none")
    of_generated, of_real = torch.tensor(distances, dtype=torch.float64).mean(0).tolist()
    if of_real == 0:
        raise ValueError("diversity: the real images of every class are alike")
    return float(of_generated / of_real)

"""How far generated images are from real ones, and how much of the real ones they cover, in one network's features.

Frechet and kernel distance and the inception score are torchmetrics', precision and recall torch-fidelity's; density
and coverage are here. All of it in float64 on the CPU, with the same subsets every time; no rank asks another.
"""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from maskgit_pl.evaluation.features import ImageFeatures
from maskgit_pl.evaluation.reference import Reference, Statistics

__all__ = [
    "Metrics",
    "density_coverage",
    "distances",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]

_KID_SUBSETS, _KID_SUBSET_SIZE = 50, 1000
_IS_SPLITS = 10
PRECISION_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5
Metrics: TypeAlias = Literal["all", "fast"]
_ROWS = 1000  # of a block of pairwise distances


class _PassThrough(nn.Module):
    """Hands features through: torchmetrics asks for the network, which has seen these images already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(generated: ImageFeatures, reference: Reference, *, metrics: Metrics = "all") -> dict[str, float]:
    """Computes every number that the two allow.

    Args:
        generated: Features of at least two images.
        reference: The real ones, of the same network.
        metrics: ``"fast"`` leaves out the four that ask for the neighbours of every image.

    Returns:
        ``fid``; ``sfid`` where both have spatial features; ``kid``, ``kid_deviation``, and with enough images
        ``precision``, ``recall`` (more than 3 of each), ``density``, ``coverage`` (more than 5 real ones) where the
        reference has features; ``is``, ``is_deviation`` where the generated ones have logits (20 or more).

    Raises:
        ValueError: if the two are of different networks, or there are fewer than two images.
    """
    if generated.label != reference.label:
        raise ValueError(
            f"distances: features of one network are needed, got {generated.label!r} and {reference.label!r}"
        )
    numbers = {"fid": frechet_distance(Statistics.from_features(generated.pooled), reference.pooled)}
    if generated.spatial is not None and reference.spatial is not None:
        numbers["sfid"] = frechet_distance(Statistics.from_features(generated.spatial), reference.spatial)
    if generated.logits is not None and len(generated) >= 2 * _IS_SPLITS:
        numbers["is"], numbers["is_deviation"] = inception_score(generated.logits)
    if reference.features is not None:
        made, real = generated.pooled.double(), reference.features.pooled.double()
        numbers["kid"], numbers["kid_deviation"] = kernel_distance(made, real)
        if metrics == "fast":
            return numbers
        if min(len(made), len(real)) > PRECISION_NEIGHBOURS:
            numbers["precision"], numbers["recall"] = precision_recall(made, real)
        if len(real) > _DENSITY_NEIGHBOURS:
            numbers["density"], numbers["coverage"] = density_coverage(made, real)
    return numbers


def frechet_distance(generated: Statistics, real: Statistics) -> float:
    """Computes the Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means m and covariances S.

    Raises:
        ValueError: if the two are of features of different widths.

    Source: Heusel et al., arXiv:1706.08500; of spatial features (sFID): Nash et al., arXiv:2103.03841.
    """
    if generated.mean.shape != real.mean.shape:
        raise ValueError(
            f"Frechet distance: as many features are needed, got {len(generated.mean)} and {len(real.mean)}"
        )
    # Private to torchmetrics, whose metric takes no statistics; tests hold it to closed forms.
    return float(_compute_fid(real.mean, real.covariance, generated.mean, generated.covariance))


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Computes the unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3.

    Args:
        generated: (n, D), n at least 2.
        real: (m, D), m at least 2.

    Returns:
        Mean and deviation over 50 subsets of at most 1000 images of each, drawn the same way every time.

    Source: Binkowski et al., arXiv:1801.01401.
    """
    size = min(len(generated), len(real), _KID_SUBSET_SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features.*")  # they are here already
        kid = KernelInceptionDistance(
            _PassThrough(generated.shape[1]), subsets=_KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
    kid.update(real.double(), real=True)
    kid.update(generated.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torchmetrics draws the subsets from torch's own generator
        mean, deviation = kid.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, *, splits: int = _IS_SPLITS) -> tuple[float, float]:
    """Computes exp(mean KL(p(y | x) || p(y))): high where each image shows one class clearly, and all show all.

    Args:
        logits: (n, C), n at least 2 ``splits``.
        splits: Parts that the images are dealt to at random, the same way every time.

    Returns:
        Mean and deviation over the parts.

    Source: Salimans et al., arXiv:1606.03498.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features.*")
        score = InceptionScore(_PassThrough(logits.shape[1]), splits=splits, sync_on_compute=False)
    score.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = score.compute()
    return float(mean), float(deviation)


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Computes the share of generated images within the real ones' manifold, and the reverse.

    A manifold is a ball around each image, as wide as the distance to its 3rd neighbour.

    Args:
        generated: (n, D), n more than 3.
        real: (m, D), m more than 3.

    Source: Kynkaanniemi et al., arXiv:1904.06991.
    """
    numbers = prc_features_to_metric(
        generated.double(),
        real.double(),
        prc_neighborhood=PRECISION_NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return numbers[KEY_METRIC_PRECISION], numbers[KEY_METRIC_RECALL]


def density_coverage(
    generated: Tensor, real: Tensor, *, num_neighbours: int = _DENSITY_NEIGHBOURS
) -> tuple[float, float]:
    """Counts the real images' balls that a generated one lies in, over k, and the share of balls that hold any.

    A ball is around each real image, as wide as the distance to its k-th neighbour; its surface is not in it. Both are
    about 1 for images of the same kind; density may exceed 1.

    Args:
        generated: (n, D).
        real: (m, D), m more than k.
        num_neighbours: k.

    Source: Naeem et al., arXiv:2002.09797, equations 5 and 6; the strict comparison is its authors' code's.
    """
    generated, real = generated.double(), real.double()
    held, covered = 0, 0
    for block in torch.split(real, _ROWS):
        radii = torch.cdist(block, real).kthvalue(num_neighbours + 1, dim=1, keepdim=True).values  # its own is 1st
        inside = torch.cdist(block, generated) < radii
        held, covered = held + int(inside.sum()), covered + int(inside.any(1).sum())
    return held / (num_neighbours * len(generated)), covered / len(real)

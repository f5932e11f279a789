"""Distances between generated and real images in the features of one network.

torchmetrics computes the Frechet distance, the kernel distance and the inception score; torch-fidelity computes
precision and recall; this file computes density and coverage. Everything runs in float64 on the CPU, with the same
random subsets in every call and without communication between ranks. ``FeatureMetrics`` uses it.
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

# Defaults of the authors' code: 50 subsets of 1000 images for KID, 10 splits for IS, k = 3 neighbours for precision and
# recall, k = 5 for density and coverage.
_KID_SUBSETS, _KID_SUBSET_SIZE = 50, 1000
_IS_SPLITS = 10
PRECISION_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5
Metrics: TypeAlias = Literal["all", "fast"]
_ROWS = 1000  # real images per block of pairwise distances; bounds the memory


class _PassThrough(nn.Module):
    """A network that returns its input: torchmetrics wants a network, but the features are already computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances(generated: ImageFeatures, reference: Reference, *, metrics: Metrics = "all") -> dict[str, float]:
    """Computes every metric that the inputs allow.

    Args:
        generated: Features of at least two generated images.
        reference: Features or statistics of real images, from the same network.
        metrics: ``"fast"`` leaves out the four metrics that need the neighbours of every image.

    Returns:
        Values by name:

        - ``fid``: always.
        - ``sfid``: if both have spatial features.
        - ``is``, ``is_deviation``: if there are logits of at least 20 generated images.
        - ``kid``, ``kid_deviation``: if the reference has features.
        - ``precision``, ``recall``: if the reference has features and there are more than 3 images of each kind.
        - ``density``, ``coverage``: if the reference has features of more than 5 images.

    Raises:
        ValueError: if the networks differ, or there are fewer than two generated images.
    """
    if generated.label != reference.label:
        raise ValueError(
            f"distances: both inputs must come from the same network, got {generated.label!r} and {reference.label!r}"
        )
    numbers = {"fid": frechet_distance(Statistics.from_features(generated.pooled), reference.pooled)}
    if generated.spatial is not None and reference.spatial is not None:
        numbers["sfid"] = frechet_distance(Statistics.from_features(generated.spatial), reference.spatial)
    if generated.logits is not None and len(generated) >= 2 * _IS_SPLITS:  # each split has at least 2 images
        numbers["is"], numbers["is_deviation"] = inception_score(generated.logits)
    if reference.features is not None:
        fake, real = generated.pooled.double(), reference.features.pooled.double()
        numbers["kid"], numbers["kid_deviation"] = kernel_distance(fake, real)
        if metrics == "fast":
            return numbers
        # With k neighbours there must be more than k images, since an image is not its own neighbour.
        if min(len(fake), len(real)) > PRECISION_NEIGHBOURS:
            numbers["precision"], numbers["recall"] = precision_recall(fake, real)
        if len(real) > _DENSITY_NEIGHBOURS:
            numbers["density"], numbers["coverage"] = density_coverage(fake, real)
    return numbers


def frechet_distance(generated: Statistics, real: Statistics) -> float:
    """Computes the Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means m and covariances S.

    Args:
        generated: Statistics of D features of generated images.
        real: Statistics of D features of real images.

    Returns:
        The distance, in [0, inf).

    Raises:
        ValueError: if the numbers of features differ.

    Source: Heusel et al., arXiv:1706.08500; for spatial features (sFID) Nash et al., arXiv:2103.03841.
    """
    if generated.mean.shape != real.mean.shape:
        raise ValueError(
            "Frechet distance: both inputs must have the same number of features, got "
            f"{len(generated.mean)} and {len(real.mean)}"
        )
    # The public metric of torchmetrics takes images, not statistics, so its private function is called. The tests
    # compare it with closed forms.
    return float(_compute_fid(real.mean, real.covariance, generated.mean, generated.covariance))


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Computes the kernel distance: the unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3.

    Args:
        generated: (n, D) float features, n >= 2.
        real: (m, D) float features, m >= 2.

    Returns:
        Mean and standard deviation over 50 subsets of at most 1000 images of each kind. Every call draws the same
        subsets. The estimate is unbiased and may be negative.

    Source: Binkowski et al., arXiv:1801.01401.
    """
    size = min(len(generated), len(real), _KID_SUBSET_SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features.*")  # expected here
        kid = KernelInceptionDistance(
            _PassThrough(generated.shape[1]), subsets=_KID_SUBSETS, subset_size=size, sync_on_compute=False
        )
    kid.update(real.double(), real=True)
    kid.update(generated.double(), real=False)
    # torchmetrics draws the subsets from torch's global generator: a fixed seed makes every call equal, and fork_rng
    # restores the caller's state.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = kid.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, *, splits: int = _IS_SPLITS) -> tuple[float, float]:
    """Computes the inception score exp(mean KL(p(y | x) || p(y))).

    It is high if the network is certain about each image and the images show all classes equally often.

    Args:
        logits: (n, C) float, n >= 2 * ``splits``.
        splits: Number of random parts of the images. Every call makes the same parts.

    Returns:
        Mean in [1, C] and standard deviation over the parts.

    Source: Salimans et al., arXiv:1606.03498.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features.*")
        score = InceptionScore(_PassThrough(logits.shape[1]), splits=splits, sync_on_compute=False)
    score.update(logits.double())
    with torch.random.fork_rng(devices=[]):  # see ``kernel_distance``
        torch.manual_seed(0)
        mean, deviation = score.compute()
    return float(mean), float(deviation)


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Computes precision and recall: the fraction of generated images in the real manifold, and the reverse.

    The manifold of a set of images is a ball around each image, whose radius is the distance to the 3rd neighbour.

    Args:
        generated: (n, D) float features, n > 3.
        real: (m, D) float features, m > 3.

    Returns:
        Precision and recall, each in [0, 1].

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
    """Computes density and coverage of generated images y around real images x.

    Each real image has an open ball B(x) whose radius is the distance to its k-th real neighbour::

        density = 1 / (k n) sum over y of the number of balls B(x) that contain y
        coverage = 1 / m times the number of balls B(x) that contain any y

    If both sets have the same distribution, density is about 1 and coverage is close to 1.

    Args:
        generated: (n, D) float features.
        real: (m, D) float features, m > k.
        num_neighbours: k.

    Returns:
        Density in [0, inf) and coverage in [0, 1].

    Source: Naeem et al., arXiv:2002.09797, equations 5 and 6. The strict comparison is that of the authors' code.
    """
    generated, real = generated.double(), real.double()
    held, covered = 0, 0
    for block in torch.split(real, _ROWS):
        # k + 1, since the nearest real image of each real image is the image itself.
        radii = torch.cdist(block, real).kthvalue(num_neighbours + 1, dim=1, keepdim=True).values  # (b, 1)
        inside = torch.cdist(block, generated) < radii  # (b, n)
        held, covered = held + int(inside.sum()), covered + int(inside.any(1).sum())
    return held / (num_neighbours * len(generated)), covered / len(real)

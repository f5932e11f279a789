"""The built-in metrics of generated images, in the features of one network or of their tokens.

torchmetrics computes the Frechet distance, the kernel distance and the inception score; torch-fidelity computes
precision and recall; this file computes class agreement and diversity. Everything runs on the CPU, with the same random
numbers in every call and without communication between ranks; distances of features are computed in float64.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import pdist
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from maskgit_pl.evaluation.metrics import ComparedImages, FeatureMetric, metrics
from maskgit_pl.evaluation.reference import Statistics
from maskgit_pl.evaluation.two_sample import two_sample

# Defaults of the authors' code: 50 subsets of 1000 images for KID, 10 splits for IS, k = 3 neighbours for
# precision and recall.
_KID_SUBSETS, _KID_SUBSET_SIZE = 50, 1000
_IS_SPLITS = 10
_PRECISION_NEIGHBOURS = 3
_DIVERSE_IMAGES = 100  # largest number per class in the diversity
_ROWS = 1000  # images per block of pairwise distances; bounds the memory


@metrics.register("fid")
class FID(FeatureMetric):
    """The Frechet distance of pooled features."""

    title = "FID"

    def compute(self, images: ComparedImages) -> float:
        return frechet_distance(Statistics.from_features(images.features), images.reference.pooled)


@metrics.register("sfid")
class SpatialFID(FeatureMetric):
    """The Frechet distance of spatial features."""

    title = "sFID"
    needs = ("spatial",)

    def compute(self, images: ComparedImages) -> float:
        assert images.reference.spatial is not None
        return frechet_distance(Statistics.from_features(images.spatial), images.reference.spatial)


@metrics.register("kid")
class KID(FeatureMetric):
    """The kernel distance of pooled features."""

    title = "KID x 1000"
    factor = 1000
    needs = ("real_features",)

    def compute(self, images: ComparedImages) -> tuple[float, float]:
        return kernel_distance(images.features, images.real_features)


@metrics.register("is")
class IS(FeatureMetric):
    """The inception score of at least 20 images, so that each of its 10 splits has two."""

    title = "IS"
    higher_is_better = True
    needs = ("logits",)

    def compute(self, images: ComparedImages) -> tuple[float, float] | None:
        return inception_score(images.logits) if len(images.logits) >= 2 * _IS_SPLITS else None


class _InManifolds(FeatureMetric):
    """A metric of nearest neighbours, whose values are fractions."""

    digits = 3
    higher_is_better = True
    needs = ("real_features",)
    is_fast = False


@metrics.register("precision")
class Precision(_InManifolds):
    """The fraction of generated images in the manifold of the real ones, for more than 3 images of each kind."""

    title = "precision"

    def compute(self, images: ComparedImages) -> float | None:
        return images.once(precision_recall, images.features, images.real_features)[0]


@metrics.register("recall")
class Recall(_InManifolds):
    """The fraction of real images in the manifold of the generated ones, for more than 3 images of each kind."""

    title = "recall"

    def compute(self, images: ComparedImages) -> float | None:
        return images.once(precision_recall, images.features, images.real_features)[1]


@metrics.register("class_agreement")
class ClassAgreement(FeatureMetric):
    """The fraction of images that the classifier of the data assigns to the requested class."""

    title = "class agreement %"
    factor = 100
    digits = 1
    higher_is_better = True
    of_network = False
    needs = ("logits", "labels")

    def compute(self, images: ComparedImages) -> float:
        return class_agreement(images.logits.argmax(1), images.labels)


@metrics.register("diversity")
class Diversity(FeatureMetric):
    """The diversity of generated images within their classes, relative to real images."""

    title = "diversity"
    higher_is_better = True
    of_network = False
    needs = ("logits", "labels", "real_features", "real_labels")

    def compute(self, images: ComparedImages) -> float | None:
        assert images.real_labels is not None
        return diversity(images.features, images.labels, images.real_features, images.real_labels)


@metrics.register("two_sample")
class TwoSample(FeatureMetric):
    """The accuracy with which a new network tells sampled token grids from real ones; 50 % if it cannot.

    The real grids are those of val images, which the model has not seen: copies of training images pass. None below
    200 images of each kind with the same classes, and if the network does not find a planted fault either.
    """

    title = "told from real %"
    factor = 100
    digits = 1
    of_network = False
    needs = ("labels", "tokens")
    is_fast = False
    column = 0  # of the result

    def compute(self, images: ComparedImages) -> tuple[float, float] | None:
        measured = images.once(two_sample, images.tokens, images.labels)
        return measured and measured[self.column]


@metrics.register("two_sample_auc")
class TwoSampleAUC(TwoSample):
    """The area under the ROC curve of the network of ``two_sample``; 0.5 if it cannot tell the grids apart."""

    title = "told from real, AUC"
    factor = 1
    digits = 3
    column = 1


def frechet_distance(generated: Statistics, real: Statistics) -> float:
    """Computes the Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means m and covariances S.

    Source: Heusel et al., arXiv:1706.08500; for spatial features (sFID) Nash et al., arXiv:2103.03841.
    """
    # The public metric of torchmetrics takes images, not statistics, so its private function is called. The
    # tests compare it with closed forms.
    return float(_compute_fid(real.mean, real.covariance, generated.mean, generated.covariance))


def kernel_distance(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Computes the kernel distance: the unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3.

    Returns:
        Mean and standard deviation over 50 subsets of at most 1000 of the (n, D) and (m, D) float features.
        Every call draws the same subsets. The estimate is unbiased and may be negative.

    Source: Binkowski et al., arXiv:1801.01401.
    """
    generated, real = generated.double(), real.double()
    size = min(len(generated), len(real), _KID_SUBSET_SIZE)
    with torch.random.fork_rng(devices=[]):  # a fixed seed makes every call equal; the caller's state is restored
        torch.manual_seed(0)
        distances = torch.stack(
            [
                poly_mmd(real[torch.randperm(len(real))[:size]], generated[torch.randperm(len(generated))[:size]])
                for _ in range(_KID_SUBSETS)
            ]
        )
    return float(distances.mean()), float(distances.std(correction=0))


def inception_score(logits: Tensor, *, splits: int = _IS_SPLITS) -> tuple[float, float]:
    """Computes the inception score exp(mean KL(p(y | x) || p(y))) and its standard deviation over random parts.

    It is high if the network is certain about each image and the images show all classes equally often. Every
    call makes the same parts. There must be two of the (n, C) float logits in each.

    Source: Salimans et al., arXiv:1606.03498.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features.*")
        # torchmetrics wants a network, but the logits are already computed.
        score = InceptionScore(nn.Identity(), splits=splits, sync_on_compute=False)
    score.update(logits.double())
    with torch.random.fork_rng(devices=[]):  # see ``kernel_distance``
        torch.manual_seed(0)
        mean, deviation = score.compute()
    return float(mean), float(deviation)


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Computes precision and recall: the fraction of generated images in the real manifold, and the reverse.

    The manifold of a set of images (n, D) is a ball around each image, whose radius is the distance to the 3rd
    neighbour. Both values are None unless each set has more than 3 images, since an image is not its own neighbour.

    Source: Kynkaanniemi et al., arXiv:1904.06991.
    """
    if min(len(generated), len(real)) <= _PRECISION_NEIGHBOURS:
        return None, None
    numbers = prc_features_to_metric(
        generated.double(),
        real.double(),
        prc_neighborhood=_PRECISION_NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return numbers[KEY_METRIC_PRECISION], numbers[KEY_METRIC_RECALL]


def class_agreement(predicted: Tensor, requested: Tensor) -> float:
    """Computes the fraction of (n,) int64 classes that are predicted as they were requested."""
    return float((predicted == requested).double().mean())


def diversity(generated: Tensor, generated_labels: Tensor, real: Tensor, real_labels: Tensor) -> float | None:
    """Computes the diversity of generated images within their classes, relative to real images.

    ::

        diversity = mean over classes of d(generated) / mean over classes of d(real)

    Here d is the mean pairwise distance of the features of a class. Both kinds take the same number of images of a
    class: the first 100, or fewer if one kind has fewer. Classes with fewer than 2 images of either
    kind are left out.

    Args:
        generated: (n, D) float features of generated images.
        generated_labels: (n,) int64: classes that the images were generated for.
        real: (m, D) float features of real images.
        real_labels: (m,) int64: classes of the real images.

    Returns:
        The ratio, in [0, inf); None if no class has 2 images of both kinds, or the real images of each class are equal.
    """
    pairs = []  # mean distances (generated, real) of each class
    for label in sorted(set(generated_labels.tolist())):
        ours, theirs = generated[generated_labels == label], real[real_labels == label]
        # The mean distance of few images has more noise, so that both kinds take the same number.
        count = min(len(ours), len(theirs), _DIVERSE_IMAGES)
        if count >= 2:
            pairs.append([pdist(images[:count].double()).mean() for images in (ours, theirs)])
    if not pairs:
        return None
    # The ratio of the means, not the mean of the ratios: a class with very similar real images does not dominate.
    of_generated, of_real = torch.tensor(pairs, dtype=torch.float64).mean(0).tolist()
    return float(of_generated / of_real) if of_real > 0 else None

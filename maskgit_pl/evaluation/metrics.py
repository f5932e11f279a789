"""The numbers: how well images come back, whether they show their class, how varied and how like real ones they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit_pl.data import Batch, to_unit_range
from maskgit_pl.evaluation.distances import frechet_distance, kernel_distance
from maskgit_pl.evaluation.reference import Statistics
from maskgit_pl.pretrained import PretrainedTokenizer
from maskgit_pl.tokenizer import CodebookUse

__all__ = [
    "Distances",
    "FeatureDistances",
    "Reconstruction",
    "class_agreement",
    "diversity",
    "mean_pairwise_distance",
    "psnr",
    "reconstruction",
]


@dataclass(frozen=True)
class Reconstruction:
    """How well a tokenizer brings images back.

    Args:
        psnr_db: Of the squared error pooled over all images.
        codebook_usage: Share of the codes used at least once, in [0, 1].
        perplexity: Of the codes, in [1, K].
        images: How many were measured.
    """

    psnr_db: float
    codebook_usage: float
    perplexity: float
    images: int


@dataclass(frozen=True)
class Distances:
    """How far a set of images is from the real ones, in the features of one network; 0 is no distance.

    Args:
        fid: Frechet distance of the Gaussians with the features' means and covariances. It falls with the number of
            images, so it means something beside another one of as many images alone.
        kid: Kernel distance, without that bias; slightly negative by chance where there is none.
        kid_deviation: Of ``kid`` over the subsets that it is the mean of.
        images: How many there were.
    """

    fid: float
    kid: float
    kid_deviation: float
    images: int


class FeatureDistances:
    """Frechet and kernel distance from one set of real features, whose statistics are computed once.

    They are those of ``evaluation.distances``.

    Args:
        real: (m, D) features of real images, m at least 2.

    Raises:
        ValueError: Fewer than two real images.
    """

    def __init__(self, real: Tensor) -> None:
        _at_least_two("real", real)
        self._real = real.double().cpu()
        self._statistics = Statistics.of(self._real)

    def __call__(self, features: Tensor) -> Distances:
        """Measures another set.

        Args:
            features: (n, D), n at least 2.

        Raises:
            ValueError: Fewer than two images.
        """
        _at_least_two("generated", features)
        features = features.double().cpu()
        fid = frechet_distance(Statistics.of(features), self._statistics)
        return Distances(fid, *kernel_distance(features, self._real), len(features))


def _at_least_two(kind: str, features: Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"{kind} features: (n, D) of at least 2 images are needed for a distance, got {tuple(features.shape)}"
        )


def psnr(mean_squared_error: float) -> float:
    """-10 log10(error) in dB, for pixels in [0, 1]; infinite where nothing differs.

    Raises:
        ValueError: The error is negative or not a number.
    """
    if not mean_squared_error >= 0:
        raise ValueError(f"mean squared error: at least 0 is needed, got {mean_squared_error}")
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)


@torch.inference_mode()
def reconstruction(tokenizer: PretrainedTokenizer, batches: Iterable[Batch]) -> Reconstruction:
    """Measures a tokenizer: pixels in [0, 1], reconstructions clipped, one error pooled over all images.

    Args:
        tokenizer: Where its network is, the work is done.
        batches: Of uint8 images; rows that are not valid count nothing.

    Raises:
        ValueError: No images.
    """
    network, size = tokenizer.network, tokenizer.image_size
    device = next(network.parameters()).device
    use = CodebookUse(network.config.num_codes).to(device)
    squared, pixels, count = 0.0, 0, 0
    for batch in batches:
        images = to_unit_range(batch.content[batch.valid].to(device))
        tokens = network.encode(images)
        decoded = network.decode(tokens, tokenizer.grid)[..., :size, :size].float().clamp(0, 1)
        squared += float((decoded - images).double().square().sum())
        pixels, count = pixels + images.numel(), count + len(images)
        use.update(tokens, torch.ones(len(tokens), device=device))
    if count == 0:
        raise ValueError("reconstruction: at least one image is needed, got none")
    codes = {name: float(value) for name, value in use.compute().items()}
    return Reconstruction(psnr(squared / pixels), images=count, **codes)


def class_agreement(predicted: Tensor, asked: Tensor) -> float:
    """Share of images that are taken for the class asked for.

    Args:
        predicted: (n,) int64: the classifier's classes.
        asked: (n,) int64: the classes they were generated for.

    Raises:
        ValueError: The two differ in length, or are empty.
    """
    if predicted.shape != asked.shape or asked.numel() == 0:
        raise ValueError(
            f"class agreement: one prediction an image is needed, got {tuple(predicted.shape)} for {tuple(asked.shape)}"
        )
    return float((predicted == asked).double().mean())


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean L2 distance over all pairs of distinct rows of (n, D) features.

    Raises:
        ValueError: Fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"mean pairwise distance: at least 2 rows are needed, got {len(features)}")
    return float(torch.nn.functional.pdist(features.double()).mean())


def diversity(
    generated: Tensor, generated_labels: Tensor, real: Tensor, real_labels: Tensor, *, per_class: int = 100
) -> float:
    """How varied the images of a class are beside real ones: 1 as varied, 0 all alike.

    Mean over classes of the mean pairwise distance of generated features, divided by the same of real features. Of each
    class the first ``per_class`` images are taken, as many generated as real; classes with fewer than two are left out.

    Args:
        generated: (n, D) features of generated images.
        generated_labels: (n,) int64: the classes asked for.
        real: (m, D) features of real images.
        real_labels: (m,) int64: their classes.
        per_class: Most images of a class, at least 2.

    Raises:
        ValueError: No class has two images of both kinds, or real images of all classes are alike.
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

"""Distances against closed forms, hand-counted sets, and torch-fidelity's own functions."""

import math
from dataclasses import replace

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from maskgit_pl.evaluation import distances as module
from maskgit_pl.evaluation.distances import (
    diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from maskgit_pl.evaluation.extractors import ImageFeatures
from maskgit_pl.evaluation.reference import Reference, Statistics
from tests.evaluation.feature_networks import distances


def normal(count: int, seed: int, *, width: int = 6, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scale + shift


def gaussian(mean: list[float], covariance: list[list[float]]) -> Statistics:
    return Statistics(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_gaussians_with_equal_covariances_differ_by_the_squared_distance_of_their_means() -> None:
    covariance = [[2.0, 0.5], [0.5, 1.0]]
    assert frechet_distance(gaussian([1, 2], covariance), gaussian([4, -2], covariance)) == pytest.approx(25)
    assert frechet_distance(gaussian([1, 2], covariance), gaussian([1, 2], covariance)) == pytest.approx(0, abs=1e-12)


def test_covariances_that_do_not_commute_follow_the_root_of_a_2_x_2_matrix() -> None:
    # tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2), by Cayley and Hamilton; M = S1 S2 has trace 17 and determinant 35.
    one, other = gaussian([0, 0], [[2, 1], [1, 3]]), gaussian([1, 0], [[4, -1], [-1, 2]])
    expected = 1 + 5 + 6 - 2 * math.sqrt(12 + 2 * math.sqrt(5 * 7))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_fewer_images_than_features_also_have_a_distance() -> None:
    generated, real = normal(5, 0, width=30), normal(8, 1, width=30)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(generated), fid_features_to_statistics(real), False)
    ours = frechet_distance(Statistics.from_features(generated), Statistics.from_features(real))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    with pytest.raises(ValueError, match=r"must be \(n, D\) with n >= 2"):
        Statistics.from_features(generated[:1])


def test_kernel_distance_equals_that_of_torch_fidelity() -> None:
    generated, real = normal(60, 0, scale=1.2), normal(60, 1)  # one subset is all of them
    theirs = kid_features_to_metric(generated, real, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(generated, real)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize(("counts", "size"), [((1500, 2000), 1000), ((2000, 300), 300), ((200, 3000), 200)])
def test_kernel_distance_is_mean_and_deviation_over_fifty_subsets(monkeypatch, counts, size) -> None:
    sizes: list[tuple[int, int]] = []

    def record(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        sizes.append((len(real), len(generated)))
        return torch.tensor(float(len(sizes) % 2))

    monkeypatch.setattr(module, "poly_mmd", record)
    assert kernel_distance(normal(counts[0], 0), normal(counts[1], 1)) == (0.5, 0.5)
    assert sizes == [(size, size)] * 50


def test_inception_score_equals_that_of_torch_fidelity() -> None:
    logits = normal(200, 0, width=7, scale=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        order = torch.randperm(200)  # in which torchmetrics deals images to the parts
    theirs = isc_features_to_metric(logits[order], splits=10, shuffle=False)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    mean, deviation = inception_score(logits)
    assert torch.equal(torch.rand(1), expected)  # the caller's generator is restored
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"] * math.sqrt(10 / 9), rel=1e-9)


def test_inception_score_is_the_number_of_classes_if_each_image_is_certain() -> None:
    one_of_four = torch.eye(4).repeat(500, 1) * 100
    assert inception_score(one_of_four)[0] == pytest.approx(4, rel=0.02)
    assert inception_score(torch.zeros(200, 4))[0] == pytest.approx(1)


def test_precision_is_of_generated_images_and_recall_of_real_ones() -> None:
    real = column(0, 1, 2, 3, 100, 101, 102, 103)  # two modes, of which one is generated
    assert precision_recall(column(0.5, 1.5, 2.5, 1), real) == (1, 0.5)
    assert precision_recall(real, column(0.5, 1.5, 2.5, 1)) == (0.5, 1)


def test_every_metric_is_computed_whose_inputs_are_known() -> None:
    real = ImageFeatures("classifier", normal(30, 0), normal(30, 1), normal(30, 2, width=4))
    generated = ImageFeatures("classifier", normal(20, 3), normal(20, 4), normal(20, 5, width=4))
    whole = distances(generated, Reference.from_features(real))
    assert list(whole) == ["fid", "sfid", "kid", "kid_deviation", "is", "is_deviation", "precision", "recall"]
    assert all(type(value) is float and math.isfinite(value) for value in whole.values())
    assert distances(generated, Reference.from_features(real)) == whole
    assert "sfid" not in distances(generated, Reference.from_features(replace(real, spatial=None)))
    assert "is" not in distances(replace(generated, logits=None), Reference.from_features(real))
    three = ImageFeatures("classifier", normal(3, 3))
    too_few_for = {"is", "precision", "recall"}
    assert {"fid", "kid"} <= distances(three, Reference.from_features(three)).keys() <= set(whole) - too_few_for


def test_diversity_of_real_images_is_one_and_of_identical_images_zero() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    assert diversity(features, labels, features, labels) == pytest.approx(1)
    assert diversity(features * 2, labels, features, labels) == pytest.approx(2)
    assert diversity(torch.ones(60, 5), labels, features, labels) == 0
    single = torch.tensor([0, 1])
    assert diversity(torch.zeros(2, 3), single, torch.zeros(2, 3), single) is None  # no pair of a class
    assert diversity(torch.zeros(2, 3), single * 0, torch.zeros(2, 3), single * 0) is None  # equal real images


def test_diversity_is_within_classes_and_from_the_same_number_of_both() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    assert diversity(apart, labels, apart * 2, labels) == pytest.approx(0.5)
    many = torch.tensor([[0.0], [2.0], [500.0]])  # the third real image of class 0 has no generated one beside it
    assert diversity(apart[:2], labels[:2], many, torch.zeros(3, dtype=torch.int64)) == pytest.approx(0.5)
    assert diversity(many, torch.zeros(3, dtype=torch.int64), apart[:2], labels[:2]) == pytest.approx(2.0)

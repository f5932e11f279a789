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
    class_agreement,
    density_coverage,
    diversity,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from maskgit_pl.evaluation.features import ImageFeatures
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


def test_commuting_covariances_differ_by_their_square_roots() -> None:
    turn = torch.linalg.qr(normal(5, 0, width=5)).Q
    one, other = torch.tensor([1.0, 4, 9, 0, 2]).double(), torch.tensor([4.0, 1, 9, 3, 0]).double()
    expected = (one.sqrt() - other.sqrt()).square().sum()
    zero = torch.zeros(5, dtype=torch.float64)
    both = [Statistics(zero, turn @ values.diag() @ turn.T) for values in (one, other)]
    assert frechet_distance(*both) == pytest.approx(float(expected), rel=1e-6)


def test_covariances_that_do_not_commute_follow_the_root_of_a_2_x_2_matrix() -> None:
    # tr M^(1/2) = (tr M + 2 det(M)^(1/2))^(1/2), by Cayley and Hamilton; M = S1 S2 has trace 17 and determinant 35.
    one, other = gaussian([0, 0], [[2, 1], [1, 3]]), gaussian([1, 0], [[4, -1], [-1, 2]])
    product = one.covariance @ other.covariance
    assert float(product.trace()) == 12
    expected = 1 + 5 + 6 - 2 * math.sqrt(12 + 2 * math.sqrt(5 * 7))
    assert not torch.equal(product, other.covariance @ one.covariance)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)


def test_fewer_images_than_features_also_have_a_distance() -> None:
    made, real = normal(5, 0, width=30), normal(8, 1, width=30)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(made), fid_features_to_statistics(real), False)
    ours = frechet_distance(Statistics.from_features(made), Statistics.from_features(real))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_kernel_distance_equals_that_of_torch_fidelity() -> None:
    made, real = normal(60, 0, scale=1.2), normal(60, 1)  # one subset is all of them
    theirs = kid_features_to_metric(made, real, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(made, real)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def discrepancy(made: torch.Tensor, real: torch.Tensor) -> float:
    """The unbiased squared maximum mean discrepancy with the cubic kernel, by hand."""

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left @ right.T / left.shape[1] + 1) ** 3

    def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
        count = len(matrix)
        return (matrix.sum() - matrix.trace()) / (count * (count - 1))

    own = off_diagonal(kernel(made, made)) + off_diagonal(kernel(real, real))
    return float(own - 2 * kernel(made, real).mean())


@pytest.mark.parametrize("counts", [(30, 41), (41, 30)])
def test_kernel_distance_is_mean_and_deviation_over_subsets_of_both(monkeypatch: pytest.MonkeyPatch, counts) -> None:
    monkeypatch.setattr(module, "_KID_SUBSETS", 7)
    monkeypatch.setattr(module, "_KID_SUBSET_SIZE", 20)
    made, real = normal(counts[0], 0).double(), normal(counts[1], 1).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [(torch.randperm(len(real))[:20], torch.randperm(len(made))[:20]) for _ in range(7)]
    values = torch.tensor([discrepancy(made[ours], real[theirs]) for theirs, ours in drawn], dtype=torch.float64)
    mean, deviation = kernel_distance(made, real)
    assert mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert deviation == pytest.approx(float(values.std(correction=0)), rel=1e-9)
    assert deviation > 0


@pytest.mark.parametrize(("counts", "size"), [((1500, 2000), 1000), ((2000, 300), 300), ((200, 3000), 200)])
def test_kernel_distance_takes_fifty_subsets_of_a_thousand_or_of_all(
    monkeypatch: pytest.MonkeyPatch, counts, size
) -> None:
    sizes: list[tuple[int, int]] = []

    def ask(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        sizes.append((len(real), len(generated)))
        return torch.zeros(())

    monkeypatch.setattr(module, "poly_mmd", ask)
    kernel_distance(normal(counts[0], 0), normal(counts[1], 1))
    assert sizes == [(size, size)] * 50


def as_dealt(count: int) -> torch.Tensor:
    """The order in which torchmetrics deals images to the parts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randperm(count)


def test_inception_score_equals_that_of_torch_fidelity() -> None:
    logits = normal(200, 0, width=7, scale=3)
    theirs = isc_features_to_metric(logits[as_dealt(200)], splits=10, shuffle=False)
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"] * math.sqrt(10 / 9), rel=1e-9)


def test_inception_score_is_the_number_of_classes_if_each_image_is_certain() -> None:
    one_of_four = torch.eye(4).repeat(500, 1) * 100
    assert inception_score(one_of_four)[0] == pytest.approx(4, rel=0.02)
    assert inception_score(torch.zeros(200, 4))[0] == pytest.approx(1)


def test_precision_and_recall_are_shares_of_manifolds() -> None:
    made, real = normal(40, 0, scale=0.5), normal(50, 1)

    def share(inside: torch.Tensor, manifold: torch.Tensor) -> float:
        radii = torch.cdist(manifold, manifold).sort(1).values[:, 3]
        return float((torch.cdist(inside, manifold) <= radii).any(1).double().mean())

    precision, recall = precision_recall(made, real)
    assert precision == pytest.approx(share(made, real), rel=1e-6)
    assert recall == pytest.approx(share(real, made), rel=1e-6)
    assert precision > recall  # narrow, and within


def test_precision_is_of_generated_images_and_recall_of_real_ones() -> None:
    real = column(0, 1, 2, 3, 100, 101, 102, 103)  # two modes, of which one is generated
    assert precision_recall(column(0.5, 1.5, 2.5, 1), real) == (1, 0.5)
    assert precision_recall(real, column(0.5, 1.5, 2.5, 1)) == (0.5, 1)


def test_density_and_coverage_count_the_balls_of_real_images() -> None:
    # k = 1: the balls are (-1, 1), (0, 2), (1, 5) and (3, 11).
    real, made = column(0, 1, 3, 7), column(0.5, 0.5, 6, 100)
    assert density_coverage(made, real, num_neighbours=1) == (5 / 4, 3 / 4)
    # k = 2: (-3, 3), (-1, 3), (0, 6) and (1, 13).
    assert density_coverage(made, real, num_neighbours=2) == (7 / 8, 1)


def test_identical_sets_cover_each_other() -> None:
    real = normal(2100, 0)  # more than two blocks
    assert density_coverage(real, real) == (1, 1)


def test_a_dropped_mode_costs_coverage_and_an_outlier_among_real_images_earns_nothing() -> None:
    real = torch.cat([normal(200, 0), normal(200, 1, shift=50)])
    density, coverage = density_coverage(normal(400, 2), real)
    assert coverage == pytest.approx(0.5, abs=0.02)
    assert density == pytest.approx(1, abs=0.1)
    outlier = torch.cat([normal(200, 0), torch.full((1, 6), 30.0)])  # its ball holds everything in between
    between = normal(200, 3, shift=10)
    assert precision_recall(between, outlier)[0] == 1
    assert density_coverage(between, outlier)[0] < 0.25


def test_every_possible_metric_is_returned() -> None:
    real = ImageFeatures("classifier", normal(30, 0), normal(30, 1), normal(30, 2, width=4))
    made = ImageFeatures("classifier", normal(20, 3), normal(20, 4), normal(20, 5, width=4))
    whole = distances(made, Reference.from_features(real))
    assert list(whole) == [
        "fid", "sfid", "kid", "kid_deviation", "is", "is_deviation", "precision", "recall", "density", "coverage",
    ]  # fmt: skip
    assert all(type(value) is float and math.isfinite(value) for value in whole.values())
    assert distances(made, Reference.from_features(real)) == whole
    assert "sfid" not in distances(made, Reference.from_features(replace(real, spatial=None)))
    assert "is" not in distances(replace(made, logits=None), Reference.from_features(real))
    three = ImageFeatures("classifier", normal(3, 3))
    assert set(distances(three, Reference.from_features(three))) == {"fid", "kid", "kid_deviation"}
    assert set(distances(three, Reference.from_features(replace(real, spatial=None)))) == {
        "fid",
        "kid",
        "kid_deviation",
        "density",
        "coverage",
    }


def test_measuring_does_not_change_the_generator_of_torch() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    inception_score(normal(40, 0))
    assert torch.equal(torch.rand(1), expected)


def test_agreement_of_a_perfect_classifier_is_one() -> None:
    requested = torch.tensor([0, 1, 2, 2])
    assert class_agreement(requested, requested) == 1
    assert class_agreement(torch.tensor([0, 1, 0, 0]), requested) == 0.5


def test_diversity_of_real_images_is_one_and_of_identical_images_zero() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    assert diversity(features, labels, features, labels) == pytest.approx(1)
    assert diversity(features * 2, labels, features, labels) == pytest.approx(2)
    assert diversity(torch.ones(60, 5), labels, features, labels) == 0


def test_diversity_is_within_classes_and_from_the_same_number_of_both() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    assert diversity(apart, labels, apart * 2, labels) == pytest.approx(0.5)
    many = torch.tensor([[0.0], [2.0], [500.0]])  # the third real image of class 0 has no generated one beside it
    assert diversity(apart[:2], labels[:2], many, torch.zeros(3, dtype=torch.int64)) == pytest.approx(0.5)
    assert diversity(many, torch.zeros(3, dtype=torch.int64), apart[:2], labels[:2]) == pytest.approx(2.0)


def test_without_two_images_of_a_class_there_is_no_diversity() -> None:
    one, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    assert diversity(one, labels, one, labels) is None
    assert diversity(one, labels * 0, one, labels * 0) is None  # equal real images

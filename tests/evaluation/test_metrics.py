import pytest
import torch

from maskgit_pl.evaluation.metrics import class_agreement, diversity, mean_pairwise_distance


def test_agreement_of_a_perfect_classifier_is_one() -> None:
    requested = torch.tensor([0, 1, 2, 2])
    assert class_agreement(requested, requested) == 1
    assert class_agreement(torch.tensor([0, 1, 0, 0]), requested) == 0.5
    with pytest.raises(ValueError, match="must have the same shape"):
        class_agreement(requested, requested[:2])


def test_mean_pairwise_distance_is_over_all_pairs() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert mean_pairwise_distance(points) == pytest.approx(10 / 3)
    with pytest.raises(ValueError, match="number of rows must be >= 2, got"):
        mean_pairwise_distance(points[:1])


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


def test_diversity_without_pairs_is_refused() -> None:
    one, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="2 generated and 2 real"):
        diversity(one, labels, one, labels)

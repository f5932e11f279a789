"""Rejection sampling: the best of each class by a classifier are kept, and nothing else changes."""

import pytest
import torch

from maskgit_pl.networks.feature_networks import ClassifierSizes, FrozenClassifier, create_classifier
from maskgit_pl.pipeline.acceptance import Acceptance
from tests.conftest import CLASSES


@pytest.fixture(scope="module")
def classifier() -> FrozenClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_classifier(ClassifierSizes(1, 8, 3, width=4))
    return FrozenClassifier(network, CLASSES)


@pytest.mark.parametrize(("rate", "count", "candidates"), [(0.5, 4, 8), (0.3, 1, 4), (0.7, 21, 30), (1, 3, 3)])
def test_the_fewest_candidates_are_generated_that_keep_at_most_the_rate(classifier, rate, count, candidates):
    assert Acceptance(rate, classifier).num_candidates(count) == candidates


def test_the_first_of_equal_candidates_are_kept(classifier):
    labels = torch.tensor([0, 1, 0, 1, 0])
    assert Acceptance(0.5, classifier).choose(torch.zeros(5), labels, {0: 2, 1: 1}).tolist() == [0, 1, 2]


def test_wrong_rates_classes_and_classifiers_are_refused(classifier):
    for rate in (0, 1.5, float("nan"), "half"):
        with pytest.raises((ValueError, TypeError), match="accept_rate must"):
            Acceptance(rate, classifier)
    with pytest.raises(ValueError, match="classes must not be None with accept_rate"):
        Acceptance(0.5, classifier).check_classes(CLASSES, [0, 3])
    renamed = FrozenClassifier(classifier.network, ("Bag", *CLASSES[1:]))
    with pytest.raises(ValueError, match=r"must know the classes of the model .*train-classifier"):
        Acceptance(0.5, renamed).check_classes(CLASSES, [0])

"""Rejection sampling: the best of each class by a classifier are kept, and nothing else changes."""

import pytest
import torch

from maskgit_pl.networks.feature_networks import ClassifierSizes, FrozenClassifier, create_classifier
from maskgit_pl.pipeline.acceptance import Acceptance, choose_seeds
from tests.conftest import CLASSES
from tests.pipeline.conftest import images

LABELS = [2, 0, 2, 0, 2]


@pytest.fixture(scope="module")
def classifier() -> FrozenClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_classifier(ClassifierSizes(1, 8, 3, width=4))
    return FrozenClassifier(network, CLASSES)


def test_the_seeds_are_those_of_the_best_candidates_of_each_class(pipe, classifier):
    acceptance = Acceptance(0.25, classifier)
    counts = []
    chosen = choose_seeds(pipe, LABELS, acceptance, seed=7, batch_size=3, on_images=counts.append)
    # By hand: 12 candidates of class 2, then 8 of class 0, with seeds from 7 on.
    candidates = torch.tensor([2] * 12 + [0] * 8)
    log_probs = acceptance.log_probs(images(pipe, candidates, seed=7), candidates)
    for label, count in ((2, 3), (0, 2)):
        best = log_probs.where(candidates == label, -torch.inf).topk(count).indices
        kept = [seed for seed, its_label in zip(chosen.seeds, LABELS, strict=True) if its_label == label]
        assert kept == sorted((7 + best).tolist())
    assert chosen.num_candidates == sum(counts) == 20
    again = acceptance.log_probs(images(pipe, LABELS, seed=chosen.seeds), torch.tensor(LABELS))
    assert chosen.log_probs == pytest.approx(again.tolist(), abs=1e-4)


@pytest.mark.parametrize(("rate", "count", "candidates"), [(0.5, 4, 8), (0.3, 1, 4), (0.7, 21, 30), (1, 3, 3)])
def test_the_fewest_candidates_are_generated_that_keep_at_most_the_rate(classifier, rate, count, candidates):
    assert Acceptance(rate, classifier).num_candidates(count) == candidates


def test_the_first_of_equal_candidates_are_kept(classifier):
    labels = torch.tensor([0, 1, 0, 1, 0])
    assert Acceptance(0.5, classifier).choose(torch.zeros(5), labels, {0: 2, 1: 1}).tolist() == [0, 1, 2]


def test_wrong_rates_classes_and_classifiers_are_refused(pipe, classifier):
    for rate in (0, 1.5, float("nan"), "half"):
        with pytest.raises((ValueError, TypeError), match="accept_rate must"):
            Acceptance(rate, classifier)
    with pytest.raises(ValueError, match="classes must not be None with accept_rate"):
        choose_seeds(pipe, [0, None], Acceptance(0.5, classifier))
    renamed = FrozenClassifier(classifier.network, ("Bag", *CLASSES[1:]))
    with pytest.raises(ValueError, match=r"must know the classes of the model .*train-classifier"):
        choose_seeds(pipe, [0], Acceptance(0.5, renamed))

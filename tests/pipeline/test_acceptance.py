"""Rejection sampling: the best of each class by a classifier are kept, and nothing else changes."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from maskgit_pl.networks.feature_networks import ClassifierSizes, FrozenClassifier, create_classifier
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance, choose_seeds
from tests.conftest import CLASSES

LABELS = [2, 0, 2, 0, 2]


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


@pytest.fixture(scope="module")
def classifier() -> FrozenClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_classifier(ClassifierSizes(1, 8, 3, width=4))
    return FrozenClassifier(network, CLASSES)


def test_the_kept_images_are_the_best_of_each_class(pipe, classifier):
    acceptance = Acceptance(0.25, classifier)
    chosen = choose_seeds(pipe, LABELS, acceptance, seed=7)
    # By hand: 12 candidates of class 2, then 8 of class 0, with seeds from 7 on.
    candidates = torch.tensor([2] * 12 + [0] * 8)
    log_probs = acceptance.log_probs(pipe.generate(candidates, seed=7, output_type="pt"), candidates)
    best = {label: log_probs.where(candidates == label, -torch.inf).topk(count) for label, count in ((2, 3), (0, 2))}
    for label, top in best.items():
        kept = [seed for seed, own in zip(chosen.seeds, LABELS, strict=True) if own == label]
        assert sorted(kept) == sorted((7 + top.indices).tolist()) == kept
    assert chosen.num_candidates == 20
    assert chosen.log_probs == pytest.approx([float(log_probs[seed - 7]) for seed in chosen.seeds], abs=1e-4)


def test_the_seeds_give_the_accepted_images_again(pipe, classifier):
    acceptance = Acceptance(0.5, classifier)
    chosen = choose_seeds(pipe, LABELS, acceptance)
    again = pipe.generate(LABELS, seed=chosen.seeds, output_type="pt")
    assert acceptance.log_probs(again, torch.tensor(LABELS)).tolist() == pytest.approx(chosen.log_probs, abs=1e-4)
    plain = pipe.generate(LABELS, output_type="pt")
    for label in set(LABELS):
        own = torch.tensor(LABELS) == label
        probabilities = [acceptance.log_probs(each, torch.tensor(LABELS))[own].mean() for each in (again, plain)]
        assert probabilities[0] >= probabilities[1]


def test_settings_reach_the_candidates_and_batches_do_not_matter(pipe, classifier):
    counted = Counter()
    acceptance = Acceptance(0.5, classifier)
    first, second = (
        choose_seeds(
            pipe, LABELS, acceptance, batch_size=size, num_steps=2, on_images=lambda count: counted.update(images=count)
        )
        for size in (3, 64)
    )
    assert first.seeds == second.seeds
    assert counted["images"] == 20


def test_rate_1_keeps_everything(pipe, classifier):
    chosen = choose_seeds(pipe, [0, 0, 1], Acceptance(1.0, classifier), seed=3)
    assert chosen.seeds == [3, 4, 5]
    assert chosen.num_candidates == 3


@pytest.mark.parametrize(("rate", "count", "candidates"), [(0.5, 4, 8), (0.3, 1, 4), (0.7, 21, 30), (1, 3, 3)])
def test_the_number_of_candidates_is_the_smallest_that_keeps_at_most_the_rate(classifier, rate, count, candidates):
    assert Acceptance(rate, classifier).num_candidates(count) == candidates


def test_of_equal_candidates_the_first_are_kept(classifier):
    labels = torch.tensor([0, 1, 0, 1, 0])
    kept = Acceptance(0.5, classifier).choose(torch.zeros(5), labels, {0: 2, 1: 1})
    assert kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize("rate", [0, -0.5, 1.5, float("nan"), "half"])
def test_refuses_a_rate_that_is_none(classifier, rate):
    with pytest.raises((ValueError, TypeError), match="accept_rate must"):
        Acceptance(rate, classifier)


def test_refuses_no_class_and_a_classifier_of_other_classes(pipe, classifier):
    with pytest.raises(ValueError, match="classes must not be None with accept_rate"):
        choose_seeds(pipe, [0, None], Acceptance(0.5, classifier))
    other = FrozenClassifier(classifier.network, ("Bag", *CLASSES[1:]))
    with pytest.raises(ValueError, match=r"must know the classes of the model .*train-classifier"):
        choose_seeds(pipe, [0], Acceptance(0.5, other))

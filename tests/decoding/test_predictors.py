"""Autoguidance: a weaker network takes the place of the unconditional prediction."""

import dataclasses
import weakref

import pytest
import torch

from maskgit_pl.decoding import ConditionalModel, ParallelDecoder, decode_classes
from maskgit_pl.decoding.predictors import build_class_predictor, first_then
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules
from tests.conftest import random_transformer
from tests.decoding.fakes import CPU

STEPS = 5
LABELS, SEEDS = [0, 2, 1], [5, 6, 7]
SCALES = (0.0, 1.5, 0.0, 2.0, 0.5)
LARGE = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64)
SMALL = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32, class_dropout=0.0)


@pytest.fixture(scope="module")
def large() -> ConditionalModel:
    return ConditionalModel(random_transformer(LARGE), CPU)


@pytest.fixture(scope="module")
def small() -> ConditionalModel:
    """A smaller model without a null class, so that its mask token has another id."""
    return ConditionalModel(random_transformer(SMALL), CPU)


def guided_by(positive: ConditionalModel, negative: ConditionalModel, **changes) -> ConditionalModel:
    return dataclasses.replace(positive, negative=negative, **changes)


def decoded(conditional: ConditionalModel, scales=SCALES, selector="confidence") -> list[torch.Tensor]:
    decoder = ParallelDecoder(mask_schedules.build("cosine"), token_selectors.build(selector), num_steps=STEPS)
    return [step.tokens for step in decode_classes(conditional, LABELS, SEEDS, decoder=decoder, scales=scales)]


@pytest.mark.parametrize("negative_labels", [None, [1, 1, 0]])
def test_guided_logits_are_those_of_both_networks_by_the_formula(large, small, negative_labels):
    mask_ids = [m.network.config.mask_token_id for m in (large, small)]
    assert mask_ids[0] != mask_ids[1]
    is_masked, positions = torch.arange(16) % 3 == 0, torch.tensor([[0, 3, 6, 9, 12, 15]] * 3)
    codes = torch.arange(16).repeat(3, 1)
    tokens, small_tokens = (codes.masked_fill(is_masked, mask_id) for mask_id in mask_ids)
    conditional = large.network.forward_at(tokens, torch.tensor(LABELS), positions)
    other = small.network.forward_at(small_tokens, torch.tensor(negative_labels or LABELS), positions)
    scales = [1.5, 0.0, 2.0]
    predictor = build_class_predictor(guided_by(large, small), LABELS, negative_labels=negative_labels, scales=scales)
    for scale in scales:
        expected = conditional + scale * (conditional - other)
        torch.testing.assert_close(predictor(tokens, positions), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_guides_itself_is_unguided(large):
    unguided = decoded(large, (0.0,) * STEPS, "remdm")
    assert all(map(torch.equal, decoded(guided_by(large, large), selector="remdm"), unguided))


def test_guidance_by_another_network_changes_tokens_without_a_null_class(large, small):
    assert small.network.config.null_label is None
    assert not torch.equal(decoded(guided_by(small, large))[-1], decoded(small, (0.0,) * STEPS)[-1])


def test_the_logits_of_the_first_step_are_freed_after_it():
    def holding(logits: torch.Tensor):
        return lambda tokens, positions: logits

    first = torch.zeros(2)
    alive, predictor = weakref.ref(first), first_then(holding(first), holding(torch.ones(2)))
    del first
    nothing = torch.empty(0)
    assert predictor(nothing, nothing).sum() == 0
    assert alive() is None
    assert [float(predictor(nothing, nothing).sum()) for _ in range(2)] == [2, 2]

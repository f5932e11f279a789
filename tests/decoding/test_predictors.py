"""Guidance by classes and by another network, and the caches of the first step."""

import dataclasses

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import ConditionalModel, FirstStepLogits, ParallelDecoder, decode_classes
from maskgit_pl.decoding.predictors import apply_guidance, build_class_predictor
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.transformer import MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=3, num_heads=4, mlp_dim=64)
MASK, NULL = CONFIG.mask_token_id, 3
SCALES = (2.0, 2.0, 2.0, 0.0, 0.0, 2.0)


class Recording:
    """A network that remembers the labels and the number of positions of each call."""

    def __init__(self, network: MaskedTransformer) -> None:
        self.network = network
        self.labels: list[list[int]] = []
        self.num_positions: list[int] = []

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.labels.append(labels.tolist())
        self.num_positions.append(positions.shape[1])
        return self.network.forward_at(tokens, labels, positions)


@pytest.fixture
def recording() -> Recording:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Recording(MaskedTransformer(CONFIG).eval().requires_grad_(False))


def test_a_guided_step_runs_both_halves_and_an_unguided_step_one(recording):
    model = ConditionalModel(recording, (4, 4), MASK, NULL, torch.device("cpu"))
    decoder = ParallelDecoder(mask_schedules.build("cosine"), token_selectors.build("confidence"), num_steps=6)
    steps = list(decode_classes(model, [0, 2, 1], [5, 6, 7], decoder=decoder, scales=SCALES))
    classes, both = [0, 2, 1], [0, 2, 1, NULL, NULL, NULL]
    assert recording.labels == [[0, 1, 2, NULL], both, both, classes, classes, both]  # first, each class once
    assert recording.num_positions == [step.was_masked[0].sum() for step in steps]


CPU = torch.device("cpu")
STEPS = 5
LABELS, SEEDS = [0, 2, 1], [5, 6, 7]
AUTOGUIDANCE_SCALES = (0.0, 1.5, 0.0, 2.0, 0.5)
LARGE = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64)
SMALL = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32, class_dropout=0.0)


def network(config: TransformerConfig, seed: int) -> MaskedTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MaskedTransformer(config).eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


@pytest.fixture(scope="module")
def large() -> ConditionalModel:
    return ConditionalModel.from_network(network(LARGE, 0), CPU)


@pytest.fixture(scope="module")
def small() -> ConditionalModel:
    """A smaller model without a null class, so that its mask token has another id."""
    return ConditionalModel.from_network(network(SMALL, 1), CPU)


def guided_by(model: ConditionalModel, negative: ConditionalModel, **changes) -> ConditionalModel:
    return dataclasses.replace(model, negative=negative, **changes)


def decoded(model: ConditionalModel, scales=AUTOGUIDANCE_SCALES, selector="confidence", **options):
    decoder = ParallelDecoder(mask_schedules.build("cosine"), token_selectors.build(selector), num_steps=STEPS)
    return list(decode_classes(model, LABELS, SEEDS, decoder=decoder, scales=scales, **options))


def partly_masked(model: ConditionalModel) -> torch.Tensor:
    tokens = torch.arange(16).repeat(3, 1)
    return tokens.masked_fill(torch.arange(16) % 3 == 0, model.mask_token_id)


def test_the_logits_are_those_of_the_two_networks_by_hand(large, small):
    assert large.mask_token_id != small.mask_token_id
    tokens, positions = partly_masked(large), torch.tensor([[0, 3, 6, 9, 12, 15]] * 3)
    labels = torch.tensor(LABELS)
    own = large.network.forward_at(tokens, labels, positions)
    theirs = tokens.where(tokens != large.mask_token_id, torch.tensor(small.mask_token_id))
    other = small.network.forward_at(theirs, labels, positions)
    predictor = build_class_predictor(guided_by(large, small), LABELS, scales=[1.5, 0.0, 2.0])
    for scale in (1.5, 0.0, 2.0):
        made = predictor(tokens, positions)
        torch.testing.assert_close(made, own + scale * (own - other), rtol=1e-5, atol=1e-5)


def test_the_shared_first_step_is_guided_by_the_first_step_of_the_negative_network(large, small):
    positions = torch.arange(16).expand(3, 16)
    own, other = (
        each.network.forward_at(torch.full((3, 16), each.mask_token_id), torch.tensor(LABELS), positions)
        for each in (large, small)
    )
    predictor = build_class_predictor(guided_by(large, small), LABELS, scales=[3.0], all_masked=True)
    made = predictor(torch.full((3, 16), large.mask_token_id), positions)
    torch.testing.assert_close(made, apply_guidance(own, other, 3.0))


@pytest.mark.parametrize("selector", ["confidence", "halton", "remdm"])
def test_a_model_that_guides_itself_is_unguided(large, selector):
    for made, plain in zip(
        decoded(guided_by(large, large), selector=selector),
        decoded(large, (0.0,) * STEPS, selector=selector),
        strict=True,
    ):
        assert torch.equal(made.tokens, plain.tokens)


def test_scale_0_never_runs_the_negative_network(large):
    class Forbidden:
        def forward_at(self, *_):
            raise AssertionError

    model = guided_by(large, dataclasses.replace(large, network=Forbidden()))
    plain = decoded(large, (0.0,) * STEPS)
    assert torch.equal(decoded(model, (0.0,) * STEPS)[-1].tokens, plain[-1].tokens)
    with pytest.raises(AssertionError):
        decoded(model)


def test_guidance_by_another_network_changes_the_images_and_needs_no_null_class(large, small):
    without_null = dataclasses.replace(large, null_label=None)
    made = decoded(guided_by(without_null, small))
    assert torch.equal(made[-1].tokens, decoded(guided_by(large, small))[-1].tokens)
    assert not torch.equal(made[-1].tokens, decoded(large)[-1].tokens)
    with pytest.raises(ValueError, match="no null class"):
        decoded(without_null)


def test_the_negative_network_takes_the_negative_labels(large, small):
    other = [1, 1, 0]
    tokens, positions = partly_masked(large), torch.tensor([[0, 3]] * 3)
    theirs = tokens.where(tokens != large.mask_token_id, torch.tensor(small.mask_token_id))
    made = build_class_predictor(guided_by(large, small), LABELS, negative_labels=other, scales=[2.0])(
        tokens, positions
    )
    expected = apply_guidance(
        large.network.forward_at(tokens, torch.tensor(LABELS), positions),
        small.network.forward_at(theirs, torch.tensor(other), positions),
        2.0,
    )
    torch.testing.assert_close(made, expected)


def test_partly_known_tokens_are_completed_and_kept(large, small):
    tokens = partly_masked(large)
    last = decoded(guided_by(large, small), tokens=tokens, first_step=1)[-1].tokens
    known = tokens != large.mask_token_id
    assert torch.equal(last[known], tokens[known])
    assert (last < 16).all()


def test_the_caches_of_the_first_step_are_filled_once(large, small):
    caches = [FirstStepLogits(each.network, num_tokens=16, mask_token_id=each.mask_token_id) for each in (large, small)]
    model = guided_by(large, dataclasses.replace(small, first_step_logits=caches[1]), first_step_logits=caches[0])
    first = decoded(model, (2.0,) * STEPS)
    for cache in caches:
        cache.network = None  # a second computation would fail
    assert torch.equal(decoded(model, (2.0,) * STEPS)[0].tokens, first[0].tokens)

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    CachedPredictor,
    ClassPredictor,
    ConditionalModel,
    ParallelDecoder,
    decode_classes,
    predictors,
)
from maskgit_pl.decoding.predictors import build_class_predictor
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.transformer import ContextCache, MaskedTransformer, TransformerConfig
from maskgit_pl.schedules import mask_schedules

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=3, num_heads=4, mlp_dim=64)
MASK, NULL = CONFIG.mask_token_id, 3
CPU = torch.device("cpu")
STEPS = 6
GUIDANCE = [(0.0,) * STEPS, (2.0,) * STEPS, (0.0, 1.0, 1.0, 0.0, 0.0, 2.0)]


@pytest.fixture(scope="module")
def network() -> MaskedTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MaskedTransformer(CONFIG).eval().requires_grad_(False)
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


class Recording:
    """A network that remembers, for each call, how many rows and positions it computed: -1 for all positions."""

    def __init__(self, network: MaskedTransformer) -> None:
        self.network = network
        self.calls: list[tuple[int, int]] = []
        self.computed: list[Tensor] = []

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        self.calls.append((len(tokens), -1))
        return self.network.forward_at(tokens, labels, positions)

    def forward_cached(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, newly_known: Tensor, *, cache: ContextCache
    ) -> Tensor:
        anew = torch.cat([positions, newly_known], dim=1)
        self.calls.append((len(tokens), anew.shape[1] if cache.key_values else -1))
        self.computed.append(anew)
        return self.network.forward_cached(tokens, labels, positions, newly_known, cache=cache)


def model(network, context_cache: int) -> ConditionalModel:
    return ConditionalModel(network, (4, 4), MASK, NULL, CPU, context_cache=context_cache)


def decoded(network, *, scales=GUIDANCE[0], selector="confidence", context_cache=1):
    decoder = ParallelDecoder(mask_schedules.build("cosine"), token_selectors.build(selector), num_steps=STEPS)
    return list(
        decode_classes(
            model(network, context_cache),
            [0, 2, 1],
            [5, 6, 7],
            decoder=decoder,
            scales=scales,
        )
    )


def decoded_in_full_passes(network, **options):
    """Decodes like ``decoded``, with predictors that could reuse keys and values, and compute all at each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictors, "ClassPredictor", partial(CachedPredictor, context_cache=1))
        return decoded(network, **options)


@pytest.mark.parametrize("scales", GUIDANCE, ids=["none", "all", "on and off"])
def test_with_a_full_pass_at_each_call_the_cache_is_exact(network, scales):
    for made, exact in zip(
        decoded_in_full_passes(network, scales=scales), decoded(network, scales=scales), strict=True
    ):
        assert torch.equal(made.tokens, exact.tokens)
        assert torch.equal(made.confidence, exact.confidence)


@pytest.mark.parametrize("strategy", ["cap", "rescale", "confidence", "loop"])
@pytest.mark.parametrize("scales", GUIDANCE[1:], ids=["all", "on and off"])
def test_tokens_that_remdm_masks_again_are_computed_anew_in_a_full_pass(network, strategy, scales):
    selector = {"name": "remdm", "strategy": strategy, "eta": 0.6, "start": 0.3, "stop": 0.8, "hold": 0.6}
    exact = decoded(network, scales=scales, selector=selector)
    assert any((late.still_masked & ~early.still_masked).any() for early, late in pairwise(exact))
    for made, expected in zip(decoded_in_full_passes(network, scales=scales, selector=selector), exact, strict=True):
        assert torch.equal(made.tokens, expected.tokens)
        assert torch.equal(made.confidence, expected.confidence)


@pytest.mark.parametrize("selector", token_selectors.names())
def test_every_selector_decodes_with_a_cache_and_mostly_the_same_tokens(network, selector):
    made, exact = (decoded(network, selector=selector, context_cache=calls) for calls in (3, 1))
    assert torch.equal(made[0].tokens, exact[0].tokens)
    assert ((made[-1].tokens >= 0) & (made[-1].tokens < 16)).all()
    assert torch.equal(made[1].tokens, exact[1].tokens)  # the first call of the cache computes everything


def test_a_call_computes_what_is_masked_and_what_became_known_since_the_last_one(network):
    recording = Recording(network)
    steps = decoded(recording, context_cache=3)
    full = [call for call, (_, count) in enumerate(recording.calls) if count == -1]
    assert full == [0, 1, 4]  # the first step's shared logits, then every third call
    for call, step in enumerate(steps[1:], start=1):
        before, previous = step.was_masked, steps[call - 1].was_masked
        anew = torch.zeros_like(before).scatter(1, recording.computed[call - 1], True)
        assert torch.equal(anew, previous), call  # masked now, or decided by the last step
        assert (before <= anew).all()


def test_guidance_keeps_both_halves_and_begins_anew_where_a_half_was_left_out(network):
    recording = Recording(network)
    scales = (2.0, 2.0, 2.0, 0.0, 0.0, 2.0)
    decoded(recording, scales=scales, context_cache=10)
    assert [rows for rows, _ in recording.calls] == [4, 6, 6, 3, 3, 6]  # classes and the null class, then the steps
    assert [count == -1 for _, count in recording.calls] == [True, True, False, True, False, True]


def test_tokens_of_known_positions_are_not_looked_at_again_before_the_next_full_pass(network):
    tokens = torch.arange(16).remainder(16).unsqueeze(0)
    tokens[0, :6] = MASK
    labels, positions, none = torch.tensor([1]), torch.arange(6).unsqueeze(0), torch.empty(1, 0, dtype=torch.int64)
    cached = CachedPredictor(network, labels, context_cache=2)
    exact = ClassPredictor(network, labels)
    assert torch.equal(cached(tokens, positions, none), exact(tokens, positions, none))
    changed = tokens.clone()
    changed[0, 15] = 0  # nobody is told
    torch.testing.assert_close(cached(changed, positions, none), exact(tokens, positions, none), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached(changed, positions, none), exact(changed, positions, none))


def test_a_network_without_a_cache_and_a_context_cache_of_0_are_refused(network):
    with pytest.raises(
        TypeError, match=r"context_cache must be 1 for a network that cannot keep .*, got 4 and function"
    ):
        build_class_predictor(model(lambda tokens, labels, positions: tokens, 4), [0])
    with pytest.raises(ValueError, match=r"context_cache must be an integer in \[1, inf\), got 0"):
        build_class_predictor(model(network, 0), [0])
    assert isinstance(build_class_predictor(model(network, 4), [0]), CachedPredictor)
    assert build_class_predictor(model(network, 4), [0], all_masked=True).rest.context_cache == 4

"""Autoregressive decoding: one token per step in raster order, with a cache, guidance and the shared sampling."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import AutoregressiveDecoder, ConditionalModel, decode_autoregressive
from maskgit_pl.decoding.sampling import CodeSampling
from maskgit_pl.networks.transformer import AutoregressiveTransformer, TransformerConfig
from tests.conftest import random_transformer
from tests.decoding.fakes import CPU

CONFIG = TransformerConfig(16, 3, (3, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64, attention="causal")
N, NULL = CONFIG.num_tokens, CONFIG.null_label
LABELS, SEEDS = [0, 1], [5, 6]
GREEDY = CodeSampling(0.0)


@pytest.fixture(scope="module")
def network() -> AutoregressiveTransformer:
    return random_transformer(CONFIG)


def successor(tokens: Tensor) -> Tensor:
    """Predicts 2 c + 1 (mod 7) after code c, and 3 at the beginning."""
    code = (2 * tokens[:, -1] + 1) % 7 if tokens.shape[1] else torch.full((len(tokens),), 3)
    return 9.0 * torch.nn.functional.one_hot(code, 7)


class Recording:
    """Noise that records its calls. The code of a draw is its position, for any logits."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        self.calls.append((step, positions[0].tolist()))
        return positions % logits.shape[-1]


def run(network, labels=LABELS, seeds=SEEDS, *, scales=(0.0,) * N, sampling=None, **options) -> Tensor:
    decoder = AutoregressiveDecoder(N, sampling or CodeSampling())
    *_, last = decode_autoregressive(
        ConditionalModel(network, CPU), labels, seeds, decoder=decoder, scales=scales, **options
    )
    return last.tokens


def test_each_position_is_drawn_once_in_raster_order():
    noise, positions = Recording(), torch.arange(6)
    steps = list(AutoregressiveDecoder(6).steps(successor, noise, batch_size=2, device=CPU))
    assert noise.calls == [(0, [position]) for position in range(6)]
    assert steps[-1].tokens.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    for number, step in enumerate(steps):
        assert step.step == number
        assert torch.equal(step.was_masked, (positions >= number).expand(2, 6))
        assert torch.equal(step.still_masked, (positions > number).expand(2, 6))
        assert torch.equal(step.scores == torch.inf, ~step.was_masked)
        assert torch.equal(step.confidence > 0, ~step.still_masked)
    *_, last = AutoregressiveDecoder(6, GREEDY).steps(successor, noise, batch_size=2, device=CPU)
    assert last.tokens.tolist() == [[3, 0, 1, 3, 0, 1]] * 2  # each code is predicted from the one before
    torch.testing.assert_close(last.confidence, torch.full((2, 6), math.exp(9) / (math.exp(9) + 6)))


@pytest.mark.parametrize("scales", [(0.0,) * N, [step / 4 for step in range(N)]])
def test_a_cache_changes_no_token(network, scales):
    labels, seeds = [0, 1, 2, NULL], [3, 4, 5, 6]
    cached, computed = (run(network, labels, seeds, scales=scales, cache=cache) for cache in (True, False))
    assert torch.equal(cached, computed)


def test_guidance_has_a_scale_per_step_and_both_halves_in_one_batch(network, monkeypatch):
    scales, batch_sizes, forward_next = [0.0, 3.0, *[1.0] * (N - 2)], [], network.forward_next

    def record(tokens: Tensor, labels: Tensor, **options) -> Tensor:
        batch_sizes.append(len(tokens))
        return forward_next(tokens, labels, **options)

    monkeypatch.setattr(network, "forward_next", record)
    guided, plain = run(network, scales=scales, sampling=GREEDY), run(network, sampling=GREEDY)
    assert batch_sizes == [4] * N + [2] * N
    labels, null = torch.tensor(LABELS), torch.full((2,), NULL)
    for position, scale in enumerate(scales):
        conditional, unconditional = (forward_next(guided[:, :position], half) for half in (labels, null))
        expected = (conditional + scale * (conditional - unconditional)).argmax(-1)
        assert torch.equal(guided[:, position], expected)
    assert not torch.equal(guided, plain)


def test_guidance_takes_negative_classes_or_needs_a_null_class(network):
    scales, negative_labels = [8.0] * N, [2, 2]
    tokens = run(network, scales=scales, negative_labels=negative_labels)
    assert not torch.equal(tokens, run(network, scales=scales))
    without_null = random_transformer(dataclasses.replace(CONFIG, class_dropout=0.0))
    with pytest.raises(ValueError, match="guidance must have scale 0 for a model that has no null class"):
        run(without_null, scales=scales)


def test_codes_are_sampled_as_in_parallel_decoding(network):
    assert torch.equal(run(network, sampling=CodeSampling(1.0, top_k=1)), run(network, sampling=GREEDY))
    annealed = run(network, sampling=CodeSampling((1.0, 0.0)))
    assert torch.equal(annealed[:, 0], run(network)[:, 0])
    last = network.forward_next(annealed[:, :-1], torch.tensor(LABELS)).argmax(-1)
    assert torch.equal(annealed[:, -1], last)

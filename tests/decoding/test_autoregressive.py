import dataclasses
import math

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import (
    AutoregressiveDecoder,
    AutoregressiveDecoding,
    CodeSampling,
    ConditionalModel,
    DecodingConfig,
    decode_autoregressive,
)
from maskgit_pl.networks.transformer import AutoregressiveTransformer, TransformerConfig
from tests.conftest import random_transformer

CONFIG = TransformerConfig(16, 3, (3, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64, attention="causal")
N, K, NULL = CONFIG.num_tokens, CONFIG.codebook_size, CONFIG.null_label
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> AutoregressiveTransformer:
    return random_transformer(CONFIG)


def successor(tokens: Tensor) -> Tensor:
    """A network of three lines: after c comes 2 c + 1 (mod 7), an image begins with 3."""
    following = (2 * tokens[:, -1] + 1) % 7 if tokens.shape[1] else torch.full((len(tokens),), 3)
    return 9.0 * torch.nn.functional.one_hot(following, 7)


class Recorded:
    """Noise that records its calls. The code of a draw is the number of the call, for any logits."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int]]] = []

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        self.asked.append((step, positions[0].tolist()))
        return positions % logits.shape[-1]


def run(network, labels, seeds, *, scales=(0.0,) * N, sampling=None, null_label=NULL, **options) -> Tensor:
    decoder = AutoregressiveDecoder(N, sampling or CodeSampling())
    model = dataclasses.replace(ConditionalModel.from_network(network, CPU), null_label=null_label)
    *_, last = decode_autoregressive(model, labels, seeds, decoder=decoder, scales=scales, **options)
    return last.tokens


def test_the_likeliest_codes_follow_one_another():
    steps = AutoregressiveDecoder(6, CodeSampling(0.0)).steps(successor, Recorded(), batch_size=2, device=CPU)
    assert [step.tokens[1].tolist() for step in steps] == [
        [3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [3, 0, 1, 0, 0, 0], [3, 0, 1, 3, 0, 0], [3, 0, 1, 3, 0, 0],
        [3, 0, 1, 3, 0, 1],
    ]  # fmt: skip


def test_each_position_is_decided_once_in_raster_order():
    steps = list(AutoregressiveDecoder(6).steps(successor, Recorded(), batch_size=2, device=CPU))
    places = torch.arange(6)
    sure = math.exp(9) / (math.exp(9) + 6)
    for number, step in enumerate(steps):
        assert step.step == number
        assert torch.equal(step.was_masked, (places >= number).expand(2, 6))
        assert torch.equal(step.still_masked, (places > number).expand(2, 6))
        assert (step.scores.argmin(1) == 5).all()
        assert torch.equal(step.scores == torch.inf, ~step.was_masked)
        assert (step.confidence == 0)[:, number + 1 :].all()
        assert ((step.confidence > 0) & (step.confidence <= sure + 1e-6))[:, : number + 1].all()
    assert len(steps) == 6


def test_chance_is_asked_for_once_a_position():
    noise = Recorded()
    *_, last = AutoregressiveDecoder(6).steps(successor, noise, batch_size=2, device=CPU)
    assert noise.asked == [(0, [place]) for place in range(6)]
    assert last.tokens.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_a_cache_changes_no_token(network):
    labels, seeds = [0, 1, 2, NULL], [3, 4, 5, 6]
    scales = [step / 4 for step in range(N)]
    for chosen in (scales, [0.0] * N):
        kept, computed = (run(network, labels, seeds, scales=chosen, cache=cache) for cache in (True, False))
        assert torch.equal(kept, computed)


def test_tokens_depend_on_the_seed_and_not_on_the_batch(network):
    labels, seeds = [0, 1, 2, 0], [7, 8, 9, 7]
    together = run(network, labels, seeds)
    alone = [run(network, [label], [seed]) for label, seed in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together, run(network, labels, [1, 2, 3, 4]))


def test_codes_are_drawn_from_the_network_s_distribution(network):
    count = 4000
    first = run(network, [1] * count, range(count))[:, 0].bincount(minlength=K) / count
    expected = network.forward_next(torch.empty(1, 0, dtype=torch.int64), torch.tensor([1])).softmax(-1)[0]
    assert (first - expected).abs().max() < 0.03


def test_guidance_is_a_scale_a_step_with_both_halves_in_one_batch(network):
    scales = [0.0, 3.0, *[1.0] * (N - 2)]
    batches: list[int] = []
    original = network.forward_next

    def counted(tokens: Tensor, labels: Tensor, **options) -> Tensor:
        batches.append(len(tokens))
        return original(tokens, labels, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "forward_next", counted)
        made = run(network, [0, 1], [5, 6], scales=scales, sampling=CodeSampling(0.0))
        assert batches == [4] * N
        plain = run(network, [0, 1], [5, 6], sampling=CodeSampling(0.0))
        assert batches[N:] == [2] * N
    labels, null = torch.tensor([0, 1]), torch.full((2,), NULL)
    for place, scale in enumerate(scales):
        conditional, unconditional = (original(made[:, :place], each) for each in (labels, null))
        assert torch.equal((conditional + scale * (conditional - unconditional)).argmax(-1), made[:, place])
    assert torch.equal(made[:, 0], plain[:, 0])
    assert not torch.equal(made, plain)


def test_guidance_pushes_away_from_negative_classes_and_needs_a_class_to_push_from(network):
    scales = [8.0] * N
    pushed = run(network, [0, 1], [5, 6], scales=scales, negative_labels=[2, 2])
    assert not torch.equal(pushed, run(network, [0, 1], [5, 6], scales=scales))
    assert torch.equal(pushed, run(network, [0, 1], [5, 6], scales=scales, negative_labels=[2, 2], null_label=None))
    with pytest.raises(ValueError, match="guidance must have scale 0 for a model that has no null class"):
        run(network, [0, 1], [5, 6], scales=scales, null_label=None)


def test_sampling_is_that_of_parallel_decoding(network):
    likeliest = run(network, [0, 1], [5, 6], sampling=CodeSampling(0.0))
    assert torch.equal(run(network, [0, 1], [8, 9], sampling=CodeSampling(1.0, top_k=1)), likeliest)
    assert torch.equal(run(network, [0, 1], [8, 9], sampling=CodeSampling(1.0, top_p=1e-6)), likeliest)
    annealed = run(network, [0, 1], [8, 9], sampling=CodeSampling((1.0, 0.0)))
    hot = run(network, [0, 1], [8, 9])
    assert torch.equal(annealed[:, 0], hot[:, 0])
    last = network.forward_next(annealed[:, :-1], torch.tensor([0, 1])).argmax(-1)
    assert torch.equal(annealed[:, -1], last)


def test_a_recipe_becomes_one_of_n_steps():
    made = AutoregressiveDecoding({"name": "linear", "scale": 2.0}, (1.0, 0.5), 9, 0.9).to_config(49)
    assert made == DecodingConfig(
        49, None, {"name": "linear", "scale": 2.0}, sampling_temperature=(1.0, 0.5), top_k=9, top_p=0.9
    )
    assert made.is_autoregressive
    assert made.build_autoregressive_decoder(49) == AutoregressiveDecoder(49, CodeSampling((1.0, 0.5), 9, 0.9))
    assert len(made.scales()) == 49


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 8}, "num_steps must be 12 for an autoregressive model, one step per token, got 8"),
        ({"token_selector": "confidence"}, "token_selector must not be set for .* got 'confidence'"),
        ({"token_selector": {"choice_temperature": 1.0}}, "token_selector must .*'choice_temperature'"),
        ({"mask_schedule": "cosine"}, "mask_schedule must not be set for .* got 'cosine'; leave it out"),
        ({"tokens_per_step": (1,) * N}, "tokens_per_step must not be set"),
        ({"sampling_temperature": -1.0}, "sampling_temperature must be a number in"),
    ],
)  # fmt: skip
def test_what_an_autoregressive_model_cannot_follow_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AutoregressiveDecoding().to_config(N), **changes).build_autoregressive_decoder(N)


def test_a_schedule_that_is_none_is_refused():
    with pytest.raises(ValueError, match="mask_schedule must be given for parallel decoding, got None"):
        DecodingConfig().build_decoder(None)

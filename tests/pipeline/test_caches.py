"""After any change of its weights, a pipeline gives what a new pipeline with these weights gives."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskgit_pl import MaskGIT
from maskgit_pl.networks.kernels import PackingLinear


def train(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens, labels = torch.zeros(3, 16, dtype=torch.int64), torch.arange(3)
    logits = network(tokens, labels).flatten(0, 1)
    F.cross_entropy(logits, torch.arange(48) % 16).backward()
    optimizer.step()
    optimizer.zero_grad()


def fused_adamw(network: nn.Module) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.3, fused=True)
    for _ in range(2):
        train(network, optimizer)


def sgd(network: nn.Module) -> None:
    train(network, torch.optim.SGD(network.parameters(), lr=3.0))


def average_through_data(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.data.mul_(-0.5).add_(torch.linspace(-1, 1, weight.numel()).reshape(weight.shape), alpha=0.5)


def assign_data(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.data = weight.data.roll(1, 0) * -2


def load_weights(network: nn.Module) -> None:
    network.load_state_dict({name: weight.roll(1, 0) * -2 for name, weight in network.state_dict().items()})


def write_with_numpy(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.detach().numpy()[:] *= -2


def write_one_row_with_numpy(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, PackingLinear):
            layer.weight.detach().numpy()[1] += 3


CHANGES = [
    fused_adamw,
    sgd,
    average_through_data,
    assign_data,
    load_weights,
    write_with_numpy,
    write_one_row_with_numpy,
]
IMAGE = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
CALLS = {
    "generate": lambda pipe: pipe.generate([0, 1, 2], seed=0, output_type="pt"),
    "inpaint": lambda pipe: pipe.inpaint(IMAGE, IMAGE[0] > 20, classes=[1], output_type="pt", blend=0),
    "panorama": lambda pipe: pipe.panorama([1], 16, output_type="pt"),
}


@pytest.fixture
def pipe(tiny_pretrained) -> MaskGIT:
    made = MaskGIT.from_pretrained(tiny_pretrained)
    made.transformer.network.requires_grad_(requires_grad=True)
    return made


def renewed(pipe: MaskGIT, **options) -> MaskGIT:
    """Returns a new pipeline with the present weights of another."""
    transformer = replace(pipe.transformer, network=copy.deepcopy(pipe.transformer.network))
    return MaskGIT(pipe.tokenizer, transformer, mask_schedule="cosine", **options)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_follows_its_weights(pipe, change, call):
    before = call(pipe)
    change(pipe.transformer.network)
    after = call(renewed(pipe))
    assert not torch.equal(before, after)
    assert torch.equal(call(pipe), after)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_follows_the_weights_of_its_negative_model(pipe, change):
    own = renewed(pipe, negative_model=pipe)
    options = {"guidance_scale": 50.0, "seed": 0, "output_type": "pt"}
    before = own.generate([0, 1, 2], **options)
    change(pipe.transformer.network)
    after = own.generate([0, 1, 2], negative_model=renewed(pipe), **options)
    assert not torch.equal(before, after)
    assert torch.equal(own.generate([0, 1, 2], **options), after)


def test_the_last_step_is_followed_even_if_images_are_made_between_the_gradients_and_the_step(pipe):
    network = pipe.transformer.network
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.3, fused=True)
    network(torch.zeros(3, 16, dtype=torch.int64), torch.arange(3)).square().mean().backward()
    CALLS["generate"](pipe)
    optimizer.step()
    assert torch.equal(CALLS["generate"](pipe), CALLS["generate"](renewed(pipe)))


def test_unchanged_weights_are_neither_packed_nor_decoded_again(pipe):
    CALLS["generate"](pipe)
    layers = [layer for layer in pipe.transformer.network.modules() if isinstance(layer, PackingLinear)]
    packed, logits = [dict(layer._packed) for layer in layers], dict(pipe.caches.first_step._known)
    assert logits
    CALLS["inpaint"](pipe)
    CALLS["generate"](pipe)
    assert all(pipe.caches.first_step._known[label] is each for label, each in logits.items())
    for layer, before in zip(layers, packed, strict=True):
        assert all(layer._packed[rows] is each for rows, each in before.items())


def test_a_write_to_one_entry_of_a_large_weight_needs_clear_caches(pipe):
    with torch.no_grad():
        weight = nn.Parameter(torch.zeros(128, 64))
        pipe.transformer.network.register_parameter("large", weight)
    CALLS["generate"](pipe)
    weight.detach().numpy()[0, 1] = 1  # the comparison reads entries 0, 509, ...
    CALLS["generate"](pipe)
    assert pipe.caches.first_step._known
    pipe.clear_caches()
    assert not pipe.caches.first_step._known


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_follow_their_own_weights(pipe, copied):
    before = CALLS["generate"](pipe)
    other = copied(pipe)
    assert torch.equal(CALLS["generate"](other), before)
    write_with_numpy(other.transformer.network)
    assert torch.equal(CALLS["generate"](other), CALLS["generate"](renewed(other)))
    assert torch.equal(CALLS["generate"](pipe), before)


def test_a_pickle_holds_the_weights_once(pipe):
    CALLS["generate"](pipe)
    pipe.caches.first_step.clear()
    assert len(pickle.dumps(pipe.caches)) < 1.5 * len(pickle.dumps(pipe.transformer.network))

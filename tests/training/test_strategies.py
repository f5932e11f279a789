"""Activation checkpointing and compilation change neither the results nor the names in a state dict."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from maskgit_pl.masking import true_positions
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.training.strategies import (
    check_strategy,
    prepare_blocks,
)
from tests.short_runs import masked_model

CONFIG = masked_model(TransformerConfig(16, 3, (4, 4), 8, 2, 2, 16), "").config
MUON = replace(CONFIG.optimizer, algorithm="muon")


@pytest.mark.parametrize(
    ("name", "stage", "config", "ranks", "reason"),
    [
        ("auto", "transformer", CONFIG, 1, None),
        ("ddp", "tokenizer", CONFIG, 2, None),
        ("fsdp", "transformer", CONFIG, 2, None),
        ("auto", "transformer", CONFIG, 2, "for 2 ranks, got 'auto'"),
        ("fsdp", "tokenizer", CONFIG, 1, "for the tokenizer, got 'fsdp'; use --cluster ddp"),
        ("fsdp", "transformer", replace(CONFIG, optimizer=MUON), 1, "'muon', which needs whole matrices"),
    ],
)
def test_a_strategy_must_support_the_module_and_the_number_of_ranks(name, stage, config, ranks, reason):
    with pytest.raises(ValueError, match=f"trainer.strategy must .*{reason}") if reason else nullcontext():
        check_strategy(name, config, stage=stage, ranks=ranks)


def transformer(attention="bidirectional", dropout=0.1):
    torch.manual_seed(0)
    return TransformerConfig(16, 3, (4, 4), 32, 3, 2, 64, attention=attention, dropout=dropout).create()


def loss_of_tokens(network, seed=1):
    torch.manual_seed(seed)
    tokens, labels, mask = torch.randint(16, (4, 16)), torch.randint(3, (4,)), torch.rand(4, 16) < 0.1 + 0.2 * seed
    return network.forward_selected(tokens, labels, true_positions(mask), vocabulary="all").square().mean()


def tokenizer(layout):
    torch.manual_seed(0)
    more = {"attention_levels": (1,), "latent_channels": 4} if layout == "taming" else {}
    config = VQGANConfig(1, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2,
                         codebook_size=16, code_dim=4,
                         layout=layout, **more)  # fmt: skip
    return VQGAN(config)


def loss_of_images(network):
    torch.manual_seed(1)
    output = network(torch.rand(2, 1, 8, 8))
    return output.reconstruction.square().mean() + output.quantized.loss


def blocks_of(network):
    return network.blocks if hasattr(network, "blocks") else [*network.encoder.blocks, *network.decoder.blocks]


def loss_and_gradients(network, loss_of, **options):
    loss = loss_of(network, **options)
    network.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("network", "loss_of"),
    [
        (transformer(), loss_of_tokens),
        (transformer("causal"), loss_of_tokens),
        (tokenizer("maskgit"), loss_of_images),
        (tokenizer("taming"), loss_of_images),
    ],
    ids=["bidirectional", "causal", "maskgit", "taming"],
)
def test_checkpointed_blocks_run_twice_with_bit_exact_loss_and_gradients(network, loss_of):
    other = copy.deepcopy(network)
    prepare_blocks(blocks_of(other), activation_checkpointing="blocks")
    runs = []
    parts = [next(iter(block.children())) for block in blocks_of(other) if list(block.children())]
    for part in parts:
        part.register_forward_pre_hook(lambda *_: runs.append(1))
    (loss, gradients), (again, others) = loss_and_gradients(network, loss_of), loss_and_gradients(other, loss_of)
    assert len(runs) == 2 * len(parts) > 4
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    assert list(other.state_dict()) == list(network.state_dict())


@pytest.mark.exports
@pytest.mark.slow  # 20 s and more: the inductor's first step
@pytest.mark.filterwarnings("ignore")  # torch warns of its own imports and views
def test_compiled_blocks_give_nearly_the_same_loss_and_keep_their_names():
    network = transformer(dropout=0.0)
    other = copy.deepcopy(network)
    prepare_blocks(other.blocks, activation_checkpointing="blocks", compiled="blocks")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (1, 2, 3):  # each has another number of masked tokens
        (loss, gradients), (near, others) = (
            loss_and_gradients(one, loss_of_tokens, seed=seed) for one in (network, other)
        )
        torch.testing.assert_close(near, loss, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert list(other.state_dict()) == list(network.state_dict())

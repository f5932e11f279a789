"""Activation checkpointing changes neither the results nor the names in a state dict; strategies that are refused."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from maskgit_pl.networks.blocks import prepare_blocks
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.training.strategies import check_strategy, shard_blocks
from tests.short_runs import assert_equal, masked_model

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


def tokenizer(layout):
    torch.manual_seed(0)
    more = {"attention_levels": (1,), "latent_channels": 4} if layout == "taming" else {}
    config = VQGANConfig(1, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=2,
                         codebook_size=16, code_dim=4,
                         layout=layout, **more)  # fmt: skip
    return VQGAN(config)


def loss_and_gradients(network):
    torch.manual_seed(1)
    output = network(torch.rand(2, 1, 8, 8))
    loss = output.reconstruction.square().mean() + output.quantized.loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["maskgit", "taming"])
def test_checkpointed_blocks_run_twice_with_bit_exact_loss_and_gradients(layout):
    """The tokenizer is compared here, and every backbone in ``tests/networks/test_backbone.py``."""
    network, other = tokenizer(layout), tokenizer(layout)
    blocks, runs = [*other.encoder.blocks, *other.decoder.blocks], []
    prepare_blocks(blocks, activation_checkpointing="blocks")
    parts = [next(iter(block.children())) for block in blocks if list(block.children())]
    for part in parts:
        part.register_forward_pre_hook(lambda *_: runs.append(1))
    (loss, gradients), (again, others) = loss_and_gradients(network), loss_and_gradients(other)
    assert len(runs) == 2 * len(parts) > 4
    assert torch.equal(loss, again)
    assert_equal(others, gradients)
    assert list(other.state_dict()) == list(network.state_dict())


class Recording(nn.Linear):
    def forward(self, x):
        self.gathered = self.weight.dtype
        return super().forward(x)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_blocks_are_gathered_in_the_precision_and_their_gradients_in_float32(tmp_path, precision, dtype):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        network = nn.Sequential(Recording(2, 2))
        shard_blocks(network, network, init_device_mesh("cpu", (1,)), precision=precision)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            network(torch.ones(1, 2)).sum().backward()
        assert network[0].gathered == dtype
        assert network[0].weight.dtype == network[0].weight.grad.dtype == torch.float32
    finally:
        dist.destroy_process_group()

"""Counts on fake tensors equal the tensors that a real step keeps and its products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskgit_pl.networks.backbone import backbones
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.runs.flops import count_backbone, count_step, fake_tensors, step_flops, transformer_activations
from maskgit_pl.training.strategies import prepare_blocks
from tests.networks.backbone_cases import inputs, small_config
from tests.runs.live_bytes import LiveBytes

VQ = VQGANConfig(
    3, base_channels=32, num_groups=8, channel_multipliers=(1, 1, 2), num_res_blocks=1, codebook_size=64, code_dim=16
)
SMALL = [small_config(name, depth=6, embed_dim=64, mlp_dim=128, grid=[8, 8], dropout=0.0) for name in backbones.names()]


@pytest.mark.slow
def test_nothing_is_computed_and_the_same_is_counted():
    def step_of(network):
        def step():
            output = network(torch.rand(2, 3, 32, 32))
            (output.reconstruction.float().square().sum() + output.quantized.loss).backward()

        return step

    real = VQGAN(VQ)
    with torch.device("meta"):
        empty = VQGAN(VQ)
    counted = count_step(step_of(real), [real])
    with fake_tensors(empty):
        assert count_step(step_of(empty), [empty]) == counted
    assert counted.flops > 0 < counted.outside


def test_views_count_once_weights_never_and_a_block_keeps_its_own():
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Tanh()])

    def step():
        x = torch.rand(4, 8, requires_grad=True)
        blocks[1](blocks[0](x)).view(32).square().sum().backward()

    counts = count_step(step, [blocks], blocks=blocks)
    one = 4 * 8 * 4
    # The output of the first block is kept by its Tanh; that of the second by its own.
    assert (counts.outside, counts.inputs, counts.in_blocks) == (0, one, (one, one))
    assert counts.kept("none") == 3 * one
    assert counts.kept("blocks") == 2 * one
    assert counts.flops == 3 * 2 * 4 * 8 * 8


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("config", SMALL, ids=backbones.names())
def test_a_backbone_costs_what_a_step_with_all_tokens_masked_allocates_and_multiplies(config, checkpointing):
    network = config.create()
    prepare_blocks(network.blocks, activation_checkpointing=checkpointing)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, labels, _, _ = inputs(config, batch=2)
    known = [*network.parameters(), *(each.grad for each in network.parameters()), tokens, labels]
    with LiveBytes(known) as live:
        positions = torch.arange(tokens.numel())
        F.log_softmax(network.forward_selected(tokens, labels, positions, vocabulary="all"), -1).mean().backward()
    one, two = (count_backbone(config, images=images, masked=64) for images in (1, 2))
    logits = 3 * 4 * 2 * 64 * config.num_columns("all")
    assert 0.85 < (2 * (two.kept(checkpointing) - one.kept(checkpointing)) + logits) / live.peak < 1.3
    assert two.flops == 2 * one.flops


@pytest.mark.slow
@pytest.mark.parametrize("config", SMALL, ids=backbones.names())
def test_flops_of_a_backbone_are_those_that_torch_counts_with_attention(config):
    network = config.create()
    tokens, labels, _, _ = inputs(config, batch=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.forward_selected(tokens, labels, torch.arange(9), vocabulary="all").mean().backward()
    assert count_backbone(config, masked=9).flops == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_transformer_costs_what_its_formulas_say(precision):
    config = TransformerConfig(256, 10, (8, 8), 128, 4, 4, 512, dropout=0.0)
    one, two = (count_backbone(config, images=images, masked=64, precision=precision) for images in (1, 2))
    formula = transformer_activations(config, batch=1, precision=precision)
    assert 0.95 * formula.kept < two.kept("none") - one.kept("none") < 1.1 * formula.kept
    assert one.flops == step_flops(config, images=1, masked=64)

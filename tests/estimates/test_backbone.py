"""Replays of backbones equal what a real step allocates and multiplies, and the closed formulas of the transformer."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from maskgit_pl.estimates import backbone
from maskgit_pl.estimates.backbone import masked_token_flops, replay_backbone
from maskgit_pl.estimates.replay import LiveBytes
from maskgit_pl.estimates.transformer import step_flops, transformer_activations
from maskgit_pl.networks.backbone import backbones
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.training.compile_and_checkpointing import prepare_blocks
from tests.networks.backbone_cases import inputs, small_config

SMALL = [small_config(name, depth=3, embed_dim=64, mlp_dim=128, grid=[8, 8]) for name in backbones.names()]


@pytest.mark.parametrize("config", SMALL, ids=backbones.names())
def test_a_replay_is_what_a_step_with_all_tokens_masked_allocates_and_multiplies(config):
    network = config.create()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, labels, _, _ = inputs(config, batch=2)
    known = [*network.parameters(), *(each.grad for each in network.parameters()), tokens, labels]
    with LiveBytes(known) as live, FlopCounterMode(display=False) as counter:
        F.log_softmax(network(tokens, labels, vocabulary="all"), -1).mean().backward()
    made = replay_backbone(config)
    assert made.peak_of(2) == pytest.approx(live.peak, rel=0.1)
    assert 2 * made.flops == counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("config", SMALL, ids=backbones.names())
def test_many_blocks_are_extrapolated_exactly(config, checkpointing, monkeypatch):
    prepare = partial(prepare_blocks, activation_checkpointing=checkpointing)
    config = replace(config, depth=7)
    made = replay_backbone(config, prepare=prepare)
    short = masked_token_flops(config)
    monkeypatch.setattr(backbone, "_has_equal_blocks", lambda config: False)
    assert replay_backbone(config, prepare=prepare) == made
    assert masked_token_flops(config) == short


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_transformer_costs_what_its_formulas_say(precision):
    config = TransformerConfig(256, 10, (8, 8), 128, 4, 4, 512)
    made = replay_backbone(config, precision=precision)
    formula = transformer_activations(config, batch=1, precision=precision)
    assert made.casts == pytest.approx(formula.casts, rel=0.05)
    assert 0.95 * formula.total < made.peak < 1.2 * formula.total
    # The backward pass of fused attention is counted with 2.5 forward passes instead of 2.
    assert made.flops == pytest.approx(step_flops(config, images=1, masked=64), rel=0.1)
    saved = (step_flops(config, images=1, masked=64) - step_flops(config, images=1, masked=1)) / 63
    extra = 6 * 128 * (config.vocabulary_size - config.codebook_size)  # the head of the replay computes codes only
    assert masked_token_flops(config) == pytest.approx(saved - extra)


def test_checkpointed_blocks_keep_less_and_compute_more():
    config = small_config("adaln", depth=6, embed_dim=64, mlp_dim=128, grid=[8, 8], dropout=0.1)
    plain = replay_backbone(config)
    again = replay_backbone(config, prepare=partial(prepare_blocks, activation_checkpointing="blocks"))
    assert again.peak < plain.peak / 2
    assert 1.2 < again.flops / plain.flops < 1.5

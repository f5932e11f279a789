"""Counts on fake tensors equal the tensors that a real step keeps and its products.

The closed formulas of stage 2 equal the real network: weights, kept tensors, FLOPs.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskgit_pl import losses
from maskgit_pl.losses import chunked_statistics, masked_cross_entropy, token_statistics
from maskgit_pl.masking import true_positions
from maskgit_pl.networks.backbone import backbones
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.runs.flops import (
    count_backbone,
    count_step,
    fake_tensors,
    mean_num_masked,
    step_flops,
    transformer_activations,
)
from maskgit_pl.schedules import mask_schedules
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


PAPER_256 = TransformerConfig(1024, 1000, (16, 16), class_dropout=0.0)
PAPER_512 = TransformerConfig(1024, 1000, (32, 32), class_dropout=0.0)
NARROW = TransformerConfig(64, 10, (8, 8), 64, 4, 4, 256, dropout=0.0)
WORDY = TransformerConfig(1024, 1000, (8, 8), 128, 6, 4, 512, dropout=0.0, class_dropout=0.0)
LONG = TransformerConfig(256, 10, (12, 12), 96, 8, 4, 384, dropout=0.0, attention="causal")
GROUPED = TransformerConfig(2**14, 10, (8, 8), 96, 4, 4, 384, dropout=0.0, num_token_groups=2)
CONFIGS = {"narrow": NARROW, "wordy": WORDY, "long": LONG, "grouped": GROUPED}
BATCH = 6


@pytest.mark.parametrize(("config", "released"), [(PAPER_256, 172_457_193), (PAPER_512, 173_047_017)])
def test_parameters_of_the_released_sizes(config, released):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in config.create().parameters()) == released


def batch_of(config):
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.codebook_size, (BATCH, config.num_tokens), generator=chance)
    share = 1.0 if config.attention == "causal" else 0.6
    mask = torch.rand(BATCH, config.num_tokens, generator=chance) < share
    return tokens, torch.zeros(BATCH, dtype=torch.long), mask


def forward(network, tokens, labels, mask, vocabulary="all"):
    config = network.config
    logits = network.forward_masked(tokens, labels, mask, vocabulary=config.loss_columns(vocabulary))
    options = {"num_rows": BATCH, "label_smoothing": 0.1, "num_token_groups": config.num_token_groups}
    return masked_cross_entropy(logits, tokens[mask], mask.nonzero()[:, 0], **options)[0]


def measured(config, precision, checkpointing):
    """Returns the bytes that a real step keeps between its passes, those that autograd reports, and the peak."""
    network = config.create()
    prepare_blocks(network.blocks, activation_checkpointing=checkpointing)
    batch = batch_of(config)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what is there already counts nothing
    known = [*network.parameters(), *(parameter.grad for parameter in network.parameters()), *batch]
    old = {tensor.untyped_storage()._cdata for tensor in known}
    saved = {}

    def pack(tensor):
        if (storage := tensor.untyped_storage())._cdata not in old:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with LiveBytes(known) as live, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward(network, *batch)
        kept = live.live
        loss.backward()
    return kept, sum(saved.values()), live.peak, int(batch[2].sum())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_those_that_a_step_keeps(name, precision, checkpointing):
    config = CONFIGS[name]
    kept, saved, peak, masked = measured(config, precision, checkpointing)
    made = transformer_activations(config, batch=BATCH, masked=masked, precision=precision, checkpointing=checkpointing)
    assert made.kept + made.casts == pytest.approx(kept, rel=0.03)
    if (precision, checkpointing) == ("32-true", "none"):  # elsewhere the copies of weights are autocast's, not saved
        assert made.kept == pytest.approx(saved, rel=0.01)
    assert 0.99 * peak < made.total < 1.15 * peak


def test_activations_of_a_chunked_head_are_those_that_a_step_keeps(monkeypatch):
    config = replace(NARROW, codebook_size=2**14)
    monkeypatch.setattr(losses, "_MOST_LOGITS", 2**14)
    monkeypatch.setattr(losses, "_LEAST_ROWS", 16)
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 0)

    def chunked(network, tokens, labels, mask):
        measure = partial(token_statistics, label_smoothing=0.1)
        project, positions = partial(chunked_statistics, targets=tokens[mask], measure=measure), true_positions(mask)
        return network.forward_selected(tokens, labels, positions, vocabulary="all", project=project)[:, 0].mean()

    monkeypatch.setitem(globals(), "forward", chunked)
    kept, _, peak, masked = measured(config, "32-true", "none")
    made = transformer_activations(config, batch=BATCH, masked=masked)
    assert made.kept == pytest.approx(kept, rel=0.03)
    assert 0.95 * peak < made.total < 1.15 * peak
    assert made.total < 3 * masked * config.num_rows * 4  # less than whole logits alone


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("num_classes", [1000, 20_000])
def test_a_loss_over_the_codes_has_no_columns_for_classes(monkeypatch, num_classes, precision, checkpointing):
    monkeypatch.setitem(globals(), "forward", partial(forward, vocabulary="codes"))
    config = replace(WORDY, num_classes=num_classes)
    kept, _, peak, masked = measured(config, precision, checkpointing)
    options = {"precision": precision, "checkpointing": checkpointing, "vocabulary": "codes"}
    made = transformer_activations(config, batch=BATCH, masked=masked, **options)
    assert made.kept + made.casts == pytest.approx(kept, rel=0.03)
    assert 0.99 * peak < made.total < 1.15 * peak


def test_flops_of_a_loss_over_the_codes_are_those_that_torch_counts():
    network = WORDY.create()
    tokens, labels, mask = batch_of(WORDY)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(network, tokens, labels, mask, vocabulary="codes").backward()
    expected = step_flops(WORDY, images=BATCH, masked=int(mask.sum()), vocabulary="codes")
    assert counter.get_total_flops() == expected


def test_recomputed_blocks_keep_less_and_all_tokens_masked_is_the_most():
    least = transformer_activations(PAPER_256, batch=16, checkpointing="blocks").total
    some = transformer_activations(PAPER_256, batch=16, masked=16 * 160).total
    assert least < some / 5 < transformer_activations(PAPER_256, batch=16).total


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_that_torch_counts(name):
    config = CONFIGS[name]
    network = config.create()
    tokens, labels, mask = batch_of(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(network, tokens, labels, mask).backward()
    assert counter.get_total_flops() == step_flops(config, images=BATCH, masked=int(mask.sum()))


def test_masked_tokens_on_average():
    cosine, linear = mask_schedules.build("cosine"), mask_schedules.build("linear")
    assert mean_num_masked(cosine, 256) / 256 == pytest.approx(2 / math.pi, abs=0.5 / 256 + 1e-4)  # rounded up
    assert mean_num_masked(linear, 256, min_mask_ratio=0.5) / 256 == pytest.approx(0.625, abs=0.5 / 256 + 1e-4)

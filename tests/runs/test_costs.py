"""Estimates of memory, FLOPs and disk space equal those of a real training run."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from maskgit_pl.cli import main
from maskgit_pl.estimates.backbone import has_chunked_loss, replay_backbone
from maskgit_pl.estimates.replay import LiveBytes, fake_tensors, replay
from maskgit_pl.losses import chunked_statistics, token_statistics
from maskgit_pl.networks.discriminator import DiscriminatorConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.runs.costs import TokenizerCosts, TransformerCosts, _count_predicted, _first_full_step, _images_of
from maskgit_pl.tokenizer_config import AdversarialConfig
from maskgit_pl.training.checkpoint_files import newest_checkpoint
from tests.conftest import flags
from tests.modules import masked_model, tokenizer_model
from tests.networks.backbone_cases import small_config

TINY = Path(__file__).parents[1] / "tiny"
VQGAN = VQGANConfig(
    1, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=8, codebook_size=16, code_dim=8
)
OPPONENT = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 8), start_step=3, r1_every=2, lecam_weight=0.1)


def tokenizer(**more):
    return tokenizer_model(VQGAN, image_size=16, **more)


# The adaptive weight differentiates through blocks that run again; the other two combinations add nothing.
@pytest.mark.parametrize(("weight_rule", "checkpointing"), [("fixed", "none"), ("adaptive", "blocks")])
def test_a_replay_is_the_real_step_of_stage_1(weight_rule, checkpointing):
    config = AdversarialConfig(OPPONENT.discriminator, weight_rule=weight_rule)
    real = tokenizer(adversarial=config, activation_checkpointing=checkpointing)
    networks = [real.network, real.discriminator]
    for parameter in (parameter for network in networks for parameter in network.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    batch = _images_of(real.config, 1)
    with LiveBytes([tensor for network in networks for tensor in network.parameters()]):
        real.replay_step(batch, step=0)  # the first call makes tensors that stay
    counted = replay(lambda: real.replay_step(batch, step=0), networks)
    costs = TokenizerCosts("ddp", 8, module=tokenizer(adversarial=config, activation_checkpointing=checkpointing))
    memory = costs.memory(1)
    assert memory.activations == pytest.approx(counted.peak, rel=0.05)
    assert costs.flops(1)[1] == counted.flops
    assert (
        memory.weights == 4 * costs.trained == 4 * sum(p.numel() for network in networks for p in network.parameters())
    )


def test_blocks_run_again_in_bfloat16_too():
    # Without R1, whose second derivative in float32 would be the peak of both.
    config = AdversarialConfig(OPPONENT.discriminator, weight_rule="adaptive", r1_weight=0.0)
    none, blocks = (
        TokenizerCosts(
            "ddp", 8, "bf16-mixed", each, module=tokenizer(adversarial=config, activation_checkpointing=each)
        )
        for each in ("none", "blocks")
    )
    assert blocks.memory(1).activations < none.memory(1).activations
    assert blocks.memory(1).casts == none.memory(1).casts
    useful, executed = blocks.flops(1)
    assert useful == none.flops(1)[0] == none.flops(1)[1]
    assert executed > useful
    assert blocks.flops(1) == (useful, executed)  # the blocks are as before


@pytest.mark.parametrize(("start", "every", "full"), [(0, 1, 0), (3, 2, 4), (4, 4, 4), (5, 4, 8)])
def test_the_replayed_step_has_every_loss(start, every, full):
    config = AdversarialConfig(start_step=start, r1_every=every)
    assert _first_full_step(config) == full
    assert config.has_started(full)
    assert config.has_r1_penalty(full)


def test_the_second_derivative_of_r1_is_in_float32_under_bf16_mixed():
    config = AdversarialConfig(OPPONENT.discriminator)
    module = tokenizer(adversarial=config)
    dtypes, run = [], module.discriminator.forward

    def watched(images):
        logits = run(images)
        dtypes.append(logits.dtype)
        return logits

    module.discriminator.forward = watched
    assert TokenizerCosts("ddp", 8, "bf16-mixed", module=module).memory(1).activations > 0
    assert dtypes[:2] == [torch.float32, torch.bfloat16]  # real images, with the penalty; reconstructions


def test_flops_are_the_mean_of_steps_with_and_without_the_penalty():
    def flops(**options):
        config = AdversarialConfig(OPPONENT.discriminator, **options)
        return TokenizerCosts("ddp", 8, module=tokenizer(adversarial=config)).flops(4)[0]

    always, never, sometimes = flops(r1_every=1), flops(r1_weight=0.0), flops(r1_every=4)
    assert always > never
    assert sometimes == never + (always - never) / 4


LARGE_VQGAN = replace(VQGAN, quantizer={"name": "ibq", "entropy_weight": 0.05}, codebook_size=2**14, code_dim=64)


class Features(nn.Module):
    """A large frozen network, whose bfloat16 copies do not grow with the batch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 2048))
        self.requires_grad_(requires_grad=False)

    def forward(self, image, target):
        return (self.layers(image) - self.layers(target)).square().mean(1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("network", [VQGAN, LARGE_VQGAN], ids=["small", "large"])
def test_the_memory_of_several_images_is_that_of_a_replay_with_them(network, precision):
    def build():
        made = tokenizer_model(network, image_size=16, adversarial=OPPONENT)
        made.similarity_loss.network, made.similarity_loss.perceptual = Features(), SimpleNamespace(weight=0.1)
        return made

    costs, module = TokenizerCosts("ddp", 8, precision, module=build()), build()
    networks = [module.network, module.discriminator, module.similarity_loss.network]
    with fake_tensors(*networks):
        for parameter in (parameter for each in networks[:2] for parameter in each.parameters()):
            parameter.grad = torch.empty_like(parameter)
        batch = _images_of(module.config, 8)
        peak = replay(lambda: module.replay_step(batch, step=4), networks, precision=precision).peak
    memory = costs.memory(8)
    assert 0.99 * peak < memory.activations + memory.casts < 1.2 * peak


def test_more_images_take_more():
    costs = TokenizerCosts("ddp", 8, module=tokenizer(adversarial=OPPONENT))
    one, four = costs.memory(1), costs.memory(4)
    assert 2 * one.activations < four.activations <= 4 * one.activations
    assert four.weights == one.weights
    assert costs.flops(64)[0] == 64 * costs.flops(1)[0]
    assert costs.largest_batch(12, four.total) == 4
    assert costs.largest_batch(12, one.total - 1) is None


def train(stage: str, tmp_path: Path, shards: Path, *more: str) -> int:
    """Trains one step, and returns the size of its checkpoint in bytes."""
    tiny = flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text()))
    words = ["--data", str(shards), "--runs-folder", str(tmp_path), "--run", "one", *tiny, *more]
    assert main(["train", stage, *words]) == 0
    newest = newest_checkpoint(tmp_path / "one" / stage / "checkpoints")
    return sum(file.stat().st_size for file in newest.iterdir())


def test_the_size_of_a_checkpoint_of_stage_1(tmp_path, tiny_shards):
    sizes = [
        "--model.network.base_channels=32",
        "--model.network.channel_multipliers=[1,2]",
        "--model.network.num_groups=8",
    ]
    opponent = "--model.adversarial={discriminator: {channel_multiplier: 0.125}}"
    size = train("tokenizer", tmp_path, tiny_shards, *sizes, opponent)
    config = VQGANConfig(
        1, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, num_middle_blocks=1, num_groups=8,
        codebook_size=16, code_dim=4,
        quantizer="ema",
    )  # fmt: skip
    module = tokenizer_model(config, image_size=8, adversarial=OPPONENT)
    assert TokenizerCosts("ddp", 1, module=module).checkpoint() == pytest.approx(size, rel=0.02)


def test_frozen_parts_are_held_and_saved(tmp_path, tiny_shards):
    sizes = [
        "--model.network.base_channels=32",
        "--model.network.channel_multipliers=[1,2]",
        "--model.network.num_groups=8",
        "--model.freeze=[encoder,quantizer]",
    ]
    size = train("tokenizer", tmp_path, tiny_shards, *sizes)
    config = VQGANConfig(
        1, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, num_middle_blocks=1, num_groups=8,
        codebook_size=16, code_dim=4,
    )  # fmt: skip
    module = tokenizer_model(config, image_size=8, freeze=("encoder", "quantizer"))
    costs = TokenizerCosts("ddp", 1, module=module)
    assert costs.checkpoint() == pytest.approx(size, rel=0.03)
    memory, network = costs.memory(1), module.network
    assert memory.weights + memory.frozen == pytest.approx(
        4 * sum(each.numel() for each in network.parameters()), rel=0.01
    )


def test_the_size_of_a_checkpoint_of_stage_2(tmp_path, tiny_shards, tiny_pretrained):
    sizes = ["--model.network.embed_dim=64", "--model.network.mlp_dim=256", "--model.network.depth=3"]
    named = ["--tokenizer", str(tiny_pretrained / "tokenizer")]
    size = train("transformer", tmp_path, tiny_shards, *named, *sizes)
    config = TransformerConfig(16, 3, (4, 4), embed_dim=64, depth=3, num_heads=2, mlp_dim=256)
    module = masked_model(config, "", ema_decay=0.9)
    assert TransformerCosts("fsdp", 8, module=module).checkpoint() == pytest.approx(size, rel=0.02)


def test_encoding_on_the_fly_costs_memory_and_work():
    module = masked_model(TransformerConfig(16, 3, (8, 8), embed_dim=16, depth=1, num_heads=2, mlp_dim=32), "")
    alone = TransformerCosts("ddp", 2, module=module)
    encodes = TransformerCosts("ddp", 2, module=module, tokenizer=(VQGAN, 16), encodes=True)
    assert encodes.memory(4).frozen > alone.memory(4).frozen == 0
    assert encodes.memory(4).total > alone.memory(4).total
    assert encodes.flops(4)[0] > 2 * alone.flops(4)[0]


def test_images_are_encoded_in_float32_in_both_precisions():
    module = masked_model(TransformerConfig(16, 3, (8, 8), embed_dim=16, depth=1, num_heads=2, mlp_dim=32), "")
    single, mixed = (
        TransformerCosts("ddp", 2, each, module=module, tokenizer=(VQGAN, 16), encodes=True)
        for each in ("32-true", "bf16-mixed")
    )
    # Encoding is the peak; the casts are those of the transformer.
    assert mixed.memory(64).total - mixed.memory(64).casts == single.memory(64).total


@pytest.mark.parametrize(
    "network", [TransformerConfig(16, 3, (8, 8), 16, 2, 2, 32), small_config("adaln")], ids=["bert", "adaln"]
)
def test_codes_that_the_model_draws_cost_a_forward_pass(network):
    plain, uniform, model = (
        TransformerCosts("ddp", 2, module=masked_model(network, "", corruption=each)).flops(4)[0]
        for each in (None, {"name": "uniform", "fraction": 0.2}, {"name": "model", "fraction": 0.2})
    )
    assert plain < uniform < 1.1 * plain
    # The forward pass is a third of a step, and has logits at replaced tokens only.
    assert uniform + plain / 6 < model < uniform + plain / 3


def test_a_loss_over_the_codes_costs_less_than_one_over_the_vocabulary():
    config = TransformerConfig(16, 1000, (8, 8), embed_dim=16, depth=2, num_heads=2, mlp_dim=32)
    codes, whole = (
        TransformerCosts("ddp", 2, checkpointing="blocks", module=masked_model(config, "", loss_vocabulary=each))
        for each in ("codes", "all")
    )
    assert codes.memory(4).total < whole.memory(4).total
    useful, executed = codes.flops(4)
    assert useful < whole.flops(4)[0] / 2
    assert executed - useful == whole.flops(4)[1] - whole.flops(4)[0]  # blocks, which have no columns


def test_checkpointing_computes_blocks_again_and_saves_memory():
    module = masked_model(TransformerConfig(16, 3, (8, 8), embed_dim=64, depth=8, num_heads=2, mlp_dim=256), "")
    none, blocks = (TransformerCosts("ddp", 2, checkpointing=each, module=module) for each in ("none", "blocks"))
    assert blocks.memory(8).total < none.memory(8).total / 2
    useful, executed = blocks.flops(8)
    assert useful == none.flops(8)[0] == none.flops(8)[1]
    assert 1.25 < executed / useful < 4 / 3


LARGE_CODEBOOK = small_config("adaln", codebook_size=2**14, grid=[8, 8], embed_dim=64, mlp_dim=128)


def test_the_memory_of_a_loss_in_chunks_is_that_of_a_real_step():
    images, network = 40, LARGE_CODEBOOK.create()
    module = masked_model(LARGE_CODEBOOK, "", loss_vocabulary="codes")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, labels = torch.zeros(images, 64, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    measure = partial(token_statistics, label_smoothing=0.1)
    project = partial(chunked_statistics, targets=tokens.flatten(), measure=measure)
    known = [*network.parameters(), *(each.grad for each in network.parameters()), tokens, labels]
    with LiveBytes(known) as live:
        found = network.forward_selected(tokens, labels, torch.arange(tokens.numel()), project=project)
        found[:, 0].mean().backward()
    assert TransformerCosts("ddp", 2, module=module).activations(images).total == pytest.approx(live.peak, rel=0.05)
    assert live.peak < 2 * tokens.numel() * 2**14 * 4  # whole logits and a gradient would need more


def test_many_images_with_a_loss_in_chunks_are_extrapolated():
    costs = TransformerCosts("ddp", 2, module=masked_model(LARGE_CODEBOOK, "", loss_vocabulary="codes"))
    assert has_chunked_loss(LARGE_CODEBOOK, 33, vocabulary="codes")
    assert not has_chunked_loss(LARGE_CODEBOOK, 32, vocabulary="codes")
    assert not has_chunked_loss(small_config("adaln", grid=[8, 8]), 10**6)
    expected = replay_backbone(LARGE_CODEBOOK, chunked_images=700, vocabulary="codes").peak
    assert costs.activations(700).total == pytest.approx(expected, rel=0.01)
    assert costs.activations(33).total < costs.activations(32).total  # whole logits


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize(
    "network", [LARGE_CODEBOOK, TransformerConfig(2**14, 3, (8, 8), 64, 2, 2, 128)], ids=["adaln", "bert"]
)
def test_logits_in_chunks_are_computed_twice(network, checkpointing):
    module = masked_model(network, "", loss_vocabulary="codes")
    costs = TransformerCosts("ddp", 2, checkpointing=checkpointing, module=module)
    useful, executed = costs.flops(256, 128)  # 128 x 64 x 2 / pi rows of 2^14 logits
    whole = costs.flops(256, 8)
    assert whole[0] == useful
    logits = 2 * 64 * 2**14 * 256 * _count_predicted(module)[0]
    assert executed - whole[1] == pytest.approx(logits, rel=0.03)
    assert costs.flops(256) == whole

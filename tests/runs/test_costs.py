"""Estimates of memory, FLOPs and disk space equal those of a real training run."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.cli import main
from maskgit_pl.data import Batch
from maskgit_pl.losses import chunked_statistics, token_statistics
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.runs.costs import TokenizerCosts, TransformerCosts, _first_full_step, _one_image
from maskgit_pl.training.checkpoint_files import newest_checkpoint
from maskgit_pl.training.tokenizer_losses import AdversarialConfig
from tests.conftest import flags
from tests.modules import masked_model, tokenizer_model
from tests.networks.backbone_cases import small_config
from tests.runs.live_bytes import LiveBytes

TINY = Path(__file__).parents[1] / "tiny"
VQGAN = VQGANConfig(
    1, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=8, codebook_size=16, code_dim=8
)
OPPONENT = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 8), start_step=3, r1_every=2, lecam_weight=0.1)


def tokenizer(**more):
    return tokenizer_model(VQGAN, image_size=16, **more)


# The adaptive weight differentiates through blocks that run again; the other two combinations add nothing.
@pytest.mark.slow
@pytest.mark.parametrize(("weight_rule", "checkpointing"), [("fixed", "none"), ("adaptive", "blocks")])
def test_the_memory_of_stage_1_is_that_of_a_real_step(weight_rule, checkpointing):
    config = AdversarialConfig(OPPONENT.discriminator, weight_rule=weight_rule)
    real = tokenizer(adversarial=config, activation_checkpointing=checkpointing)
    networks = [real.network, real.discriminator]
    for parameter in (parameter for network in networks for parameter in network.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    batch = Batch(*(torch.cat([part] * 4) for part in _one_image(real.config)[:6]))
    real.replay_step(batch, step=0)  # the first call makes tensors that stay
    grads = [parameter.grad for network in networks for parameter in network.parameters()]
    with LiveBytes([*(tensor for network in networks for tensor in network.parameters()), *grads]) as live:
        real.replay_step(batch, step=0)
    costs = TokenizerCosts("ddp", 8, checkpointing=checkpointing, module=real)
    memory = costs.memory(4)
    assert 0.9 < memory.activations / live.peak < 1.25
    assert (
        memory.weights == 4 * costs.trained == 4 * sum(p.numel() for network in networks for p in network.parameters())
    )
    mixed = TokenizerCosts("ddp", 8, "bf16-mixed", checkpointing, module=real).memory(4)
    assert (mixed.activations, mixed.casts) == (memory.activations, 2 * costs.trained)  # an upper bound


@pytest.mark.slow
def test_checkpointing_of_stage_1_saves_memory_and_adds_no_useful_work():
    config = AdversarialConfig(OPPONENT.discriminator, weight_rule="adaptive", r1_weight=0.0)
    none, blocks = (
        TokenizerCosts(
            "ddp", 8, checkpointing=each, module=tokenizer(adversarial=config, activation_checkpointing=each)
        )
        for each in ("none", "blocks")
    )
    assert blocks.memory(1).activations < none.memory(1).activations
    assert blocks.flops(1) == none.flops(1) > 0


@pytest.mark.parametrize(("start", "every", "full"), [(0, 1, 0), (3, 2, 4), (4, 4, 4), (5, 4, 8)])
def test_the_counted_step_has_every_loss(start, every, full):
    config = AdversarialConfig(start_step=start, r1_every=every)
    assert _first_full_step(config) == full
    assert config.has_started(full)
    assert config.has_r1_penalty(full)


@pytest.mark.slow
def test_flops_are_the_mean_of_steps_with_and_without_the_penalty():
    def flops(**options):
        config = AdversarialConfig(OPPONENT.discriminator, **options)
        return TokenizerCosts("ddp", 8, module=tokenizer(adversarial=config)).flops(4)

    always, never, sometimes = flops(r1_every=1), flops(r1_weight=0.0), flops(r1_every=4)
    assert always > never
    assert sometimes == never + (always - never) / 4


@pytest.mark.slow
def test_more_images_take_more():
    costs = TokenizerCosts("ddp", 8, module=tokenizer(adversarial=OPPONENT))
    one, four = costs.memory(1), costs.memory(4)
    assert four.activations == 4 * one.activations
    assert four.weights == one.weights
    assert costs.flops(64) == 64 * costs.flops(1)
    assert costs.largest_batch(12, four.total) == 4
    assert costs.largest_batch(12, one.total - 1) is None


def train(stage: str, tmp_path: Path, shards: Path, *more: str) -> int:
    """Trains one step, and returns the size of its checkpoint in bytes."""
    tiny = flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text()))
    words = ["--data", str(shards), "--runs-folder", str(tmp_path), "--run", "one", *tiny, *more]
    assert main(["train", stage, *words]) == 0
    newest = newest_checkpoint(tmp_path / "one" / stage / "checkpoints")
    return sum(file.stat().st_size for file in newest.iterdir())


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert encodes.flops(4) > 2 * alone.flops(4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", [TransformerConfig(16, 3, (8, 8), 16, 2, 2, 32), small_config("adaln")], ids=["bert", "adaln"]
)
def test_codes_that_the_model_draws_cost_a_forward_pass(network):
    plain, uniform, model = (
        TransformerCosts("ddp", 2, module=masked_model(network, "", corruption=each)).flops(4)
        for each in (None, {"name": "uniform", "fraction": 0.2}, {"name": "model", "fraction": 0.2})
    )
    assert plain < uniform < 1.1 * plain
    # The forward pass is a third of a step, and has logits at replaced tokens only.
    assert uniform + plain / 6 < model < uniform + plain / 3


def test_a_loss_over_the_codes_costs_less_than_one_over_the_vocabulary():
    config = TransformerConfig(16, 1000, (8, 8), embed_dim=16, depth=2, num_heads=2, mlp_dim=32)
    codes, whole = (
        TransformerCosts("ddp", 2, module=masked_model(config, "", loss_vocabulary=each)) for each in ("codes", "all")
    )
    assert codes.memory(4).total < whole.memory(4).total
    assert codes.flops(4) < whole.flops(4) / 2


def test_checkpointing_of_stage_2_saves_memory():
    module = masked_model(TransformerConfig(16, 3, (8, 8), embed_dim=64, depth=8, num_heads=2, mlp_dim=256), "")
    none, blocks = (TransformerCosts("ddp", 2, checkpointing=each, module=module) for each in ("none", "blocks"))
    assert blocks.memory(8).total < none.memory(8).total / 2
    assert blocks.flops(8) == none.flops(8)


LARGE_CODEBOOK = small_config("adaln", codebook_size=2**14, grid=[8, 8], embed_dim=64, mlp_dim=128)


@pytest.mark.slow
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
    assert 0.9 < TransformerCosts("ddp", 2, module=module).activations(images).total / live.peak < 1.1
    assert live.peak < 2 * tokens.numel() * 2**14 * 4  # whole logits and a gradient would need more

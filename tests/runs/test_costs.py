"""Memory, FLOPs and disk space that are calculated equal those of real steps, of FSDP2 and of real checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskgit_pl import runs
from maskgit_pl.data import Batch
from maskgit_pl.networks import kernels
from maskgit_pl.networks.backbone import backbones
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.runs.costs import (
    StepMeter,
    checkpoint_bytes,
    count_predicted,
    step_memory,
    useful_flops,
)
from maskgit_pl.runs.fitting import build_without_weights
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
from maskgit_pl.training.checkpoints import newest_checkpoint
from tests.conftest import tiny_flags
from tests.networks.backbone_cases import small_config
from tests.short_runs import autoregressive_model, masked_model, replay_step, tokenizer_model

VQGAN = VQGANConfig(
    1, base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=8, codebook_size=16, code_dim=8
)
ADVERSARIAL = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 8), weight_rule="adaptive")
SMALL = {name: small_config(name, depth=6, embed_dim=64, grid=[8, 8]) for name in backbones.names()}
WORDY = TransformerConfig(1024, 1000, (8, 8), 128, 6, 4, 512, dropout=0.0, class_dropout=0.0)
CONFIGS = {
    **SMALL,
    "wordy": WORDY,
    "grouped": replace(WORDY, codebook_size=2**14, num_token_groups=2),
    "causal": TransformerConfig(256, 10, (12, 12), 96, 8, 4, 384, dropout=0.0, attention="causal"),
    "in chunks": small_config("adaln", codebook_size=2**14, grid=[8, 8], embed_dim=64, mlp_dim=128),
}


def token_step(module, images, *, masked=None):
    """Runs forward and backward pass of images whose ``masked`` first tokens are masked, default all."""
    config = module.config.network
    masked = config.num_tokens if masked is None else masked
    tokens = torch.zeros(images, config.num_tokens, dtype=torch.int64)
    number = torch.zeros(images, dtype=torch.int64)
    mask = torch.arange(config.num_tokens).expand_as(tokens) < masked
    vectors = torch.zeros(images, config.condition_dim) if config.condition_dim else None
    batch = Batch(tokens, number, number, number, number, number == 0, vectors=vectors)
    draws = module._draw(batch)
    draws = draws._replace(labels=number, mask=mask, positions=mask.flatten().nonzero().squeeze(1))
    losses = module.compute_losses(module.transformer, batch._replace(draws=draws), tokens, smoothing=0.1)
    losses.loss.backward()


def peak_of(networks, step):
    """Returns the peak of the bytes that a step allocates, beside weights and gradients."""
    parameters = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    buffers = [buffer for network in networks for buffer in network.buffers()]
    with StepMeter([*parameters, *(parameter.grad for parameter in parameters), *buffers]) as live:
        step()
    return live.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_memory_of_stage_2_is_that_of_a_real_step(name, precision, checkpointing):
    images = 40 if name == "in chunks" else 6
    build = autoregressive_model if name == "causal" else masked_model
    module = build(CONFIGS[name], "", activation_checkpointing=checkpointing, label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        peak = peak_of([module.transformer], lambda: token_step(module, images))
    assert step_memory(module, per_device=images, precision=precision).activations == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*backbones.names(), "wordy", "grouped"])
def test_flops_of_stage_2_are_those_that_torch_counts_in_a_real_step(name, monkeypatch):
    monkeypatch.setattr(kernels, "_multiplies_by_onednn", lambda: False)  # torch does not count its products
    module = masked_model(
        CONFIGS[name], "", mask_ratio={"name": "uniform", "low": 0.5}, activation_checkpointing="blocks"
    )
    masked = round(count_predicted(module))
    plain = masked_model(CONFIGS[name], "")
    plain.transformer.load_state_dict(module.transformer.state_dict())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_step(plain, 2, masked=masked)
    assert useful_flops(module, global_batch=2) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_the_memory_and_the_work_of_stage_1_are_those_of_a_real_step(checkpointing):
    module = tokenizer_model(VQGAN, image_size=16, adversarial=ADVERSARIAL, activation_checkpointing=checkpointing)
    before, generator = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    memory, flops = step_memory(module, per_device=4), useful_flops(module, global_batch=4)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    number = torch.zeros(4, dtype=torch.int64)
    images = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    batch = Batch(images, number, number, number, number, number == 0)
    replay_step(module, batch, step=0)  # the first call makes tensors that stay
    networks = [module.network, module.discriminator]
    peak = peak_of([*networks, module.ema_network], lambda: replay_step(module, batch, step=0))
    assert memory.activations == pytest.approx(peak, rel=0.02)
    trained = sum(parameter.numel() for network in networks for parameter in network.parameters())
    averaged = sum(parameter.numel() for parameter in module.ema_network.parameters())
    assert memory.states == pytest.approx(16 * trained + 4 * averaged, rel=0.01)
    mixed = step_memory(module, per_device=4, precision="bf16-mixed")
    assert memory.activations < mixed.activations < memory.activations + 2 * trained  # an upper bound
    if checkpointing == "none":
        assert flops > 0


def test_ddp_holds_all_states_and_fsdp_its_share():
    module = masked_model(
        TransformerConfig(16, 3, (4, 4), embed_dim=64, depth=3, num_heads=2, mlp_dim=256), "", ema_decay=0.9
    )
    network = module.transformer
    whole, block = (sum(each.numel() for each in part.parameters()) for part in (network, network.blocks[0]))
    root = whole - 3 * block
    ddp, fsdp = (step_memory(module, per_device=2, strategy=name, ranks=2) for name in ("ddp", "fsdp"))
    assert (ddp.states, ddp.gathered) == (20 * whole, 0)
    assert fsdp.states == pytest.approx(10 * whole, rel=0.01)
    assert fsdp.gathered == pytest.approx(4 * (2 * root + 5 * block), rel=0.01)


SIZES = "--model.network.base_channels=32", "--model.network.channel_multipliers=[1,2]", "--model.network.num_groups=8"
GAN = "--model.adversarial={discriminator: {name: stylegan, channel_multiplier: 0.125}, start_step: 0}"
WIDE = "--model.network.embed_dim=64", "--model.network.mlp_dim=256", "--model.network.depth=3"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("tokenizer", (*SIZES, GAN)),
        ("tokenizer", (*SIZES, "--model.adversarial=null", "--model.freeze=[encoder,quantizer]")),
        ("transformer", WIDE),
    ],
)
def test_the_size_of_a_checkpoint_is_that_of_its_files(tmp_path, tiny_shards, tiny_pretrained, stage, words):
    recipe = runs.Recipe.read(stage, overrides=[*tiny_flags(stage), *words])
    tokenizer = tiny_pretrained / "tokenizer" if stage == "transformer" else None
    folders = {"run": tmp_path / "one", "data": tiny_shards, "tokenizer": tokenizer}
    runs.fit(recipe, **folders)
    newest = newest_checkpoint(tmp_path / "one" / stage / "checkpoints")
    size = sum(file.stat().st_size for file in newest.iterdir())
    _, module = build_without_weights(plan_run(recipe, **folders))
    assert checkpoint_bytes(module) == pytest.approx(size, rel=0.03)

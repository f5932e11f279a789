"""Stage 1 propagates the gradient of the plain sum for every choice of losses, and each choice runs in bf16-mixed."""

import hashlib
from dataclasses import dataclass, replace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision

from maskgit_pl.data import Batch
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pretrained.networks import load_tokenizer
from maskgit_pl.tokenizer.adversarial import AdversarialConfig, generator_loss
from maskgit_pl.tokenizer.losses import (
    LossInputs,
    PerceptualConfig,
    TokenizerLoss,
    tokenizer_losses,
)
from tests.installed_packages import install
from tests.short_runs import data, fit, replay_step, tiny_module, tokenizer_model

SIZE = 20
NETWORK = VQGANConfig(
    1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1, num_middle_blocks=0, num_groups=4,
    codebook_size=16, code_dim=8, patch_size=4,
)  # fmt: skip
EMA = replace(NETWORK, quantizer="ema")
DISCRIMINATORS = {
    "stylegan": {"name": "stylegan", "channel_multiplier": 1 / 64},
    "patchgan": {"name": "patchgan", "base_channels": 4, "num_layers": 2, "norm": "group"},
}
MODEL = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, pretrained=False).state_dict(), folder / "timm.pth")
    file = folder / "vgg.pth"
    torch.save({f"features.{k}": v for k, v in torchvision.models.vgg16().features.state_dict().items()}, file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    lpips = {"name": "lpips", "weights": str(file), "sha256": sha256}
    return {"timm": {"name": "timm", "model": MODEL, "weights": str(folder / "timm.pth"), "size": 32}, "lpips": lpips}


def module_of(*, network=NETWORK, losses=("l2",), perceptual=None, discriminator=None, weight_rule="fixed", **options):
    torch.manual_seed(0)
    adversarial = None
    if discriminator is not None:
        adversarial = AdversarialConfig(discriminator, weight=0.3, weight_rule=weight_rule, loss="hinge")
    losses = [*losses] if perceptual is None else [*losses, PerceptualConfig(perceptual, weight=2.0)]
    return tokenizer_model(network, image_size=SIZE, adversarial=adversarial, losses=losses, **options)


def batch():
    images = torch.randint(0, 256, (3, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, *[torch.arange(3)] * 4, torch.ones(3, dtype=torch.bool))


CHOICES = [  # each pair of choices
    ("l2", None, None, "fixed"), ("l1", "timm", None, "fixed"), ("l2", "lpips", None, "fixed"),
    ("l1", None, "stylegan", "adaptive"), ("l2", None, "patchgan", "fixed"), ("l2", "timm", "stylegan", "fixed"),
    ("l2", "timm", "patchgan", "adaptive"), ("l1", "lpips", "stylegan", "adaptive"),
    ("l1", "lpips", "patchgan", "fixed"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("reconstruction", "perceptual", "discriminator", "weight_rule"), CHOICES)
def test_the_gradient_is_that_of_the_plain_sum(reconstruction, perceptual, discriminator, weight_rule, networks):
    module = module_of(
        losses=({"name": reconstruction, "weight": 4.0},), weight_rule=weight_rule,
        perceptual=networks.get(perceptual), discriminator=DISCRIMINATORS.get(discriminator),
    )  # fmt: skip
    metrics = replay_step(module, batch(), step=0)
    got = {name: parameter.grad.clone() for name, parameter in module.network.named_parameters()}
    images = batch().content / 255

    output = module.network(images)
    difference = output.reconstruction - images
    parts = [4.0 * (difference.abs() if reconstruction == "l1" else difference.square()).mean()]
    if perceptual is not None:
        parts.append(2.0 * module.loss_terms.networks["perceptual"](output.reconstruction, images).mean())
        torch.testing.assert_close(metrics["perceptual"], (parts[-1] / 2.0).detach())
    total = sum(parts)
    if discriminator is not None:
        adversarial = generator_loss(module.discriminator(output.reconstruction), kind="hinge")
        last = module.network.decoder.head.weight
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (total, adversarial)]
        total = total + 0.3 * (norms[0] / (norms[1] + 1e-4) if weight_rule == "adaptive" else 1) * adversarial
    module.network.zero_grad()
    (total + output.quantized.loss).backward()
    for name, parameter in module.network.named_parameters():
        scale = parameter.grad.abs().max().item()
        assert (got[name] - parameter.grad).abs().max() <= 1e-7 + 1e-4 * scale, name


@pytest.mark.slow
@pytest.mark.parametrize(("perceptual", "discriminator", "weight_rule"), [choice[1:] for choice in CHOICES[4:]])
def test_each_choice_runs_in_bfloat16_mixed_on_a_cpu(perceptual, discriminator, weight_rule, networks):
    choice = {"discriminator": DISCRIMINATORS[discriminator], "weight_rule": weight_rule}
    module = module_of(perceptual=networks.get(perceptual), **choice)
    with torch.autocast("cpu", torch.bfloat16):
        metrics = replay_step(module, batch(), step=0)
    assert all(value.isfinite() for value in metrics.values())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
    full = replay_step(module_of(perceptual=networks.get(perceptual), **choice), batch(), step=0)
    assert metrics["l2"].item() == pytest.approx(full["l2"].item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 8])
def test_the_gradient_of_r1_is_that_of_float32_in_bfloat16_mixed(batch_size):
    """The penalty differentiates twice, for which some kernels for bfloat16 are wrong; the penalty itself is right."""
    images = torch.rand(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    network = VQGANConfig(
        3, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=8
    )

    def gradients(r1_weight: float, *, enabled: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        adversarial = AdversarialConfig({"name": "stylegan", "channel_multiplier": 1 / 8}, r1_weight=r1_weight)
        module = tokenizer_model(network, image_size=32, adversarial=adversarial)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            module.add_gradients(images, step=0, backward=torch.autograd.backward)
        return {name: weight.grad for name, weight in module.discriminator.named_parameters()}

    def of_r1(*, enabled: bool) -> dict[str, torch.Tensor]:
        with_it, without = (gradients(weight, enabled=enabled) for weight in (1e6, 0.0))
        return {name: with_it[name] - without[name] for name in with_it}

    exact, mixed = of_r1(enabled=False), of_r1(enabled=True)
    largest = max(float(gradient.norm()) for gradient in exact.values())
    compared = [name for name in exact if exact[name].norm() > 1e-6 * largest]
    assert len(compared) > 5
    for name in compared:
        assert (mixed[name] - exact[name]).norm() < 0.05 * exact[name].norm(), name


def test_an_image_too_small_for_the_perceptual_network_is_refused():
    perceptual = PerceptualConfig({"name": "lpips", "weights": "none.pth"})
    with pytest.raises(ValueError, match=r"image_size must be >= 16 with the loss 'perceptual', got 12"):
        tokenizer_model(NETWORK, image_size=12, losses=(perceptual,))


EDGES = """
from dataclasses import dataclass, replace
from maskgit_pl.tokenizer.losses import TokenizerLoss

@dataclass(frozen=True)
class Edges(TokenizerLoss):
    weight: float = 1.0

    def __call__(self, inputs, network):
        edges = (inputs.reconstruction.diff(dim=-1) - inputs.images.diff(dim=-1)).abs().mean()
        return edges + inputs.features.square().mean()
"""


def test_a_term_of_another_package_is_part_of_the_loss(site):
    # Not the name of the documentation: who follows it here may have registered that one.
    points = "[maskgit_pl.tokenizer_losses]\npackaged = edge_loss:Edges\n"
    install(site, name="edge-loss", entry_points=points, modules={"edge_loss": EDGES})
    module, images = module_of(losses=("l2", "packaged", {"name": "packaged", "weight": 2.0})), batch().content / 255
    metrics = replay_step(module, batch(), step=0)
    got = {name: parameter.grad.clone() for name, parameter in module.network.named_parameters()}
    module.network.zero_grad()
    output = module.network(images)
    edges = (output.reconstruction.diff(dim=-1) - images.diff(dim=-1)).abs().mean() + output.features.square().mean()
    torch.testing.assert_close(metrics["packaged"], edges.detach())
    assert torch.equal(metrics["packaged"], metrics["packaged-2"])
    total = (output.reconstruction - images).square().mean() + 3 * edges
    (total + output.quantized.loss).backward()
    for name, parameter in module.network.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


@dataclass(frozen=True)
class Late(TokenizerLoss):
    """A term that begins at step 10, of images that hold a pool of 17 pixels."""

    weight: float = 1.0
    min_image_size = 17

    def __call__(self, inputs: LossInputs, network: None) -> torch.Tensor:
        if inputs.step < 10:
            return torch.zeros(())
        return F.avg_pool2d(inputs.reconstruction - inputs.images, 17).square().mean()


def test_a_term_may_be_an_object():
    config = module_of(losses=[tokenizer_losses.build({"name": "l1", "weight": 2.0})]).config
    assert config == module_of(losses=({"name": "l1", "weight": 2.0},)).config


def test_a_term_may_begin_late_and_need_large_images(monkeypatch):
    monkeypatch.setitem(tokenizer_losses._factories, "late-term", Late)
    module = module_of(
        losses=["l2", "late-term", {"name": "late-term", "weight": 2.0}, {"name": "late-term", "weight": 3.0}]
    )
    assert {name: term.weight for name, term in module.loss_terms.terms.items()} == {
        "l2": 1.0, "late-term": 1.0, "late-term-2": 2.0, "late-term-3": 3.0
    }  # fmt: skip
    first, later = replay_step(module, batch(), step=0), replay_step(module, batch(), step=10)
    assert (first["late-term"], later["late-term"] > 0) == (0, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ["l3"]}, "unknown tokenizer loss 'l3': known: .*l1, l2,"),
        (
            {"losses": [{"name": "l1", "weight": -1.0}]},
            r"tokenizer loss 'l1': weight must be a number in \[0, 1000000\]",
        ),
        ({"losses": []}, "losses must name at least one term, got none"),
        ({"freeze": ["encoder", "decoder"], "network": EMA}, "freeze must leave weights .* the quantizer ema has none"),
        (
            {"freeze": ["decoder"], "discriminator": "stylegan", "weight_rule": "adaptive"},
            r"freeze must not hold the decoder .*set model\.adversarial\.weight_rule to fixed",
        ),
    ],
)
def test_wrong_losses_and_frozen_parts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module_of(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "quantizer"),
    [
        (["encoder", "quantizer"], "ema"),
        (["quantizer"], "ema"),
        (["quantizer", "decoder"], "gradient"),
        (["encoder", "decoder"], "gradient"),  # only the codes train
    ],
    ids=str,
)
def test_frozen_parts_keep_every_bit_and_the_others_train(frozen, quantizer, tiny_shards, tmp_path):
    rule = "fixed" if "decoder" in frozen else "adaptive"
    adversarial = AdversarialConfig(DISCRIMINATORS["stylegan"], weight_rule=rule)
    module = tiny_module("tokenizer", quantizer=quantizer, freeze=frozen, adversarial=adversarial)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    fit(module, data(tiny_shards), steps=2, folder=tmp_path, limit_val_batches=0)
    for network in (module.network, module.ema_network):
        kept = {name for name, value in network.state_dict().items() if torch.equal(value, before[name])}
        assert kept >= {name for name in before if name.split(".")[0] in frozen}
        for part in {"encoder", "quantizer", "decoder"}.difference(frozen):
            assert any(name.startswith(f"{part}.") for name in before.keys() - kept), part
    trained = [name for name, _ in module.network.named_parameters() if name.split(".")[0] not in frozen]
    assert len(module.trainer.optimizers[0].state) == len(trained)


def test_a_decoder_is_fine_tuned_at_another_resolution(tiny_pretrained):
    start = load_tokenizer(tiny_pretrained / "tokenizer").network
    module = tokenizer_model(start.config, image_size=12, freeze=("encoder", "quantizer"))
    module.start_from(tiny_pretrained / "tokenizer")
    images = batch()._replace(content=batch().content[..., :12, :12])
    assert module.grid == (6, 6)
    assert torch.equal(module.network.encode(images.content / 255), start.encode(images.content / 255))
    replay_step(module, images, step=0)
    assert all(parameter.grad is not None for parameter in module.network.decoder.parameters())
    assert all(parameter.grad is None for parameter in module.network.encoder.parameters())

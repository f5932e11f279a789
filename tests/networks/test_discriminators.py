"""Every registered discriminator keeps the contract of training; those of patches have the published layers.

The discriminator has the released sizes and takes any image size.
"""

import pytest
import torch

from maskgit_pl.checks import height_width
from maskgit_pl.networks.discriminators import (
    Discriminator,
    DiscriminatorConfig,
    PatchDiscriminatorConfig,
    discriminators,
)
from maskgit_pl.tokenizer.adversarial import AdversarialConfig, generator_loss, r1_penalty

SMALL = {"stylegan": {"channel_multiplier": 1 / 64}, "patchgan": {"base_channels": 4, "num_layers": 2}}
SPECS = [{"name": name, **SMALL.get(name, {})} for name in discriminators.names()]
SPECS.append({"name": "patchgan", **SMALL["patchgan"], "norm": "batch"})


def network_of(spec, *, in_channels=3, image_size=16):
    torch.manual_seed(0)
    return discriminators.build(spec).create(in_channels=in_channels, image_size=image_size)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("in_channels", "image_size"), [(1, 16), (3, 28), (3, 32), (3, (16, 40)), (1, (28, 16))])
def test_gradients_of_the_logits_reach_every_image_and_weight(spec, in_channels, image_size):
    network = network_of(spec, in_channels=in_channels, image_size=image_size)
    images = torch.rand(3, in_channels, *height_width(image_size), requires_grad=True)
    logits = network(images)
    assert len(logits) == 3
    assert logits.dtype == torch.float32
    generator_loss(logits, kind="hinge").backward()
    assert images.grad.flatten(1).norm(dim=1).min() > 0
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.get("norm") != "batch"], ids=str)
def test_the_r1_penalty_is_the_mean_of_that_of_each_image(spec):
    network, images = network_of(spec), torch.rand(3, 3, 16, 16)
    whole = images.clone().requires_grad_()
    penalty = r1_penalty(network(whole), whole)
    # The definition: the squared norm of the gradient of an image's mean logit.
    parts = [image.unsqueeze(0).clone().requires_grad_() for image in images]
    squares = [torch.autograd.grad(network(part).mean(), part)[0].square().sum() for part in parts]
    torch.testing.assert_close(penalty, sum(squares) / 3)
    penalty.backward()
    assert sum(parameter.grad.abs().sum() for parameter in network.parameters() if parameter.grad is not None) > 0


def test_patchgan_has_the_published_size():
    with torch.device("meta"):
        network = PatchDiscriminatorConfig(norm="batch").create(in_channels=3, image_size=256)
        assert network(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_765_633  # taming-transformers, BatchNorm


@pytest.mark.parametrize(
    ("image_size", "way_out"), [(23, "set it to 2 or use"), (5, "set it to 1 or use the discriminator stylegan")]
)
def test_an_image_without_a_whole_patch_is_refused(image_size, way_out):
    with pytest.raises(ValueError, match=rf"num_layers must leave 3 pixels of {image_size} .*, got 3; {way_out}"):
        PatchDiscriminatorConfig().create(in_channels=1, image_size=(64, image_size))


def test_initial_weights_are_those_of_pix2pix():
    network = network_of({"name": "patchgan"}, image_size=64)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
        if isinstance(module, torch.nn.GroupNorm):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_r1_is_refused_where_a_logit_depends_on_other_images():
    spec = {"name": "patchgan", "norm": "batch"}
    with pytest.raises(ValueError, match=r"r1_weight must be 0 .*, got 10\.0; .*set r1_weight 0, or norm group"):
        AdversarialConfig(spec)
    full = {**spec, "num_layers": 3, "base_channels": 64}
    assert AdversarialConfig(spec, r1_weight=0.0).discriminator == full


@pytest.mark.parametrize(("image_size", "parameters"), [(256, 23_998_017), (512, 24_026_913)])
def test_stylegan_has_the_released_parameter_count(image_size, parameters):
    with torch.device("meta"):
        network = Discriminator(DiscriminatorConfig(), in_channels=3, image_size=image_size)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_widths_follow_the_released_table_and_round_the_size_up():
    assert DiscriminatorConfig().widths(128) == (128, 256, 512, 512, 512, 512)
    assert DiscriminatorConfig(channel_multiplier=0.125).widths(28) == (64, 64, 64, 64)

"""The VQGAN has the released structure, every size is in its config, and it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl.networks.vqgan import VQGAN, ResidualBlock, StridedDownsample, VQGANConfig

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks_per_level": 1, "middle_blocks": 1, "groups": 4}


def small(**changes):
    return VQGANConfig(1, **{**SMALL, "num_codes": 16, "code_width": 8, **changes})


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_default_sizes_have_the_released_parameter_counts():
    with torch.device("meta"):
        network = VQGAN(VQGANConfig(in_channels=3))
    assert (count(network.encoder), count(network.decoder), count(network.quantizer)) == (
        23_775_104,
        30_478_339,
        262_144,
    )
    assert count(network) == 54_515_587


@pytest.mark.parametrize("downsampling", ["average", "strided"])
@pytest.mark.parametrize("size", [(28, 28), (32, 16), (30, 14), (7, 9)])
def test_any_image_size_is_reconstructed_at_its_size(downsampling, size):
    network = VQGAN(small(multipliers=(1, 1, 2), downsampling=downsampling))
    images = torch.rand(2, 1, *size)
    height, width = network.grid(size)
    assert network(images).reconstruction.shape == images.shape
    assert network.encode(images).shape == (2, height * width)


def test_28_pixels_become_7_by_7_tokens_with_any_way_to_reduce_by_4():
    for changes in (
        {"multipliers": (1, 1, 2)},
        {"multipliers": (1, 2), "patch_size": 2},
        {"multipliers": (1,), "patch_size": 4},
    ):
        network = VQGAN(small(**changes))
        assert network.config.downsampling_factor == 4
        assert network.grid(28) == (7, 7)
        assert network.encode(torch.rand(1, 1, 28, 28)).shape == (1, 49)


def test_decoding_the_tokens_of_an_image_gives_the_training_reconstruction():
    network = VQGAN(small(patch_size=2))
    images = torch.rand(3, 1, 16, 24)
    output = network(images)
    decoded = network.decode(network.encode(images), network.grid((16, 24)))
    torch.testing.assert_close(decoded, output.reconstruction)


def test_a_block_that_changes_width_drops_its_input():
    block = ResidualBlock(8, 16, small())
    torch.nn.init.zeros_(block.conv2.weight)
    assert block(torch.rand(1, 8, 4, 4)).abs().max() == 0  # the shortcut reads the processed features


@pytest.mark.parametrize(("size", "after"), [(8, 1), (7, 2)])
def test_the_strided_convolution_pads_as_same_does(size, after):
    layer = StridedDownsample(2)
    x = torch.rand(1, 2, size, size)
    expected = F.conv2d(F.pad(x, (1, after, 1, after)), layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_convolutions_start_with_the_truncated_lecun_normal():
    weight = VQGAN(VQGANConfig(3, channels=64, multipliers=(1,))).encoder.blocks[0].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(1 / (64 * 9)), rel=0.02)
    assert weight.abs().max() <= 2.3 * math.sqrt(1 / (64 * 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 3}, "groups"),
        ({"channels": 0}, "channels"),
        ({"num_codes": 1}, "num_codes"),
        ({"multipliers": ()}, "multipliers"),
        ({"downsampling": "max"}, "downsampling"),
        ({"activation": "gelu"}, "activation"),
        ({"quantizer": "emma"}, "'ema'"),
    ],
)
def test_a_bad_size_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_an_image_that_patches_do_not_cover_is_refused():
    with pytest.raises(ValueError, match="patch_size 4"):
        small(patch_size=4).grid(30)


def test_lists_from_yaml_are_kept_as_tuples():
    assert small(multipliers=[1, 2]) == small(multipliers=(1, 2))


@pytest.mark.parametrize("quantizer", ["gradient", "ema"])
def test_it_learns_to_reconstruct(quantizer):
    torch.manual_seed(0)
    network = VQGAN(small(channels=16, multipliers=(1,), patch_size=4, quantizer=quantizer))
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    images = stripes(32)
    errors = []
    for step in range(60):
        output = network(images)
        error = F.mse_loss(output.reconstruction, images)
        (error + output.quantized.loss).backward()
        optimiser.step()
        optimiser.zero_grad()
        network.quantizer.update([output.quantized.tokens], [output.quantized.features], seed=0, step=step)
        errors.append(error.item())
    assert errors[-1] < 0.25 * images.var().item()  # far better than the mean image


def stripes(number):
    phase, across = torch.arange(number).view(-1, 1, 1, 1), torch.arange(16)
    picture = ((across.view(1, 1, 1, -1) + phase) // 4 % 2).float()
    flipped = torch.where(
        phase % 3 == 0, picture.transpose(2, 3).expand(-1, -1, 16, 16), picture.expand(-1, -1, 16, 16)
    )
    return 0.1 + 0.8 * flipped

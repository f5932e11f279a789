"""The VQGAN has the released structure, and every size is in its config."""

import hashlib
import math
import re

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl.networks.vqgan import VQGAN, Downsample, PatchUpsample, VQGANConfig

SMALL = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "num_middle_blocks": 1,
    "num_groups": 4,
}


def small(**changes):
    return VQGANConfig(1, **{**SMALL, "codebook_size": 16, "code_dim": 8, **changes})


TAMING = {**SMALL, "num_middle_blocks": 2, "layout": "taming", "attention_levels": (1,), "latent_channels": 6}

MAGVIT2 = {**SMALL, "layout": "magvit2", "quantizer": "lfq", "code_dim": 4}


def test_the_default_sizes_have_the_released_parameter_counts():
    with torch.device("meta"):
        network = VQGAN(VQGANConfig(in_channels=3))
    parts = (network.encoder, network.decoder, network.quantizer)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [23_775_104, 30_478_339, 262_144]


@pytest.mark.parametrize("config", [small(patch_size=2), small(**TAMING)], ids=["maskgit", "taming"])
def test_decoding_the_tokens_of_an_image_gives_the_training_reconstruction(config):
    network = VQGAN(config)
    images = torch.rand(3, 1, 16, 24)
    output = network(images)
    decoded = network.decode(network.encode(images), network.config.grid((16, 24)))
    torch.testing.assert_close(decoded, output.reconstruction)


@pytest.mark.parametrize(("size", "after"), [(8, 1), (7, 2)])
def test_the_strided_convolution_pads_as_same_does(size, after):
    layer = Downsample(2, 4)
    x = torch.rand(1, 2, size, size)
    expected = F.conv2d(F.pad(x, (1, after, 1, after)), layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


def test_an_upsampling_of_patches_is_nearest_neighbour_and_a_convolution():
    layer, x = PatchUpsample(3, 5).double(), torch.rand(2, 3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=2, mode="nearest")))


def test_convolutions_start_with_the_truncated_lecun_normal():
    weight = VQGAN(VQGANConfig(3, base_channels=64, channel_multipliers=(1,))).encoder.blocks[0].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(1 / (64 * 9)), rel=0.02)
    assert weight.abs().max() <= 2.3 * math.sqrt(1 / (64 * 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, "groups"),
        ({"channel_multipliers": (1, 2.5)}, "channel_multipliers must be an integer in .* got 2.5"),
        ({"num_res_blocks": 10**9}, r"num_res_blocks must be an integer in \[1, 64\], got 1000000000"),
        ({"downsampling": "max"}, "downsampling"),
        ({"patch_size": 6}, "patch_size must be 1, 2, 4, 8, 16 or 32, got 6"),
        ({"quantizer": "emma"}, "'ema'"),
        ({"layout": "unet"}, "layout must be one of maskgit, taming, magvit2, got 'unet'"),
        ({"attention_levels": (1,)}, r"attention_levels must be \(\) in layout 'maskgit', got \(1,\)"),
        ({**TAMING, "latent_channels": None}, "latent_channels of layout 'taming' must be an integer"),
        ({**TAMING, "attention_levels": (2,)}, r"attention_levels must .*\[0, 1\], got 2"),
        ({**MAGVIT2, "activation": "relu"}, "activation must be 'swish' in layout 'magvit2', got 'relu'"),
    ],
)
def test_a_bad_size_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 2},
        {"channel_multipliers": (1, 1, 2), "downsampling": "strided"},
        {"downsampling": "strided-3x3"},
        TAMING,
        MAGVIT2,
    ],
    ids=["maskgit", "strided", "strided-3x3", "taming", "magvit2"],
)
def test_a_size_is_reconstructed_or_refused_with_those_that_fit(changes):
    network = VQGAN(small(**changes))
    sides = torch.randint(1, 33, (24, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for size in ((8, 20), *map(tuple, sides)):
        try:
            height, width = network.config.grid(size)
        except ValueError as error:
            with pytest.raises((ValueError, RuntimeError), match=r"multiple of the downsampling factor|divisible"):
                network.encode(torch.rand(1, 1, *size))
            fitting = [int(side) for side in re.findall("[0-9]+", str(error).partition("; use ")[2])]
            assert fitting
            assert all(network.config.grid((side, side)) for side in fitting)
            continue
        images = torch.rand(1, 1, *size)
        assert network(images).reconstruction.shape == images.shape
        assert network.encode(images).shape == (1, height * width)


def test_the_initial_scale_multiplies_every_convolution_and_nothing_else():
    states = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        states.append(VQGAN(small(initial_scale=scale)).state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value * (0.5 if value.ndim == 4 else 1.0), msg=name)


def test_names_and_shapes_of_the_released_layout_are_stable():
    names = "\n".join(f"{name} {tuple(value.shape)}" for name, value in VQGAN(small()).state_dict().items())
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == "b60b8a4db2c06fdd"


@pytest.mark.parametrize("size", [(4, 10), (2, 2)])
def test_every_parameter_of_the_magvit2_layout_has_a_finite_gradient(size):
    network = VQGAN(small(**MAGVIT2))
    output = network(torch.rand(2, 1, *size))
    (output.reconstruction.square().mean() + output.quantized.loss).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name

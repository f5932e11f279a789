"""The discriminator has the released sizes and takes any image size."""

import pytest
import torch

from maskgit_pl.checks import height_width
from maskgit_pl.networks.discriminators import Blur, Discriminator, DiscriminatorConfig


@pytest.mark.parametrize(("image_size", "parameters"), [(256, 23_998_017), (512, 24_026_913)])
def test_it_has_the_released_parameter_count(image_size, parameters):
    with torch.device("meta"):
        network = Discriminator(DiscriminatorConfig(), in_channels=3, image_size=image_size)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("pooling", ["blur", "average"])
@pytest.mark.parametrize("image_size", [4, 7, 28, 30, 32, (24, 40), (40, 24), (4, 64)])
def test_it_gives_one_logit_for_images_of_any_size(image_size, pooling):
    config = DiscriminatorConfig(channel_multiplier=1 / 64, pooling=pooling)
    network = Discriminator(config, in_channels=1, image_size=image_size)
    assert network(torch.rand(3, 1, *height_width(image_size))).shape == (3, 1)


def test_widths_follow_the_released_table_and_round_the_size_up():
    assert DiscriminatorConfig().widths(128) == (128, 256, 512, 512, 512, 512)
    assert DiscriminatorConfig(channel_multiplier=0.125).widths(28) == (64, 64, 64, 64)


def test_the_blur_keeps_a_constant_inside_and_halves_the_size():
    blurred = Blur()(torch.ones(1, 2, 8, 8))
    assert blurred.shape == (1, 2, 4, 4)
    torch.testing.assert_close(blurred[:, :, 1:-1, 1:-1], torch.ones(1, 2, 2, 2))


def test_every_parameter_gets_a_gradient():
    network = Discriminator(DiscriminatorConfig(channel_multiplier=1 / 64), in_channels=1, image_size=16)
    network(torch.rand(2, 1, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"channel_multiplier": 0.0}, "channel_multiplier"),
        ({"channels": (8, 0)}, "channels"),
        ({"pooling": "max"}, "pooling"),
    ],
)
def test_a_bad_size_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**config)


def test_widths_that_do_not_fit_the_image_are_refused_with_its_resolutions():
    with pytest.raises(ValueError, match=r"\[28, 14, 7, 3\]"):
        Discriminator(DiscriminatorConfig(channels=(8, 8)), in_channels=1, image_size=28)

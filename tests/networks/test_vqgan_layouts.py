"""The networks of layout ``magvit2``: sizes, gradients, and norms that depend on the codes of the whole image."""

import pytest
import torch

from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.vqgan_layouts import AdaptiveGroupNorm

SMALL = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "num_middle_blocks": 1,
    "num_groups": 4,
    "codebook_size": 16,
    "code_dim": 4,
    "layout": "magvit2",
    "quantizer": "lfq",
}


def network(**changes):
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(3, **{**SMALL, **changes}))


@pytest.mark.parametrize("size", [(8, 8), (4, 10), (2, 2)])
def test_images_come_out_at_their_size_and_every_parameter_has_a_finite_gradient(size):
    made = network()
    output = made(torch.rand(2, 3, *size))
    assert output.reconstruction.shape == (2, 3, *size)
    (output.reconstruction.square().mean() + output.quantized.loss).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_the_scale_and_the_shift_of_a_norm_are_those_of_the_codes():
    layer = AdaptiveGroupNorm(8, 4, 4)
    x, codes = torch.randn(3, 8, 6, 6), torch.randn(3, 4, 3, 3)
    out = layer(x, codes).view(3, 8, 36)
    spread = (codes.flatten(2).double().var(2) + 1e-6).sqrt().float()
    # A norm without scale has mean 0 and variance 1 in each group of two channels.
    plain = (out - layer.beta(codes.mean((2, 3))).unsqueeze(2)) / layer.gamma(spread).unsqueeze(2)
    torch.testing.assert_close(plain.view(3, 4, 72).mean(2), torch.zeros(3, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(plain.view(3, 4, 72).var(2, correction=0), torch.ones(3, 4), rtol=1e-3, atol=1e-3)


def test_an_image_of_another_batch_changes_nothing():
    made = network().eval()
    first, second = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    alone = made.decode(made.encode(first), (4, 4))
    together = made.decode(made.encode(torch.cat([first, second])), (4, 4))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation must be 'swish' in layout 'magvit2', got 'relu'"),
        ({"patch_size": 2}, "patch_size must be 1 in layout 'magvit2'"),
        ({"middle_attention": False}, "middle_attention must be True in layout 'magvit2'"),
        ({"latent_channels": 8}, "latent_channels must be None in layout 'magvit2'"),
        ({"layout": "magvit"}, "layout must be one of maskgit, taming, magvit2.*did you mean 'magvit2'"),
    ],
)
def test_what_the_layout_fixes_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_a_size_that_the_factor_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of the downsampling factor 2, got 5"):
        network().encode(torch.rand(1, 3, 5, 4))

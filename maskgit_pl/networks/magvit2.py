"""Encoder and decoder in the layout of Open-MAGVIT2's image tokenizers.

It differs from the layout of taming-transformers: the convolutions of residual blocks have no bias; there is no
self-attention; an upsampling is a convolution to four times the channels and a pixel shuffle; and each level of the
decoder starts with a norm whose scale and shift depend on the codes of the whole image. ``VQGAN`` builds both networks
if ``VQGANConfig.layout`` is ``magvit2``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.networks.convolutions import conv, group_norm
from maskgit_pl.networks.vqgan_config import VQGANConfig
from maskgit_pl.networks.vqgan_layouts import TamingResidualBlock

__all__ = ["Magvit2Decoder", "Magvit2Encoder"]

_EPSILON = 1e-6  # of the variance of the codes, as of all norms


class ShuffleUpsample(nn.Module):
    """An upsampling by 2: a 3x3 convolution to four times the channels, then depth to space.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, 4 * channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at twice the resolution, (B, channels, 2 h, 2 w)."""
        return F.pixel_shuffle(self.conv(x), 2)


class AdaptiveGroupNorm(nn.Module):
    """A GroupNorm whose scale and shift are linear in the standard deviation and the mean of the codes of an image.

    norm(x) gamma(sqrt(var(codes) + 1e-6)) + beta(mean(codes)), moments over all places of an image

    Args:
        channels: Channels of input and output.
        code_dim: D, size of a code.
        num_groups: Number of groups.
    """

    def __init__(self, channels: int, code_dim: int, num_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=_EPSILON, affine=False)
        self.gamma = nn.Linear(code_dim, channels)
        self.beta = nn.Linear(code_dim, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Returns x (B, channels, h', w') normalised, with the scale and the shift of codes (B, D, h, w)."""
        places = codes.flatten(2)
        # One place has no unbiased variance.
        deviation = (places.var(-1, correction=min(1, places.shape[-1] - 1)) + _EPSILON).sqrt()
        scale, shift = self.gamma(deviation), self.beta(places.mean(-1))
        out: Tensor = self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return out


class Magvit2Encoder(nn.Module):
    """The encoder: a stem, levels that halve the resolution, middle blocks, a 1x1 head.

    Args:
        config: Sizes, of layout ``magvit2``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv(config.in_channels, config.base_channels, 3, bias=False)
        self.blocks = nn.Sequential(*_encoder_blocks(config))
        self.norm = group_norm(config.widths[-1], config.num_groups)
        self.head = conv(config.widths[-1], config.code_dim, 1, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (B, D, h, w) of images (B, C, H, W) float in [0, 1].

        Raises:
            ValueError: if H or W is not a multiple of the downsampling factor.
        """
        self.config.grid((images.shape[-2], images.shape[-1]))
        x = self.blocks(self.stem(2 * images - 1))  # to [-1, 1]
        out: Tensor = self.head(F.silu(self.norm(x)))
        return out


class Magvit2Decoder(nn.Module):
    """The decoder: a stem, middle blocks, levels that double the resolution, a 3x3 head.

    Args:
        config: Sizes, of layout ``magvit2``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.stem = conv(config.code_dim, config.widths[-1], 3, bias=True)
        self.blocks = nn.ModuleList(_decoder_blocks(config))
        self.norm = group_norm(config.widths[0], config.num_groups)
        self.head = conv(config.widths[0], config.in_channels, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the images (B, C, H, W), not clipped, of codes (B, D, h, w)."""
        x = self.stem(codes)
        for block in self.blocks:
            x = block(x, codes) if isinstance(block, AdaptiveGroupNorm) else block(x)
        out: Tensor = (self.head(F.silu(self.norm(x))) + 1) / 2  # from [-1, 1]
        return out


def _encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields levels from full resolution down, with a downsampling between two levels, then the middle blocks."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield conv(width, width, 3, bias=True, stride=2)
        yield from _blocks(width, out, config, count=config.num_res_blocks)
        width = out
    yield from _blocks(width, width, config, count=config.num_middle_blocks)


def _decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the middle blocks, then levels up to full resolution, with an upsampling between two levels."""
    width = config.widths[-1]
    yield from _blocks(width, width, config, count=config.num_middle_blocks)
    for level, out in reversed(list(enumerate(config.widths))):
        yield AdaptiveGroupNorm(width, config.code_dim, config.num_groups)
        yield from _blocks(width, out, config, count=config.num_res_blocks)
        width = out
        if level > 0:
            yield ShuffleUpsample(width)


def _blocks(width: int, out: int, config: VQGANConfig, *, count: int) -> Iterator[nn.Module]:
    for block in range(count):
        yield TamingResidualBlock(width if block == 0 else out, out, config.num_groups, bias=False)

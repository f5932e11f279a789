"""Encoder and decoder in the layout of taming-transformers, which LlamaGen, diffusers and IBQ share.

It differs from the released MaskGIT code: every convolution has a bias; a block that changes the number of channels has
a 1x1 convolution on its *input*; there is self-attention at chosen levels and, unless it is left out, in the middle; a
strided convolution halves the resolution; the decoder has one more block at each level; and images are in [-1, 1]
inside, so that padding with zeros is grey, unless ``VQGANConfig.signed_images`` is False. ``VQGAN`` builds both
networks if ``VQGANConfig.layout`` is ``taming``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.networks.convolutions import Upsample, conv, group_norm
from maskgit_pl.networks.vqgan_config import VQGANConfig

__all__ = ["TamingDecoder", "TamingEncoder"]


class TamingResidualBlock(nn.Module):
    """A residual block: norm, swish, 3x3 convolution, twice, plus the input.

    If the number of channels changes, the input passes through a 1x1 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        num_groups: Number of groups of each GroupNorm.
        bias: True if the convolutions have a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, *, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, num_groups)
        self.conv1 = conv(in_channels, out_channels, 3, bias=bias)
        self.norm2 = group_norm(out_channels, num_groups)
        self.conv2 = conv(out_channels, out_channels, 3, bias=bias)
        self.shortcut = conv(in_channels, out_channels, 1, bias=bias) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features (B, out_channels, h, w) of x (B, in_channels, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.shortcut is None else self.shortcut(x))
        return out


class SelfAttention(nn.Module):
    """Self-attention with one head over all places: x + output(softmax(q k / sqrt(channels)) v), q, k, v of norm(x).

    Args:
        channels: Channels of input and output.
        num_groups: Number of groups of the GroupNorm.
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, num_groups)
        self.query = conv(channels, channels, 1, bias=True)
        self.key = conv(channels, channels, 1, bias=True)
        self.value = conv(channels, channels, 1, bias=True)
        self.output = conv(channels, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) plus what each place attends to, of the same shape."""
        normed = self.norm(x)
        query, key, value = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.query, self.key, self.value)
        )
        # One head of C channels, so that the scores are divided by sqrt(C).
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, 1, h w, C)
        out: Tensor = x + self.output(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[-2]))
        return out


class PaddedDownsample(nn.Module):
    """A 3x3 convolution of stride 2, after padding with a column of zeros at the right and a row at the bottom.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=True, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w), h and w even, at half the resolution, (B, channels, h / 2, w / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class TamingEncoder(nn.Module):
    """The encoder: a stem, levels that halve the resolution, a middle, a 3x3 head, a 1x1 projection.

    Args:
        config: Sizes, of layout ``taming``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        last = config.widths[-1]
        self.config = config
        self.stem = conv(config.in_channels, config.base_channels, 3, bias=True)
        self.blocks = nn.Sequential(*_encoder_blocks(config))
        self.norm = group_norm(last, config.num_groups)
        self.head = conv(last, _latent_channels(config), 3, bias=True)
        self.projection = conv(_latent_channels(config), config.code_dim, 1, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (B, D, h, w) of images (B, C, H, W) float in [0, 1].

        Raises:
            ValueError: if H or W is not a multiple of the downsampling factor.
        """
        # Raises for sizes whose last rows or columns the strides would drop.
        self.config.grid((images.shape[-2], images.shape[-1]))
        x = self.blocks(self.stem(2 * images - 1 if self.config.signed_images else images))
        out: Tensor = self.projection(self.head(F.silu(self.norm(x))))
        return out


class TamingDecoder(nn.Module):
    """The decoder: a 1x1 projection, a stem, a middle, levels that double the resolution, a 3x3 head.

    Args:
        config: Sizes, of layout ``taming``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last = config.widths[-1], config.widths[0]
        self.signed_images = config.signed_images
        self.projection = conv(config.code_dim, _latent_channels(config), 1, bias=True)
        self.stem = conv(_latent_channels(config), first, 3, bias=True)
        self.blocks = nn.Sequential(*_decoder_blocks(config))
        self.norm = group_norm(last, config.num_groups)
        self.head = conv(last, config.in_channels, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the images (B, C, H, W), not clipped, of codes (B, D, h, w)."""
        x = self.blocks(self.stem(self.projection(codes)))
        out: Tensor = self.head(F.silu(self.norm(x)))
        return (out + 1) / 2 if self.signed_images else out


def _encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields levels from full resolution down, with a downsampling between two levels, then the middle."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield PaddedDownsample(width)
        yield from _level(width, out, config, level=level, blocks=config.num_res_blocks)
        width = out
    yield from _middle(width, config)


def _decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the middle, then levels up to full resolution, with an upsampling between two levels."""
    width = config.widths[-1]
    yield from _middle(width, config)
    for level, out in reversed(list(enumerate(config.widths))):
        # One block more than in the encoder, as in both projects.
        yield from _level(width, out, config, level=level, blocks=config.num_res_blocks + 1)
        width = out
        if level > 0:
            yield Upsample(width)


def _level(width: int, out: int, config: VQGANConfig, *, level: int, blocks: int) -> Iterator[nn.Module]:
    """Yields the blocks of a level, each with its self-attention if the level has it."""
    for block in range(blocks):
        yield TamingResidualBlock(width if block == 0 else out, out, config.num_groups)
        if level in config.attention_levels:
            yield SelfAttention(out, config.num_groups)


def _middle(width: int, config: VQGANConfig) -> Iterator[nn.Module]:
    yield TamingResidualBlock(width, width, config.num_groups)
    if config.middle_attention:
        yield SelfAttention(width, config.num_groups)
    yield TamingResidualBlock(width, width, config.num_groups)


def _latent_channels(config: VQGANConfig) -> int:
    assert config.latent_channels is not None  # VQGANConfig requires it for this layout
    return config.latent_channels

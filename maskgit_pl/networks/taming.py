"""Encoder and decoder in the layout of taming-transformers, which LlamaGen's tokenizers share.

What differs from the released MaskGIT code: every convolution has a bias, a block that changes the width passes its
*input* on through a 1x1 convolution, self-attention stands in the middle and on chosen levels, the resolution is halved
by a strided convolution, the decoder has one more block on each level, and images are in [-1, 1] inside, so that the
zeros beyond an edge are grey. ``VQGAN`` builds these two where ``VQGANConfig.layout`` is ``taming``.
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
    """norm, swish, 3x3, norm, swish, 3x3, plus the input, through a 1x1 convolution where the width changes.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        groups: Groups of each GroupNorm.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = conv(in_channels, out_channels, 3, bias=True)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = conv(out_channels, out_channels, 3, bias=True)
        self.shortcut = conv(in_channels, out_channels, 1, bias=True) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.shortcut is None else self.shortcut(x))
        return out


class SelfAttention(nn.Module):
    """Each place attends to all places with one head: x + output(softmax(q k / sqrt(channels)) v), q, k, v of norm(x).

    Args:
        channels: Width of input and output.
        groups: Groups of the GroupNorm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query = conv(channels, channels, 1, bias=True)
        self.key = conv(channels, channels, 1, bias=True)
        self.value = conv(channels, channels, 1, bias=True)
        self.output = conv(channels, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        normed = self.norm(x)
        query, key, value = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value)  # (B, 1, h w, C)
        out: Tensor = x + self.output(rearrange(attended, "b 1 (h w) c -> b c h w", h=x.shape[-2]))
        return out


class PaddedDownsample(nn.Module):
    """A row and a column of zeros at the right and the bottom, then a 3x3 convolution of stride 2.

    Args:
        channels: Width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=True, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) with even h and w -> (B, C, h / 2, w / 2)."""
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class TamingEncoder(nn.Module):
    """Images to features: a stem, levels that halve the resolution, a middle, a 3x3 head, a 1x1 projection."""

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
        """(B, C, H, W) float in [0, 1] -> (B, D, h, w).

        Raises:
            ValueError: H or W is not a multiple of the downsampling factor.
        """
        self.config.grid((images.shape[-2], images.shape[-1]))
        x = self.blocks(self.stem(2 * images - 1))
        out: Tensor = self.projection(self.head(F.silu(self.norm(x))))
        return out


class TamingDecoder(nn.Module):
    """Codes to images: a 1x1 projection, a stem, a middle, levels that double the resolution, a 3x3 head."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last = config.widths[-1], config.widths[0]
        self.projection = conv(config.code_dim, _latent_channels(config), 1, bias=True)
        self.stem = conv(_latent_channels(config), first, 3, bias=True)
        self.blocks = nn.Sequential(*_decoder_blocks(config))
        self.norm = group_norm(last, config.num_groups)
        self.head = conv(last, config.in_channels, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, H, W), not clipped."""
        x = self.blocks(self.stem(self.projection(codes)))
        out: Tensor = (self.head(F.silu(self.norm(x))) + 1) / 2
        return out


def _encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Levels from full resolution down, a downsampling between two levels, then the middle."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield PaddedDownsample(width)
        yield from _level(width, out, config, level=level, blocks=config.num_res_blocks)
        width = out
    yield from _middle(width, config)


def _decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the middle, then levels up to full resolution, an upsampling between two levels."""
    width = config.widths[-1]
    yield from _middle(width, config)
    for level, out in reversed(list(enumerate(config.widths))):
        yield from _level(width, out, config, level=level, blocks=config.num_res_blocks + 1)
        width = out
        if level > 0:
            yield Upsample(width)


def _level(width: int, out: int, config: VQGANConfig, *, level: int, blocks: int) -> Iterator[nn.Module]:
    for block in range(blocks):
        yield TamingResidualBlock(width if block == 0 else out, out, config.num_groups)
        if level in config.attention_levels:
            yield SelfAttention(out, config.num_groups)


def _middle(width: int, config: VQGANConfig) -> Iterator[nn.Module]:
    yield TamingResidualBlock(width, width, config.num_groups)
    yield SelfAttention(width, config.num_groups)
    yield TamingResidualBlock(width, width, config.num_groups)


def _latent_channels(config: VQGANConfig) -> int:
    assert config.latent_channels is not None  # the configuration holds this for the layout
    return config.latent_channels

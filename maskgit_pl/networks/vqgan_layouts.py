"""The layouts ``taming`` and ``magvit2`` of the tokenizer's encoder and decoder, and layers that all layouts share.

``VQGAN`` builds the networks of ``VQGANConfig.layout``; ``vqgan`` has those of the released MaskGIT code.

- ``taming``, of taming-transformers, which LlamaGen, diffusers and IBQ share, differs from the released code: every
  convolution has a bias; a block that changes the number of channels has a 1x1 convolution on its *input*; there is
  self-attention at chosen levels and, unless it is left out, in the middle; a strided convolution halves the
  resolution; the decoder has one more block at each level; and images are in [-1, 1] inside, so that padding with zeros
  is grey, unless ``VQGANConfig.signed_images`` is False.
- ``magvit2``, of Open-MAGVIT2's image tokenizers, differs from ``taming``: the convolutions of residual blocks have no
  bias; there is no self-attention; an upsampling is a convolution to four times the channels and a pixel shuffle; and
  each level of the decoder starts with a norm whose scale and shift depend on the codes of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.networks.vqgan_config import VQGANConfig

__all__ = [
    "Magvit2Decoder",
    "Magvit2Encoder",
    "TamingDecoder",
    "TamingEncoder",
    "Upsample",
    "conv",
    "group_norm",
]

# Of all norms, and of the variance of codes. flax's default and taming's choice; torch's 1e-5 changes the outputs of
# the released model.
_NORM_EPSILON = 1e-6


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
        self.blocks = nn.Sequential(*_taming_encoder_blocks(config))
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
        self.blocks = nn.Sequential(*_taming_decoder_blocks(config))
        self.norm = group_norm(last, config.num_groups)
        self.head = conv(last, config.in_channels, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the images (B, C, H, W), not clipped, of codes (B, D, h, w)."""
        x = self.blocks(self.stem(self.projection(codes)))
        out: Tensor = self.head(F.silu(self.norm(x)))
        return (out + 1) / 2 if self.signed_images else out


def _taming_encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields levels from full resolution down, with a downsampling between two levels, then the middle."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield PaddedDownsample(width)
        yield from _level(width, out, config, level=level, blocks=config.num_res_blocks)
        width = out
    yield from _middle(width, config)


def _taming_decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
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


class Magvit2Encoder(nn.Module):
    """The encoder: a stem, levels that halve the resolution, middle blocks, a 1x1 head.

    Args:
        config: Sizes, of layout ``magvit2``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv(config.in_channels, config.base_channels, 3, bias=False)
        self.blocks = nn.Sequential(*_magvit2_encoder_blocks(config))
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
        self.blocks = nn.ModuleList(_magvit2_decoder_blocks(config))
        self.norm = group_norm(config.widths[0], config.num_groups)
        self.head = conv(config.widths[0], config.in_channels, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the images (B, C, H, W), not clipped, of codes (B, D, h, w)."""
        x = self.stem(codes)
        for block in self.blocks:
            x = block(x, codes) if isinstance(block, AdaptiveGroupNorm) else block(x)
        out: Tensor = (self.head(F.silu(self.norm(x))) + 1) / 2  # from [-1, 1]
        return out


def _magvit2_encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields levels from full resolution down, with a downsampling between two levels, then the middle blocks."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield conv(width, width, 3, bias=True, stride=2)
        yield from _blocks(width, out, config, count=config.num_res_blocks)
        width = out
    yield from _blocks(width, width, config, count=config.num_middle_blocks)


def _magvit2_decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
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


def conv(
    in_channels: int, out_channels: int, kernel: int, *, bias: bool, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """Builds a convolution with flax's initial values: truncated LeCun normal, bias 0.

    Source: released code.
    """
    pad = kernel // 2 if padding is None else padding
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=pad, bias=bias)
    # LeCun: variance 1 / fan-in. The constant is the deviation of a normal truncated at 2 deviations, as in jax.
    deviation = math.sqrt(1 / (in_channels * kernel**2)) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Builds a GroupNorm with the epsilon of the released weights."""
    return nn.GroupNorm(groups, channels, eps=_NORM_EPSILON)


class Upsample(nn.Module):
    """An upsampling by 2 (nearest neighbour), then a 3x3 convolution.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at twice the resolution, (B, channels, 2 h, 2 w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


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
        self.norm = nn.GroupNorm(num_groups, channels, eps=_NORM_EPSILON, affine=False)
        self.gamma = nn.Linear(code_dim, channels)
        self.beta = nn.Linear(code_dim, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Returns x (B, channels, h', w') normalised, with the scale and the shift of codes (B, D, h, w)."""
        places = codes.flatten(2)
        # One place has no unbiased variance.
        deviation = (places.var(-1, correction=min(1, places.shape[-1] - 1)) + _NORM_EPSILON).sqrt()
        scale, shift = self.gamma(deviation), self.beta(places.mean(-1))
        out: Tensor = self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return out

"""The tokenizer's network: a convolutional encoder, a vector quantizer and a convolutional decoder.

The structure is that of the released code, quirks included, so that its weights fit: residual blocks and convolutions
are created in the order in which the released code numbers them. ``networks.vqgan_layouts`` has the other layouts.
``Tokenizer`` trains the network; stage 2, sampling and editing use ``encode`` and ``decode``.

Shapes: B images, C channels, H W pixels, h w token grid, N = h w tokens, D size of a code, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import ImageSize
from maskgit_pl.networks.quantizers import QuantizerOutput, quantizers
from maskgit_pl.networks.vqgan_config import Activation, Downsampling, Layout, VQGANConfig
from maskgit_pl.networks.vqgan_layouts import (
    Magvit2Decoder,
    Magvit2Encoder,
    TamingDecoder,
    TamingEncoder,
    Upsample,
    conv,
    group_norm,
)

__all__ = ["VQGAN", "Activation", "Decoder", "Downsampling", "Encoder", "Layout", "VQGANConfig", "VQGANOutput"]


class VQGANOutput(NamedTuple):
    """The output of the network in training.

    Attributes:
        reconstruction: (B, C, H, W) float, not clipped.
        quantized: Output of the quantizer: codes, tokens, loss.
        features: (B, D, h, w) float, output of the encoder.
    """

    reconstruction: Tensor
    quantized: QuantizerOutput
    features: Tensor


class ResidualBlock(nn.Module):
    """A residual block: norm, activation, 3x3 convolution, twice, plus a shortcut.

    If the number of channels changes, the released code applies its 1x1 shortcut to the *output* of the two
    convolutions and drops the input: f(x) + conv(f(x)). The released weights need the same here.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        config: Groups of the norms, and activation.
    """

    def __init__(self, in_channels: int, out_channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = conv(in_channels, out_channels, 3, bias=False)
        self.norm2 = _norm(out_channels, config)
        self.conv2 = conv(out_channels, out_channels, 3, bias=False)
        self.shortcut = conv(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        self.activation = _activation(config)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features (B, out_channels, h, w) of x (B, in_channels, h, w)."""
        # The shortcut is applied to the output of the convolutions, as the released weights require.
        hidden = self.conv1(self.activation(self.norm1(x)))
        hidden = self.conv2(self.activation(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.shortcut is None else self.shortcut(hidden))
        return out


class StridedDownsample(nn.Module):
    """A 4x4 convolution of stride 2 with "SAME" padding: (1, 1) at even sizes, (1, 2) at odd ones.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 4, bias=True, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at half the resolution, rounded up."""
        # The convolution pads 1 on each side; an odd size needs one more row or column at the end.
        height, width = x.shape[-2:]
        out: Tensor = self.conv(F.pad(x, (0, width % 2, 0, height % 2)))
        return out


class SameDownsample(nn.Module):
    """A 3x3 convolution of stride 2 with "SAME" padding: (0, 1) at even sizes, (1, 1) at odd ones.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=True, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at half the resolution, rounded up."""
        height, width = x.shape[-2:]
        out: Tensor = self.conv(F.pad(x, (width % 2, 1, height % 2, 1)))
        return out


class Encoder(nn.Module):
    """The encoder: a stem, levels of residual blocks that halve the resolution, middle blocks, a 1x1 head.

    Args:
        config: Sizes.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        last = config.widths[-1]
        self.patch_size = config.patch_size
        # Space to depth turns each patch into channels. No bias, as in the released code.
        self.stem = conv(config.in_channels * config.patch_size**2, config.base_channels, 3, bias=False)
        self.blocks = nn.Sequential(*_encoder_blocks(config))
        self.norm = _norm(last, config)
        self.activation = _activation(config)
        self.head = conv(last, config.code_dim, 1, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (B, D, h, w) of images (B, C, H, W) float in [0, 1]."""
        # (B, C p^2, H / p, W / p) with patches of size p, then one level after another.
        x = F.pixel_unshuffle(images, self.patch_size) if self.patch_size > 1 else images
        x = self.blocks(self.stem(x))
        out: Tensor = self.head(self.activation(self.norm(x)))
        return out


class Decoder(nn.Module):
    """The decoder: a stem, middle blocks, levels of residual blocks up to full resolution, a 3x3 head.

    Args:
        config: Sizes.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last = config.widths[-1], config.widths[0]
        self.patch_size = config.patch_size
        self.stem = conv(config.code_dim, first, 3, bias=True)
        self.blocks = nn.Sequential(*_decoder_blocks(config))
        self.norm = _norm(last, config)
        self.activation = _activation(config)
        self.head = conv(last, config.in_channels * config.patch_size**2, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the images (B, C, H, W), not clipped, of codes (B, D, h, w)."""
        x = self.blocks(self.stem(codes))
        out: Tensor = self.head(self.activation(self.norm(x)))
        return F.pixel_shuffle(out, self.patch_size) if self.patch_size > 1 else out


class VQGAN(nn.Module):
    """The tokenizer's network: encoder, quantizer and decoder.

    Args:
        config: Sizes.

    Source: Esser et al., arXiv:2012.09841; the architecture is that of the released MaskGIT code, or of
    taming-transformers in layout ``taming``, and Open-MAGVIT2's in layout ``magvit2``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        encoder, decoder = _HALVES[config.layout]
        self.encoder = encoder(config)
        spec = quantizers.build(config.quantizer)
        self.quantizer = spec.create(codebook_size=config.codebook_size, code_dim=config.code_dim)
        self.decoder = decoder(config)
        # After all draws, so that the scale changes no random number.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(config.initial_scale)

    def forward(self, images: Tensor) -> VQGANOutput:
        """Reconstructs images for training.

        Args:
            images: (B, C, H, W) float in [0, 1].

        Returns:
            The reconstruction, cut to H x W if the grid covers more, the quantizer's output, and the features.
        """
        # The grid is rounded up, so the reconstruction may be larger than the images.
        features = self.encoder(images)
        quantized = self.quantizer(features)
        reconstruction = self.decoder(quantized.quantized)[..., : images.shape[-2], : images.shape[-1]]
        return VQGANOutput(reconstruction, quantized, features)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images to tokens.

        Args:
            images: (B, C, H, W) float in [0, 1].

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        return self.quantizer.nearest(self.encoder(images))

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decodes tokens to images.

        Args:
            tokens: (B, N) int64 in [0, K), raster order.
            grid: Rows and columns (h, w), h w = N; other grids than the training's work too.

        Returns:
            (B, C, H, W) float, not clipped; H and W are h and w times ``downsampling_factor``.
        """
        codes = rearrange(self.quantizer.lookup(tokens), "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        images: Tensor = self.decoder(codes)
        return images

    def grid(self, image_size: ImageSize) -> tuple[int, int]:
        """Returns the rows and columns (h, w) of the token grid of an image; see ``VQGANConfig.grid``."""
        return self.config.grid(image_size)


_Encoder = Encoder | TamingEncoder | Magvit2Encoder
_Decoder = Decoder | TamingDecoder | Magvit2Decoder
_HALVES: dict[str, tuple[type[_Encoder], type[_Decoder]]] = {
    "maskgit": (Encoder, Decoder),
    "taming": (TamingEncoder, TamingDecoder),
    "magvit2": (Magvit2Encoder, Magvit2Decoder),
}


def _encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields levels from full resolution down, with a downsampling between two levels, then the middle blocks."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield _downsample(width, config)
        # The first block of a level changes the number of channels.
        for _ in range(config.num_res_blocks):
            yield ResidualBlock(width, out, config)
            width = out
    for _ in range(config.num_middle_blocks):
        yield ResidualBlock(width, width, config)


def _decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the middle blocks, then levels up to full resolution, with an upsampling between two levels."""
    width = config.widths[-1]
    for _ in range(config.num_middle_blocks):
        yield ResidualBlock(width, width, config)
    for level, out in reversed(list(enumerate(config.widths))):
        for _ in range(config.num_res_blocks):
            yield ResidualBlock(width, out, config)
            width = out
        if level > 0:
            yield Upsample(width)


def _downsample(channels: int, config: VQGANConfig) -> nn.Module:
    if config.downsampling == "strided":
        return StridedDownsample(channels)
    if config.downsampling == "strided-3x3":
        return SameDownsample(channels)
    # At odd sizes the last window holds fewer pixels and is divided by their number, as "SAME" mean pooling does.
    return nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)


def _norm(channels: int, config: VQGANConfig) -> nn.GroupNorm:
    return group_norm(channels, config.num_groups)


def _activation(config: VQGANConfig) -> nn.Module:
    return nn.SiLU() if config.activation == "swish" else nn.ReLU()

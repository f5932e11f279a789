"""The tokenizer's network: a convolutional encoder, a vector quantizer and a convolutional decoder.

The structure is the released code's, quirks included, so that its weights can be loaded by name: residual blocks and
convolutions are created in the order in which the released code numbers them. ``Tokenizer`` trains it; stage 2,
sampling and editing use ``encode`` and ``decode``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.networks.quantizers import QuantizerOutput, quantizers

__all__ = ["VQGAN", "Activation", "Decoder", "Downsampling", "Encoder", "VQGANConfig", "VQGANOutput"]

Downsampling = Literal["average", "strided"]
Activation = Literal["swish", "relu"]

_NORM_EPSILON = 1e-6  # flax's default; torch's 1e-5 moves the released model's outputs (released code)


class VQGANOutput(NamedTuple):
    """What the network gives in training.

    Attributes:
        reconstruction: (B, C, H, W) float, not clipped.
        quantized: The quantizer's output: codes, tokens, loss.
    """

    reconstruction: Tensor
    quantized: QuantizerOutput


@dataclass(frozen=True)
class VQGANConfig:
    """Every size of the network. The defaults are the released ImageNet tokenizer's.

    Attributes:
        in_channels: C, channels of an image.
        channels: Width of the first level.
        multipliers: Width of each level as a multiple of ``channels``; between two levels the resolution halves.
        blocks_per_level: Residual blocks of each level.
        middle_blocks: Residual blocks after the encoder's last and before the decoder's first level.
        downsampling: 2x2 mean, or a 4x4 convolution of stride 2.
        activation: ``swish`` or ``relu``.
        groups: Groups of each GroupNorm; divides every width.
        num_codes: K, codes in the codebook.
        code_width: D, numbers in a code.
        patch_size: Space to depth before the first and depth to space after the last convolution; 1 is the released
            code's, 2 or more makes the network cheaper by that factor squared.
        quantizer: Name or spec of the quantizer.
        initial_scale: Factor of the initial convolution weights, positive: 1 is the released LeCun normal; 0.577 is the
            variance of torch's own default, with which short runs learn faster.

    Raises:
        ValueError: A size is not positive, a width is not divisible by ``groups``, or the quantizer is unknown.

    Source: released code, config and modules of the 256 and 512 px tokenizer.
    """

    in_channels: int
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    middle_blocks: int = 2
    downsampling: Downsampling = "average"
    activation: Activation = "swish"
    groups: int = 32
    num_codes: int = 1024
    code_width: int = 256
    patch_size: int = 1
    quantizer: str | Mapping[str, Any] = "gradient"
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        self._check_sizes()
        if self.downsampling not in ("average", "strided"):
            raise ValueError(f"network downsampling: 'average' or 'strided' is needed, got {self.downsampling!r}")
        if self.activation not in ("swish", "relu"):
            raise ValueError(f"network activation: 'swish' or 'relu' is needed, got {self.activation!r}")
        if not 0 < self.initial_scale < math.inf:
            raise ValueError(f"network initial_scale: a positive number is needed, got {self.initial_scale}")
        quantizers.build(self.quantizer)

    def _check_sizes(self) -> None:
        names = ("in_channels", "channels", "blocks_per_level", "groups", "code_width", "patch_size")
        least = {**dict.fromkeys(names, 1), "middle_blocks": 0, "num_codes": 2}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < smallest:
                raise ValueError(f"network {name}: an integer of at least {smallest} is needed, got {value!r}")
        if not self.multipliers or any(not isinstance(m, int) or m < 1 for m in self.multipliers):
            raise ValueError(f"network multipliers: positive integers, one a level, are needed, got {self.multipliers}")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(
                    f"network groups: every width {self.widths} (channels x multipliers) must be a multiple of the "
                    f"number of groups, got {self.groups}; {math.gcd(*self.widths)} and its divisors fit"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def downsampling_factor(self) -> int:
        """Pixels along an edge of what one token covers."""
        return int(self.patch_size * 2 ** (len(self.multipliers) - 1))

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns (h, w) of the token grid of an image.

        Args:
            image_size: Edge of a square image, or (height, width), in pixels.

        Raises:
            ValueError: The size is not a positive multiple of ``patch_size``.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for size in (height, width):
            if size < 1 or size % self.patch_size:
                raise ValueError(
                    f"image size: a positive multiple of patch_size {self.patch_size} is needed, got {size}"
                )
        return -(-height // self.downsampling_factor), -(-width // self.downsampling_factor)


class ResidualBlock(nn.Module):
    """norm, activation, 3x3, norm, activation, 3x3, plus a shortcut.

    Where the width changes, the released code applies its 1x1 shortcut to the block's *processed* features, not to its
    input, which is then dropped: x + conv(x). Its weights need the same here.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        config: Groups and activation.
    """

    def __init__(self, in_channels: int, out_channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = _conv(in_channels, out_channels, 3, bias=False)
        self.norm2 = _norm(out_channels, config)
        self.conv2 = _conv(out_channels, out_channels, 3, bias=False)
        self.shortcut = _conv(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        self.activation = _activation(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h, w)."""
        hidden = self.conv1(self.activation(self.norm1(x)))
        hidden = self.conv2(self.activation(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.shortcut is None else self.shortcut(hidden))
        return out


class StridedDownsample(nn.Module):
    """4x4 convolution of stride 2 with "SAME" padding: (1, 1) at even sizes, (1, 2) at odd ones.

    Args:
        channels: Width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 4, bias=True, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2))."""
        height, width = x.shape[-2:]
        out: Tensor = self.conv(F.pad(x, (0, width % 2, 0, height % 2)))
        return out


class Upsample(nn.Module):
    """Nearest neighbour times two, then a 3x3 convolution.

    Args:
        channels: Width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Encoder(nn.Module):
    """Images to features: a stem, levels of residual blocks that halve the resolution, middle blocks, a 1x1 head."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        last = config.widths[-1]
        self.patch_size = config.patch_size
        self.stem = _conv(config.in_channels * config.patch_size**2, config.channels, 3, bias=False)
        self.blocks = nn.Sequential(*_encoder_blocks(config))
        self.norm = _norm(last, config)
        self.activation = _activation(config)
        self.head = _conv(last, config.code_width, 1, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float in [0, 1] -> (B, D, h, w)."""
        x = F.pixel_unshuffle(images, self.patch_size) if self.patch_size > 1 else images
        x = self.blocks(self.stem(x))
        out: Tensor = self.head(self.activation(self.norm(x)))
        return out


class Decoder(nn.Module):
    """Codes to images: a stem, middle blocks, levels of residual blocks that double the resolution, a 3x3 head."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last = config.widths[-1], config.widths[0]
        self.patch_size = config.patch_size
        self.stem = _conv(config.code_width, first, 3, bias=True)
        self.blocks = nn.Sequential(*_decoder_blocks(config))
        self.norm = _norm(last, config)
        self.activation = _activation(config)
        self.head = _conv(last, config.in_channels * config.patch_size**2, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, H, W), not clipped."""
        x = self.blocks(self.stem(codes))
        out: Tensor = self.head(self.activation(self.norm(x)))
        return F.pixel_shuffle(out, self.patch_size) if self.patch_size > 1 else out


class VQGAN(nn.Module):
    """Encoder, quantizer, decoder.

    Args:
        config: Every size.

    Source: Esser et al., arXiv:2012.09841; the architecture is that of the released MaskGIT code.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        spec = quantizers.build(config.quantizer)
        self.quantizer = spec.create(num_codes=config.num_codes, code_width=config.code_width)
        self.decoder = Decoder(config)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(config.initial_scale)

    def forward(self, images: Tensor) -> VQGANOutput:
        """Reconstructs images for training.

        Args:
            images: (B, C, H, W) float in [0, 1].

        Returns:
            The reconstruction, cut to H x W where the grid covers more, and the quantizer's output.
        """
        quantized = self.quantizer(self.encoder(images))
        reconstruction = self.decoder(quantized.quantized)[..., : images.shape[-2], : images.shape[-1]]
        return VQGANOutput(reconstruction, quantized)

    def encode(self, images: Tensor) -> Tensor:
        """Images to tokens.

        Args:
            images: (B, C, H, W) float in [0, 1].

        Returns:
            (B, N) int64 in [0, K), raster order.
        """
        return self.quantizer.nearest(self.encoder(images))

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens to images.

        Args:
            tokens: (B, N) int64 in [0, K), raster order.
            grid: Rows and columns (h, w) with h w = N.

        Returns:
            (B, C, H, W) float, not clipped; H and W are h and w times ``downsampling_factor``.
        """
        codes = rearrange(self.quantizer.lookup(tokens), "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        images: Tensor = self.decoder(codes)
        return images

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns (h, w) of the token grid of an image; see ``VQGANConfig.grid``."""
        return self.config.grid(image_size)


def _encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Levels from full resolution down, a downsampling between two levels, then the middle blocks."""
    width = config.channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield _downsample(width, config)
        for _ in range(config.blocks_per_level):
            yield ResidualBlock(width, out, config)
            width = out
    for _ in range(config.middle_blocks):
        yield ResidualBlock(width, width, config)


def _decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """The middle blocks, then levels up to full resolution, an upsampling between two levels."""
    width = config.widths[-1]
    for _ in range(config.middle_blocks):
        yield ResidualBlock(width, width, config)
    for level, out in reversed(list(enumerate(config.widths))):
        for _ in range(config.blocks_per_level):
            yield ResidualBlock(width, out, config)
            width = out
        if level > 0:
            yield Upsample(width)


def _downsample(channels: int, config: VQGANConfig) -> nn.Module:
    if config.downsampling == "strided":
        return StridedDownsample(channels)
    # At odd sizes the last window holds fewer pixels and is divided by their number, as "SAME" mean pooling does.
    return nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)


def _norm(channels: int, config: VQGANConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=_NORM_EPSILON)


def _activation(config: VQGANConfig) -> nn.Module:
    return nn.SiLU() if config.activation == "swish" else nn.ReLU()


def _conv(
    in_channels: int, out_channels: int, kernel: int, *, bias: bool, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """A convolution with flax's initial values: truncated LeCun normal, bias 0. Source: released code."""
    pad = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=pad, bias=bias)
    deviation = math.sqrt(1 / (in_channels * kernel**2)) / 0.87962566103423978  # undoes the truncation at 2 deviations
    nn.init.trunc_normal_(conv.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv

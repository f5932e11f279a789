"""The discriminator ``stylegan``, a residual network of StyleGAN's type: the one of the released code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, check_integer, check_number
from maskgit_pl.image_format import ImageSize, height_width
from maskgit_pl.networks.discriminators import discriminators

__all__ = ["Discriminator", "DiscriminatorConfig", "Pooling"]

Pooling = Literal["blur", "average"]
_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)

_SLOPE = 0.2
_SMALLEST = 4  # the resolution at which the features are flattened


@discriminators.register("stylegan")
@dataclass(frozen=True)
class DiscriminatorConfig:
    """The sizes of the discriminator. The defaults are the released code's; the image size is the tokenizer's.

    Attributes:
        channel_multiplier: Factor of the released numbers of channels, in (0, 16]: 512 up to 32 px, then half for each
            doubling of the shorter side, rounded up to a power of two: 28 px has the channels of 32. 1/8 suits small
            images.
        channels: Channels at each resolution, from the image's down to the last, instead of the released ones.
        pooling: ``blur`` halves the resolution by a 4x4 blur of stride 2, ``average`` by a 2x2 mean.

    Raises:
        ValueError: if a number is out of range.
    """

    channel_multiplier: float = 1.0
    channels: tuple[int, ...] | None = None
    pooling: Pooling = "blur"

    def __post_init__(self) -> None:
        check_number("discriminator channel_multiplier", self.channel_multiplier, "(0, 16]")
        check_choice("discriminator pooling", self.pooling, ("blur", "average"))
        if self.channels is not None:
            object.__setattr__(self, "channels", tuple(self.channels))
            check_integer("length of discriminator channels", len(self.channels), "[1, 16]")
            for width in self.channels:
                check_integer("discriminator channels", width, "[1, 8192]")

    def widths(self, image_size: ImageSize) -> tuple[int, ...]:
        """Returns the channels at each resolution: the image's, then halved (rounded down) until it is at most 4.

        The resolution is that of the shorter side.

        Args:
            image_size: Side of square images, or (height, width), in pixels.

        Raises:
            ValueError: if ``channels`` has not one number for each resolution.
        """
        # 28 px: 28, 14, 7, 3.
        resolutions = [min(height_width(image_size))]
        while resolutions[-1] > _SMALLEST:
            resolutions.append(resolutions[-1] // 2)
        if self.channels is None:
            return tuple(max(1, round(self.channel_multiplier * _released_width(r))) for r in resolutions)
        if len(self.channels) != len(resolutions):
            raise ValueError(
                f"discriminator channels must have one number for each of the resolutions {resolutions}, "
                f"got {len(self.channels)}: {self.channels}"
            )
        return self.channels

    def create(self, *, in_channels: int, image_size: ImageSize) -> nn.Module:
        """Builds the network.

        Raises:
            ValueError: if ``channels`` has not one number for each resolution.
        """
        return Discriminator(self, in_channels=in_channels, image_size=image_size)


class DiscriminatorBlock(nn.Module):
    """A residual block: two 3x3 convolutions with a pooling between them, plus a pooled 1x1 shortcut, over sqrt(2).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        pooling: Pooling that halves the resolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, pooling: Pooling) -> None:
        super().__init__()
        self.conv1 = _xavier(nn.Conv2d(in_channels, in_channels, 3, padding=1))
        self.shortcut = _xavier(nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.conv2 = _xavier(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.pool = Blur() if pooling == "blur" else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features (B, out_channels, floor(h / 2), floor(w / 2)) of x (B, in_channels, h, w)."""
        hidden = self.pool(F.leaky_relu(self.conv1(x), _SLOPE))
        hidden = F.leaky_relu(self.conv2(hidden), _SLOPE)
        # sqrt(2) keeps the variance of a sum of two.
        out: Tensor = (hidden + self.shortcut(self.pool(x))) / math.sqrt(2)
        return out


class Blur(nn.Module):
    """A depthwise blur with the outer product of [1, 3, 3, 1] / 8, stride 2, zero padding of 1."""

    kernel: Tensor  # (4, 4)

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, C, h, w) at half the resolution, (B, C, floor(h / 2), floor(w / 2))."""
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


class Discriminator(nn.Module):
    """The discriminator: one logit for each image, high if the image looks real.

    Args:
        config: Channels and pooling.
        in_channels: Channels of an image.
        image_size: Side of square images, or (height, width), in pixels.

    Source: released code, ``discriminator.py`` (StyleGAN2's, Karras et al., arXiv:1912.04958, without the minibatch
    deviation and the equalised learning rate).
    """

    def __init__(self, config: DiscriminatorConfig, *, in_channels: int, image_size: ImageSize) -> None:
        super().__init__()
        widths = config.widths(image_size)
        # Each block halves both sides, rounded down.
        height, width = (side >> (len(widths) - 1) for side in height_width(image_size))
        last = widths[-1]
        self.stem = _xavier(nn.Conv2d(in_channels, widths[0], 3, padding=1))
        self.blocks = nn.Sequential(*(DiscriminatorBlock(a, b, pooling=config.pooling) for a, b in pairwise(widths)))
        self.conv = _xavier(nn.Conv2d(last, last, 3, padding=1))
        self.hidden = _xavier(nn.Linear(last * height * width, last))
        self.head = _xavier(nn.Linear(last, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (B, 1) of images (B, C, H, W) float in [0, 1]."""
        x = self.blocks(F.leaky_relu(self.stem(images), _SLOPE))
        x = F.leaky_relu(self.conv(x), _SLOPE).flatten(1)  # (B, channels h w)
        out: Tensor = self.head(F.leaky_relu(self.hidden(x), _SLOPE))
        return out


def _released_width(resolution: int) -> int:
    """Returns 512 up to 32 px, 256 at 64, 128 at 128 ... Source: released code."""
    edge = 1 << max(0, resolution - 1).bit_length()
    return min(512, 16384 // edge)


def _xavier(layer: _Layer) -> _Layer:
    """Draws Xavier uniform weights, sets biases to 0, and returns the layer. Source: released code."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

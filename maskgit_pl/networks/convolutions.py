"""Layers that several layouts of the tokenizer's network share: ``vqgan``, ``taming`` and ``magvit2``."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Upsample", "conv", "group_norm"]

# flax's default and taming's choice; torch's 1e-5 changes the outputs of the released model.
_NORM_EPSILON = 1e-6


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


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Builds a GroupNorm with the epsilon of the released weights."""
    return nn.GroupNorm(groups, channels, eps=_NORM_EPSILON)


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

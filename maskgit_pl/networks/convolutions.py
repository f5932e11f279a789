"""The layers that both layouts of the tokenizer's network are built from."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Upsample", "conv", "group_norm"]

_NORM_EPSILON = (
    1e-6  # of both layouts; torch's 1e-5 moves the released model's outputs (flax's default, taming's choice)
)


class Upsample(nn.Module):
    """Nearest neighbour times two, then a 3x3 convolution.

    Args:
        channels: Width of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Makes a GroupNorm with the epsilon of the released weights."""
    return nn.GroupNorm(groups, channels, eps=_NORM_EPSILON)


def conv(
    in_channels: int, out_channels: int, kernel: int, *, bias: bool, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """Makes a convolution with flax's initial values: truncated LeCun normal, bias 0. Source: released code."""
    pad = kernel // 2 if padding is None else padding
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=pad, bias=bias)
    deviation = math.sqrt(1 / (in_channels * kernel**2)) / 0.87962566103423978  # undoes the truncation at 2 deviations
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

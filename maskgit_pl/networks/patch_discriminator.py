"""The discriminator ``patchgan``, which judges overlapping patches, as in pix2pix, taming-transformers and LlamaGen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from maskgit_pl.checks import check_choice, check_integer
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.image_format import ImageSize, height_width
from maskgit_pl.networks.discriminators import discriminators

__all__ = ["PatchDiscriminator", "PatchDiscriminatorConfig", "PatchNorm"]

PatchNorm = Literal["group", "batch", "actnorm"]

_SLOPE = 0.2
_MAX_MULTIPLIER = 8  # of the base channels
_MAX_GROUPS = 32
_MIN_GROUP = 4  # channels of a group
_DEVIATION = 0.02  # of the initial weights


@discriminators.register("patchgan")
@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """The sizes of the discriminator of patches.

    Attributes:
        num_layers: Convolutions of stride 2, in [1, 8]; 3 gives a logit for each patch of 70 x 70 pixels.
        base_channels: Channels of the first layer, in [1, 1024]; doubled by each further one, at most 8 times as many.
        norm: ``group``: GroupNorm of at most 32 groups, independent of batch, ranks and micro-batches. ``batch``:
            BatchNorm over the micro-batch of all ranks (taming-transformers and LlamaGen), which allows no R1 penalty.
            ``actnorm``: a scale and an offset per channel that normalise the first micro-batch, then trained.

    Raises:
        ValueError: if a number is out of range or the norm is unknown.

    Source: Isola et al., arXiv:1611.07004; ``NLayerDiscriminator`` of CompVis/taming-transformers (3 layers, 64
    channels), which has BatchNorm or ActNorm.
    """

    num_layers: int = 3
    base_channels: int = 64
    norm: PatchNorm = "group"

    def __post_init__(self) -> None:
        check_integer("discriminator num_layers", self.num_layers, "[1, 8]")
        check_integer("discriminator base_channels", self.base_channels, "[1, 1024]")
        check_choice("discriminator norm", self.norm, get_args(PatchNorm))

    @property
    def mixes_images(self) -> bool:
        """A flag: True if a logit depends on other images of the batch."""
        return self.norm == "batch"

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels after each convolution but the last: those of stride 2, then one of stride 1."""
        return tuple(self.base_channels * min(2**layer, _MAX_MULTIPLIER) for layer in range(self.num_layers + 1))

    def side(self, image_size: int) -> int:
        """Returns a side of the map of logits: (that side of the image / 2^num_layers, rounded down) - 2.

        Raises:
            ValueError: if the image is too small to have a patch.
        """
        side = (image_size >> self.num_layers) - 2
        if side < 1:
            most = (image_size // 3).bit_length() - 1
            way_out = f"set it to {most} or fewer" if most > 0 else "use the discriminator stylegan"
            raise ValueError(
                f"discriminator num_layers must leave 3 pixels of {image_size} after halving the side as often, got "
                f"{self.num_layers}; {way_out}"
            )
        return side

    def create(self, *, in_channels: int, image_size: ImageSize) -> nn.Module:
        """Builds the network.

        Raises:
            ValueError: if the images are too small for ``num_layers``.
        """
        self.side(min(height_width(image_size)))
        return PatchDiscriminator(self, in_channels=in_channels)


class PatchDiscriminator(nn.Module):
    """The discriminator of patches: 4x4 convolutions, each logit high if its patch looks real.

    Args:
        config: Layers, channels and norm.
        in_channels: Channels of an image.

    Source: ``NLayerDiscriminator`` of CompVis/taming-transformers, with its initial weights: convolutions N(0, 0.02),
    scales of norms N(1, 0.02) and offsets 0.
    """

    def __init__(self, config: PatchDiscriminatorConfig, *, in_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_layers(config, in_channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, _DEVIATION)
            elif isinstance(module, nn.GroupNorm | BatchNorm):
                nn.init.normal_(module.weight, 1.0, _DEVIATION)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (B, 1, h, w) of images (B, C, H, W) float in [0, 1]."""
        out: Tensor = self.layers(2 * images - 1)  # the published networks see [-1, 1]
        return out


class BatchNorm(nn.Module):
    """The normalisation by mean and variance of the micro-batch of all ranks.

    Torch's ``SyncBatchNorm`` does not run on a CPU. There are no running statistics: a discriminator only trains, so
    nothing would read them.

    Args:
        channels: C, number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, C, h, w), normalised, scaled and moved per channel."""
        x = x.float()
        mean, variance = _statistics(x)
        scale = self.weight.view(1, -1, 1, 1) * (variance + 1e-5).rsqrt()
        return (x - mean) * scale + self.bias.view(1, -1, 1, 1)


class ActNorm(nn.Module):
    """A trained offset and scale per channel, which give the first micro-batch of all ranks mean 0 and variance 1.

    Args:
        channels: C, number of channels.

    Source: Kingma and Dhariwal, arXiv:1807.03039, section 3.1, as in CompVis/taming-transformers.
    """

    initialized: Tensor  # () float32: 1 after the first micro-batch

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.zeros(()))
        self._is_initialized = False  # the buffer's value, which is on the device

    def forward(self, x: Tensor) -> Tensor:
        """Returns scale (x + offset) for x (B, C, h, w)."""
        if self.training and not self._is_initialized:
            self._initialize(x)
        return self.scale * (x + self.offset)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        mean, variance = _statistics(x.float())
        self.offset.copy_(-mean)
        self.scale.copy_(1 / (variance.sqrt() + 1e-6))
        self.initialized.fill_(1.0)
        self._is_initialized = True

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._is_initialized = bool(self.initialized)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of each channel over x (B, C, h, w) of all ranks, (1, C, 1, 1) each."""
    mean = mean_over_ranks(x.mean((0, 2, 3), keepdim=True))
    return mean, mean_over_ranks((x - mean).square().mean((0, 2, 3), keepdim=True))


def _layers(config: PatchDiscriminatorConfig, in_channels: int) -> Iterator[nn.Module]:
    """Yields the first convolution without a norm, further ones with one, and the convolution to the logits."""
    yield nn.Conv2d(in_channels, config.base_channels, 4, stride=2, padding=1)
    yield nn.LeakyReLU(_SLOPE)
    for layer, (width, out) in enumerate(pairwise(config.widths), start=1):
        stride = 2 if layer < config.num_layers else 1
        # The mean of BatchNorm would remove a bias.
        yield nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=config.norm != "batch")
        yield _norm(config.norm, out)
        yield nn.LeakyReLU(_SLOPE)
    yield nn.Conv2d(config.widths[-1], 1, 4, padding=1)


def _norm(kind: PatchNorm, channels: int) -> nn.Module:
    if kind == "batch":
        return BatchNorm(channels)
    if kind == "actnorm":
        return ActNorm(channels)
    # Groups of one channel would amplify the rounding of maps that are nearly constant.
    num_groups = math.gcd(max(1, channels // _MIN_GROUP), _MAX_GROUPS, channels)
    return nn.GroupNorm(num_groups, channels)

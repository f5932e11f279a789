"""Discriminators by name: the networks of the adversarial loss, which ``Tokenizer`` trains against the VQGAN.

``stylegan`` is that of the released code, a residual network of StyleGAN's type with one logit for each
image. ``patchgan`` judges overlapping patches, as in pix2pix, taming-transformers and LlamaGen.

``AdversarialConfig`` takes one by a recipe value (``patchgan``, or ``{name: patchgan, num_layers: 2}``). Other packages
add their own in the entry point group ``maskgit_pl.discriminators``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import ImageSize, check_integer, check_number, height_width
from maskgit_pl.distributed import mean_over_ranks
from maskgit_pl.registry import Registry, has_create

Pooling = Literal["blur", "average"]
PatchNorm = Literal["group", "batch"]
_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)

_SLOPE = 0.2  # of the leaky ReLUs
_SMALLEST = 4  # the resolution at which stylegan flattens the features
_MAX_MULTIPLIER = 8  # of the base channels of patchgan
_MAX_GROUPS = 32  # of its GroupNorm
_MIN_GROUP = 4  # channels of a group
_DEVIATION = 0.02  # of its initial weights


class DiscriminatorSpec(Protocol):
    """A registered discriminator: a frozen dataclass of the values in a recipe, which builds the module.

    A spec whose network normalises over the batch has the attribute ``mixes_images = True``: a logit then
    depends on other images too, and R1 is refused.
    """

    def create(self, *, in_channels: int, image_size: ImageSize) -> nn.Module:
        """Builds the network: images (B, C, H, W) float in [0, 1] to logits (B, ...), high if they look real.

        Args:
            in_channels: Channels of an image.
            image_size: Side of square images, or (height, width), in pixels.
        """
        ...


discriminators: Registry[DiscriminatorSpec] = Registry(
    "discriminator",
    "maskgit_pl.discriminators",
    check=has_create,
)


@discriminators.register("stylegan")
@dataclass(frozen=True)
class DiscriminatorConfig:
    """The sizes of the discriminator ``stylegan``, by default the released code's. The image size is the tokenizer's.

    Attributes:
        channel_multiplier: Factor of the released numbers of channels, in (0, 16]: 512 up to 32 px, then half
            for each doubling of the shorter side, rounded up to a power of two: 28 px has the channels of 32.
            1/8 suits small images.
        pooling: ``blur`` halves the resolution by a 4x4 blur of stride 2, ``average`` by a 2x2 mean.
    """

    channel_multiplier: float = 1.0
    pooling: Pooling = "blur"

    def __post_init__(self) -> None:
        check_number("discriminator channel_multiplier", self.channel_multiplier, "(0, 16]")

    def widths(self, image_size: ImageSize) -> tuple[int, ...]:
        """Returns the channels at each resolution: the image's, then halved (rounded down) until it is at most 4.

        The resolution is that of the shorter side.

        Args:
            image_size: Side of square images, or (height, width), in pixels.
        """
        # 28 px: 28, 14, 7, 3.
        resolutions = [min(height_width(image_size))]
        while resolutions[-1] > _SMALLEST:
            resolutions.append(resolutions[-1] // 2)
        # Released code: 512 up to 32 px, 256 at 64, 128 at 128 ...
        released = [min(512, 16384 // (1 << max(0, resolution - 1).bit_length())) for resolution in resolutions]
        return tuple(max(1, round(self.channel_multiplier * width)) for width in released)

    def create(self, *, in_channels: int, image_size: ImageSize) -> nn.Module:
        """Builds the network."""
        return Discriminator(self, in_channels=in_channels, image_size=image_size)


class Discriminator(nn.Module):
    """The discriminator: one logit for each image, high if the image looks real.

    Args:
        config: Channels and pooling.
        in_channels: Channels of an image.
        image_size: Side of square images, or (height, width), in pixels.

    Source: released code, ``discriminator.py`` (StyleGAN2's, Karras et al., arXiv:1912.04958, without the
    minibatch deviation and the equalised learning rate).
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


def _xavier(layer: _Layer) -> _Layer:
    """Draws Xavier uniform weights, sets biases to 0, and returns the layer. Source: released code."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@discriminators.register("patchgan")
@dataclass(frozen=True)
class PatchDiscriminatorConfig:
    """The sizes of the discriminator ``patchgan``.

    Attributes:
        num_layers: Convolutions of stride 2, in [1, 8]; 3 gives a logit for each patch of 70 x 70 pixels.
        base_channels: Channels of the first layer, in [1, 1024]; doubled by each further one, at most 8 times as many.
        norm: ``group``: GroupNorm of at most 32 groups, independent of batch, ranks and micro-batches. ``batch``:
            BatchNorm over the micro-batch of all ranks (taming-transformers and LlamaGen), which allows no R1 penalty.

    Source: Isola et al., arXiv:1611.07004; ``NLayerDiscriminator`` of CompVis/taming-transformers (3 layers,
    64 channels).
    """

    num_layers: int = 3
    base_channels: int = 64
    norm: PatchNorm = "group"

    def __post_init__(self) -> None:
        check_integer("discriminator num_layers", self.num_layers, "[1, 8]")
        check_integer("discriminator base_channels", self.base_channels, "[1, 1024]")

    @property
    def mixes_images(self) -> bool:
        """A flag: True if a logit depends on other images of the batch."""
        return self.norm == "batch"

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels after each convolution but the last: those of stride 2, then one of stride 1."""
        return tuple(self.base_channels * min(2**layer, _MAX_MULTIPLIER) for layer in range(self.num_layers + 1))

    def create(self, *, in_channels: int, image_size: ImageSize) -> nn.Module:
        """Builds the network, whose map of logits has the sides (side of the image >> num_layers) - 2."""
        side = min(height_width(image_size))
        if side >> self.num_layers < 3:
            raise ValueError(
                f"discriminator num_layers must leave 3 pixels of {side} after halving the side as often, got "
                f"{self.num_layers}; set it to {max(1, (side // 3).bit_length() - 1)} or use the discriminator stylegan"
            )
        return PatchDiscriminator(self, in_channels=in_channels)


class PatchDiscriminator(nn.Module):
    """The discriminator of patches: 4x4 convolutions, each logit high if its patch looks real.

    Args:
        config: Layers, channels and norm.
        in_channels: Channels of an image.

    Source: ``NLayerDiscriminator`` of CompVis/taming-transformers, with its initial weights: convolutions
    N(0, 0.02), scales of norms N(1, 0.02) and offsets 0.
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


def _layers(config: PatchDiscriminatorConfig, in_channels: int) -> Iterator[nn.Module]:
    """Yields the first convolution without a norm, further ones with one, and the convolution to the logits."""
    yield nn.Conv2d(in_channels, config.base_channels, 4, stride=2, padding=1)
    yield nn.LeakyReLU(_SLOPE)
    for layer, (width, out) in enumerate(pairwise(config.widths), start=1):
        stride = 2 if layer < config.num_layers else 1
        # The mean of BatchNorm would remove a bias.
        yield nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=config.norm != "batch")
        # Groups of one channel would amplify the rounding of maps that are nearly constant.
        num_groups = math.gcd(max(1, out // _MIN_GROUP), _MAX_GROUPS, out)
        yield BatchNorm(out) if config.norm == "batch" else nn.GroupNorm(num_groups, out)
        yield nn.LeakyReLU(_SLOPE)
    yield nn.Conv2d(config.widths[-1], 1, 4, padding=1)


class BatchNorm(nn.Module):
    """The normalisation by mean and variance of the micro-batch of all ranks.

    Torch's ``SyncBatchNorm`` does not run on a CPU. There are no running statistics: a discriminator only
    trains, so nothing would read them.

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
        mean = mean_over_ranks(x.mean((0, 2, 3), keepdim=True))
        variance = mean_over_ranks((x - mean).square().mean((0, 2, 3), keepdim=True))
        scale = self.weight.view(1, -1, 1, 1) * (variance + 1e-5).rsqrt()
        return (x - mean) * scale + self.bias.view(1, -1, 1, 1)

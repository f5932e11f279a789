"""The tokenizer's network: a convolutional encoder, a vector quantizer and a convolutional decoder.

``Tokenizer`` trains the network; stage 2, sampling and editing use ``encode`` and ``decode``. The structure
is that of published code, quirks included, so that its weights fit: modules are created in the order in which
it numbers them. ``VQGANConfig.layout`` chooses one:

- ``maskgit``, the released code: no biases except in the heads, in resampling and in the decoder's stem; a block that
  changes the number of channels has a 1x1 convolution on the *output* of its convolutions.
- ``taming``, of taming-transformers, which LlamaGen, diffusers and IBQ share: every convolution has a bias; the 1x1
  convolution is on the *input* of the block; there is self-attention at chosen levels and, unless it is left
  out, in the middle; the decoder has one more block at each level; and images are in [-1, 1] inside, so that
  padding with zeros is grey, unless ``signed_images`` is False.
- ``magvit2``, of Open-MAGVIT2's image tokenizers, differs from ``taming``: the convolutions of residual blocks have no
  bias; there is no self-attention; an upsampling is a convolution to four times the channels and a pixel shuffle; and
  each level of the decoder starts with a norm whose scale and shift depend on the codes of the whole image.

Shapes: B images, C channels, H W pixels, h w token grid, N = h w tokens, D size of a code, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import ImageSize, check_channels, check_choice, check_integer, check_number, height_width
from maskgit_pl.networks.quantizers import QuantizerOutput, build_sized, quantizers
from maskgit_pl.text import shorten

Downsampling = Literal["average", "strided", "strided-3x3"]
Activation = Literal["swish", "relu"]
Layout = Literal["maskgit", "taming", "magvit2"]

_RANGES = {  # well above any existing network: a larger number is a mistake, or an attack on the memory
    "base_channels": "[1, 16384]",
    "num_res_blocks": "[1, 64]",
    "num_middle_blocks": "[0, 64]",
    "num_groups": "[1, 16384]",
    "codebook_size": "[2, 16777216]",
    "code_dim": "[1, 65536]",
    "patch_size": "[1, 32]",
}
_MAX_LEVELS = 12  # the resolution is halved 11 times
_ONLY_OF_TAMING = ("attention_levels", "middle_attention", "latent_channels", "signed_images")
_ONLY_OF_MASKGIT = ("downsampling", "activation", "patch_size")
_FIXED = {  # layout -> fields that keep their defaults
    "maskgit": _ONLY_OF_TAMING,
    "taming": ("num_middle_blocks", *_ONLY_OF_MASKGIT),
    "magvit2": (*_ONLY_OF_TAMING, *_ONLY_OF_MASKGIT),
}
# Of all norms, and of the variance of codes. flax's default and taming's choice; torch's 1e-5 changes the
# outputs of the released model.
_NORM_EPSILON = 1e-6
_PATCH_CHANNELS = 8  # of ``PatchUpsample`` at full resolution; 16 take a quarter more time


@dataclass(frozen=True)
class VQGANConfig:
    """The sizes of the network. The defaults are the released ImageNet tokenizer's.

    Attributes:
        in_channels: C, channels of an image: 1 or 3.
        base_channels: Channels of the first level.
        channel_multipliers: Channels of each level as a multiple of ``base_channels``; each level has half
            the resolution of the one before.
        num_res_blocks: Number of residual blocks of each level.
        num_middle_blocks: Number of residual blocks after the encoder's last and before the decoder's first level.
        downsampling: ``average``: 2x2 mean; ``strided``: 4x4 convolution of stride 2; ``strided-3x3``: 3x3
            convolution of stride 2, as in MaskBit (arXiv:2409.16211).
        activation: ``swish`` or ``relu``.
        num_groups: Number of groups of each GroupNorm; divides the channels of every level.
        codebook_size: K, number of codes.
        code_dim: D, size of a code.
        patch_size: Factor of space to depth before the first convolution, and of the upsamplings before the
            last one. 1 (released code) does neither; a power of 2 makes the network cheaper by its square.
        quantizer: Name or mapping of a registered quantizer.
        initial_scale: Factor of the initial convolution weights, in (0, 1000]. 1 is the released LeCun
            normal; 0.577 gives the variance of torch's default, with which short runs learn faster.
        layout: ``maskgit``, ``taming`` or ``magvit2``; see the module. ``taming`` fixes
            ``num_middle_blocks``, and both others fix ``downsampling``, ``activation`` and ``patch_size``;
            their image sizes are multiples of the downsampling factor.
        attention_levels: Levels (0: full resolution) with self-attention after each block; layout ``taming`` only.
        middle_attention: True for self-attention between the two middle blocks; layout ``taming`` only.
            aMUSEd (arXiv:2401.01808) has none.
        latent_channels: Channels between the last 3x3 and the 1x1 convolution before the codes; required by
            layout ``taming``, and for it only.
        signed_images: True: images are in [-1, 1] inside; False: in [0, 1], as the tokenizer of aMUSEd needs;
            layout ``taming`` only.

    Source: released code, config and modules of the 256 and 512 px tokenizer; ``taming``: CompVis/taming-transformers,
    modules/diffusionmodules/model.py, and FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py;
    ``magvit2``: arXiv:2409.04410, TencentARC/Open-MAGVIT2, modules/diffusionmodules/improved_model.py.
    """

    in_channels: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_middle_blocks: int = 2
    downsampling: Downsampling = "average"
    activation: Activation = "swish"
    num_groups: int = 32
    codebook_size: int = 1024
    code_dim: int = 256
    patch_size: int = 1
    quantizer: str | Mapping[str, Any] = "gradient"
    initial_scale: float = 1.0
    layout: Layout = "maskgit"
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    latent_channels: int | None = None
    signed_images: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        self._check_sizes()
        self._check_layout()
        check_choice("network downsampling", self.downsampling, get_args(Downsampling))
        check_choice("network activation", self.activation, get_args(Activation))
        check_number("network initial_scale", self.initial_scale, "(0, 1000]")
        build_sized(self.quantizer, codebook_size=self.codebook_size, code_dim=self.code_dim)

    def _check_sizes(self) -> None:
        check_channels("network in_channels", self.in_channels)
        for name, interval in _RANGES.items():
            check_integer(f"network {name}", getattr(self, name), interval)
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"network patch_size must be 1, 2, 4, 8, 16 or 32, got {self.patch_size}")
        if not 1 <= len(self.channel_multipliers) <= _MAX_LEVELS:
            raise ValueError(
                f"network channel_multipliers must be 1 to {_MAX_LEVELS} integers, one a level, got "
                f"{shorten(self.channel_multipliers)}"
            )
        for multiplier in self.channel_multipliers:
            check_integer("network channel_multipliers", multiplier, "[1, 1024]")
        if math.gcd(*self.widths) % self.num_groups:
            raise ValueError(
                f"network num_groups must divide the channels of every level, {self.widths} (base_channels x "
                f"channel_multipliers), got {self.num_groups}; {math.gcd(*self.widths)} and its divisors fit"
            )

    def _check_layout(self) -> None:
        """Checks that only fields of this layout differ from their defaults."""
        check_choice("network layout", self.layout, get_args(Layout))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _FIXED[self.layout] and value != field.default:
                raise ValueError(
                    f"network {field.name} must be {field.default!r} in layout {self.layout!r}, got {shorten(value)}; "
                    "leave it out or change the layout"
                )
        if self.layout == "taming":
            check_integer("network latent_channels of layout 'taming'", self.latent_channels, "[1, 65536]")
            for level in self.attention_levels:
                check_integer("network attention_levels", level, f"[0, {len(self.channel_multipliers) - 1}]")

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level, from full resolution down."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def is_signed(self) -> bool:
        """A flag: True if images are in [-1, 1] inside the network."""
        return self.layout != "maskgit" and self.signed_images

    @property
    def head_channels(self) -> int:
        """The channels of the encoder's head and of the decoder's stem: D, or ``latent_channels`` if it is given."""
        return self.latent_channels or self.code_dim

    @property
    def num_blocks(self) -> int:
        """The number of residual blocks of the encoder, each with several tensors."""
        return len(self.channel_multipliers) * self.num_res_blocks + self.num_middle_blocks

    @property
    def downsampling_factor(self) -> int:
        """The side in pixels of the square that a token covers."""
        return int(self.patch_size * 2 ** (len(self.channel_multipliers) - 1))

    @property
    def side_unit(self) -> int:
        """The number of pixels that divides both sides of an image."""
        return self.patch_size if self.layout == "maskgit" else self.downsampling_factor

    def grid(self, image_size: ImageSize) -> tuple[int, int]:
        """Returns the rows and columns (h, w) of the token grid of an image.

        Args:
            image_size: Side of a square image, or (height, width), in pixels.
        """
        name, unit = "patch_size" if self.layout == "maskgit" else "the downsampling factor", self.side_unit
        height, width = height_width(image_size)
        for size in (height, width):
            if size < 1 or size % unit:
                lower = max(size - size % unit, 0)
                fitting = f"{lower} or {lower + unit}" if lower else unit
                raise ValueError(f"image size must be a positive multiple of {name} {unit}, got {size}; use {fitting}")
        # Rounded up: the encoder pads, and the decoder's surplus pixels are cut off.
        return -(-height // self.downsampling_factor), -(-width // self.downsampling_factor)


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


class VQGAN(nn.Module):
    """The tokenizer's network: encoder, quantizer and decoder.

    Source: Esser et al., arXiv:2012.09841; the architecture is that of the released MaskGIT code, or of
    taming-transformers in layout ``taming``, and Open-MAGVIT2's in layout ``magvit2``.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        spec = quantizers.build(config.quantizer)
        self.quantizer = spec.create(codebook_size=config.codebook_size, code_dim=config.code_dim)
        self.decoder = Decoder(config)
        # After all draws, so that the scale changes no random number.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(config.initial_scale)

    def forward(self, images: Tensor) -> VQGANOutput:
        """Reconstructs images (B, C, H, W) float in [0, 1] for training."""
        # The grid is rounded up, so the reconstruction may be larger than the images.
        features = self.encoder(images)
        quantized = self.quantizer(features)
        reconstruction = self.decoder(quantized.quantized)[..., : images.shape[-2], : images.shape[-1]]
        return VQGANOutput(reconstruction, quantized, features)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W) float in [0, 1] to tokens (B, N) int64 in [0, K), raster order."""
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


class Encoder(nn.Module):
    """The encoder: a stem, levels of residual blocks that halve the resolution, middle blocks, a head."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        last, is_taming = config.widths[-1], config.layout == "taming"
        self.config = config
        # Space to depth turns each patch into channels.
        self.stem = conv(config.in_channels * config.patch_size**2, config.base_channels, 3, bias=is_taming)
        self.blocks = nn.Sequential(*_encoder_blocks(config))
        self.norm = group_norm(last, config)
        self.activation = _activation(config)
        self.head = conv(last, config.head_channels, 3 if is_taming else 1, bias=True)
        self.projection = conv(config.head_channels, config.code_dim, 1, bias=True) if is_taming else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features (B, D, h, w) of images (B, C, H, W) float in [0, 1]."""
        config = self.config
        if config.layout != "maskgit":  # whose strides pad, and drop no pixels
            config.grid((images.shape[-2], images.shape[-1]))
        x = 2 * images - 1 if config.is_signed else images
        # (B, C p^2, H / p, W / p) with patches of size p, then one level after another.
        x = F.pixel_unshuffle(x, config.patch_size) if config.patch_size > 1 else x
        x = self.blocks(self.stem(x))
        out: Tensor = self.projection(self.head(self.activation(self.norm(x))))
        return out


class Decoder(nn.Module):
    """The decoder: a stem, middle blocks, levels of residual blocks up to full resolution, a 3x3 head."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        first, last, is_taming = config.widths[-1], config.widths[0], config.layout == "taming"
        self.config = config
        self.projection = conv(config.code_dim, config.head_channels, 1, bias=True) if is_taming else nn.Identity()
        self.stem = conv(config.head_channels, first, 3, bias=True)
        self.blocks = nn.Sequential(*_decoder_blocks(config))
        self.norm = group_norm(last, config)
        self.activation = _activation(config)
        self.patches = nn.Sequential(*_patch_blocks(config))
        channels = last if config.patch_size == 1 else _PATCH_CHANNELS
        self.head = conv(channels, config.in_channels, 3, bias=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Returns the images (B, C, H, W), not clipped, of codes (B, D, h, w)."""
        x = self.stem(self.projection(codes))
        for block in self.blocks:
            x = block(x, codes) if isinstance(block, AdaptiveGroupNorm) else block(x)
        out: Tensor = self.head(self.patches(self.activation(self.norm(x))))
        return (out + 1) / 2 if self.config.is_signed else out


def _encoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields levels from full resolution down, with a downsampling between two levels, then the middle blocks."""
    width = config.base_channels
    for level, out in enumerate(config.widths):
        if level > 0:
            yield _downsample(width, config)
        yield from _level(width, out, config, level=level, blocks=config.num_res_blocks)
        width = out
    yield from _middle(width, config)


def _decoder_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the middle blocks, then levels up to full resolution, with an upsampling between two levels."""
    width = config.widths[-1]
    yield from _middle(width, config)
    blocks = config.num_res_blocks + (config.layout == "taming")
    for level, out in reversed(list(enumerate(config.widths))):
        if config.layout == "magvit2":
            yield AdaptiveGroupNorm(width, config)
        yield from _level(width, out, config, level=level, blocks=blocks)
        width = out
        if level > 0:
            yield ShuffleUpsample(width) if config.layout == "magvit2" else Upsample(width)


def _patch_blocks(config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the upsamplings from patches to pixels, each to half of the channels of the one before."""
    width, size = config.widths[0], config.patch_size
    while size > 1:
        size //= 2
        yield PatchUpsample(width, _PATCH_CHANNELS * size)
        yield _activation(config)
        width = _PATCH_CHANNELS * size


def _level(width: int, out: int, config: VQGANConfig, *, level: int, blocks: int) -> Iterator[nn.Module]:
    """Yields the blocks of a level, each with its self-attention if the level has it."""
    for block in range(blocks):
        # The first block of a level changes the number of channels.
        yield ResidualBlock(width if block == 0 else out, out, config)
        if level in config.attention_levels:
            yield SelfAttention(out, config)


def _middle(width: int, config: VQGANConfig) -> Iterator[nn.Module]:
    """Yields the middle blocks, in layout ``taming`` with self-attention after the first of two."""
    for block in range(config.num_middle_blocks):
        yield ResidualBlock(width, width, config)
        if block == 0 and config.layout == "taming" and config.middle_attention:
            yield SelfAttention(width, config)


def _downsample(channels: int, config: VQGANConfig) -> nn.Module:
    if config.layout == "magvit2":
        return conv(channels, channels, 3, bias=True, stride=2)
    if config.layout == "taming" or config.downsampling == "strided-3x3":
        return Downsample(channels, 3)
    if config.downsampling == "strided":
        return Downsample(channels, 4)
    # At odd sizes the last window holds fewer pixels and is divided by their number, as "SAME" mean pooling does.
    return nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)


def _activation(config: VQGANConfig) -> nn.Module:
    return nn.SiLU() if config.activation == "swish" else nn.ReLU()


def to_unit_range(images: Tensor) -> Tensor:
    """Converts uint8 pixels in [0, 255] to float32 in [0, 1], as ``VQGAN`` takes them."""
    return images.to(torch.float32, copy=True).div_(255)  # in place: half the time of another tensor


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


def group_norm(channels: int, config: VQGANConfig, *, affine: bool = True) -> nn.GroupNorm:
    """Builds a GroupNorm with the epsilon of the released weights."""
    return nn.GroupNorm(config.num_groups, channels, eps=_NORM_EPSILON, affine=affine)


class ResidualBlock(nn.Module):
    """A residual block: norm, activation, 3x3 convolution, twice, plus a shortcut.

    If the number of channels changes, the input passes through a 1x1 convolution. The released code applies
    it to the *output* of the two convolutions instead and drops the input: f(x) + conv(f(x)).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        config: Groups of the norms, activation and layout.
    """

    def __init__(self, in_channels: int, out_channels: int, config: VQGANConfig) -> None:
        super().__init__()
        bias = config.layout == "taming"
        self.keeps_input = config.layout != "maskgit"
        self.norm1 = group_norm(in_channels, config)
        self.conv1 = conv(in_channels, out_channels, 3, bias=bias)
        self.norm2 = group_norm(out_channels, config)
        self.conv2 = conv(out_channels, out_channels, 3, bias=bias)
        source = in_channels if self.keeps_input else out_channels
        self.shortcut = conv(source, out_channels, 1, bias=bias) if in_channels != out_channels else None
        self.activation = _activation(config)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the features (B, out_channels, h, w) of x (B, in_channels, h, w)."""
        hidden = self.conv1(self.activation(self.norm1(x)))
        hidden = self.conv2(self.activation(self.norm2(hidden)))
        if self.shortcut is not None:
            x = self.shortcut(x if self.keeps_input else hidden)
        out: Tensor = hidden + x
        return out


class Downsample(nn.Module):
    """A convolution of stride 2 with "SAME" padding, which gives half the resolution, rounded up.

    It pads (1, 1) at even and (1, 2) at odd sizes with a 4x4 kernel, (0, 1) and (1, 1) with a 3x3 kernel.

    Args:
        channels: Channels of input and output.
        kernel: 4 or 3.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        # The convolution itself pads what both sides have at any size.
        self.conv = conv(channels, channels, kernel, bias=True, stride=2, padding=kernel - 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at half the resolution."""
        odd_rows, odd_columns = x.shape[-2] % 2, x.shape[-1] % 2
        is_padded = self.conv.padding != (0, 0)
        pads = (0, odd_columns, 0, odd_rows) if is_padded else (odd_columns, 1, odd_rows, 1)
        out: Tensor = self.conv(F.pad(x, pads))
        return out


class Upsample(nn.Module):
    """An upsampling by 2 (nearest neighbour), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at twice the resolution, (B, channels, 2 h, 2 w)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class PatchUpsample(nn.Module):
    """An upsampling by 2 (nearest neighbour), then a 3x3 convolution, calculated as one convolution before it.

    The 3x3 pixels around each of the 2x2 places of a patch lie in 3x3 patches, so each place has a 3x3 kernel over
    patches: sums of the taps of the one kernel. Kernels of their own, as in ``ShuffleUpsample``, can draw a pattern of
    2 pixels on an even area, which an adversarial loss rewards; these cannot.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, in_channels, h, w) at twice the resolution, (B, out_channels, 2 h, 2 w)."""
        weight, index = self.conv.weight, torch.arange(3, device=x.device)
        patch = (index[:2, None] + index + 1) // 2  # (2, 3): of 3 patches, that of each tap at each place
        taps = (patch[..., None] == index).to(weight.dtype)
        kernels = torch.einsum("aui,bvj,ocuv->oabcij", taps, taps, weight).flatten(0, 2)
        assert self.conv.bias is not None
        return F.pixel_shuffle(F.conv2d(x, kernels, self.conv.bias.repeat_interleave(4), padding=1), 2)


class ShuffleUpsample(nn.Module):
    """An upsampling by 2: a 3x3 convolution to four times the channels, then depth to space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, 4 * channels, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (B, channels, h, w) at twice the resolution, (B, channels, 2 h, 2 w)."""
        return F.pixel_shuffle(self.conv(x), 2)


class SelfAttention(nn.Module):
    """Self-attention with one head over all places: x + output(softmax(q k / sqrt(channels)) v), q, k, v of norm(x).

    Args:
        channels: Channels of input and output.
        config: Groups of the norm.
    """

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = group_norm(channels, config)
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
        config: Groups of the norm, and size of a code.
    """

    def __init__(self, channels: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = group_norm(channels, config, affine=False)
        self.gamma = nn.Linear(config.code_dim, channels)
        self.beta = nn.Linear(config.code_dim, channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Returns x (B, channels, h', w') normalised, with the scale and the shift of codes (B, D, h, w)."""
        rows = codes.flatten(2)  # (B, D, N)
        # One place has no unbiased variance.
        deviation = (rows.var(-1, correction=min(1, rows.shape[-1] - 1)) + _NORM_EPSILON).sqrt()
        scale, shift = self.gamma(deviation), self.beta(rows.mean(-1))
        out: Tensor = self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return out

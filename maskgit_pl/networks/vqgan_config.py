"""The sizes of the tokenizer's network, checked. Recipes and pretrained folders hold them under these names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from maskgit_pl.checks import (
    ImageSize,
    check_channels,
    check_choice,
    check_integer,
    check_number,
    height_width,
    shorten,
)
from maskgit_pl.networks.quantizers import build_sized

__all__ = ["Activation", "Downsampling", "Layout", "VQGANConfig"]

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
    "patch_size": "[1, 64]",
}
_MAX_LEVELS = 12  # the resolution is halved 11 times
_ONLY_OF_TAMING = ("attention_levels", "middle_attention", "latent_channels", "signed_images")
_ONLY_OF_MASKGIT = ("downsampling", "activation", "patch_size")
_FIXED = {  # layout -> fields that keep their defaults
    "maskgit": _ONLY_OF_TAMING,
    "taming": ("num_middle_blocks", *_ONLY_OF_MASKGIT),
    "magvit2": (*_ONLY_OF_TAMING, *_ONLY_OF_MASKGIT),
}


@dataclass(frozen=True)
class VQGANConfig:
    """The sizes of the network. The defaults are the released ImageNet tokenizer's.

    Attributes:
        in_channels: C, channels of an image: 1 or 3.
        base_channels: Channels of the first level.
        channel_multipliers: Channels of each level as a multiple of ``base_channels``; each level has half the
            resolution of the one before.
        num_res_blocks: Number of residual blocks of each level.
        num_middle_blocks: Number of residual blocks after the encoder's last and before the decoder's first level.
        downsampling: ``average``: 2x2 mean; ``strided``: 4x4 convolution of stride 2; ``strided-3x3``: 3x3
            convolution of stride 2, as in MaskBit (arXiv:2409.16211).
        activation: ``swish`` or ``relu``.
        num_groups: Number of groups of each GroupNorm; divides the channels of every level.
        codebook_size: K, number of codes.
        code_dim: D, size of a code.
        patch_size: Factor of space to depth before the first convolution and of depth to space after the last one.
            1 (released code) does neither; 2 or more makes the network cheaper by its square.
        quantizer: Name or mapping of a registered quantizer.
        initial_scale: Factor of the initial convolution weights, in (0, 1000]. 1 is the released LeCun normal; 0.577
            gives the variance of torch's default, with which short runs learn faster.
        layout: ``maskgit``: the released MaskGIT code's; ``taming``: that of taming-transformers and LlamaGen, with
            biases, self-attention and one more block at each level of the decoder. ``taming`` fixes
            ``num_middle_blocks``, ``downsampling``, ``activation`` and ``patch_size``; image sizes
            are multiples of the downsampling factor. ``magvit2``: that of Open-MAGVIT2, without self-attention, whose
            decoder has norms that depend on the codes; it fixes ``downsampling``, ``activation`` and ``patch_size``,
            and has the same image sizes.
        attention_levels: Levels (0: full resolution) with self-attention after each block; layout ``taming`` only.
        middle_attention: True for self-attention between the two middle blocks; layout ``taming`` only. False is the
            tokenizer of aMUSEd (arXiv:2401.01808).
        latent_channels: Channels between the last 3x3 and the 1x1 convolution before the codes; required by layout
            ``taming``, and for it only.
        signed_images: True: images are in [-1, 1] inside; False: in [0, 1], as the tokenizer of aMUSEd needs; layout
            ``taming`` only.

    Raises:
        ValueError: if a size is out of range, the channels of a level are not divisible by ``num_groups``, the
            quantizer is unknown or does not fit ``codebook_size`` and ``code_dim``, or the layout does not support a
            value.

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
        if not 1 <= len(self.channel_multipliers) <= _MAX_LEVELS:
            raise ValueError(
                f"network channel_multipliers must be 1 to {_MAX_LEVELS} integers, one a level, got "
                f"{shorten(self.channel_multipliers)}"
            )
        for multiplier in self.channel_multipliers:
            check_integer("network channel_multipliers", multiplier, "[1, 1024]")
        for width in self.widths:
            if width % self.num_groups:
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
            self._check_taming()

    def _check_taming(self) -> None:
        for name in ("middle_attention", "signed_images"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"network {name} must be true or false, got {shorten(getattr(self, name))}")
        check_integer("network latent_channels of layout 'taming'", self.latent_channels, "[1, 65536]")
        levels, known = self.attention_levels, range(len(self.channel_multipliers))
        if len(set(levels)) < len(levels) or any(level not in known for level in levels):
            raise ValueError(
                f"network attention_levels must be different levels out of {list(known)}, 0 being full resolution, "
                f"got {shorten(list(levels))}"
            )

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

        Raises:
            ValueError: if the size is not a positive multiple of ``patch_size`` or, in layouts ``taming`` and
                ``magvit2``, of the downsampling factor: their strides would drop the remaining pixels.
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

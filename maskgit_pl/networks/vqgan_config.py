"""Every size of the tokenizer's network, checked; recipes and pretrained folders hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from maskgit_pl.checks import check_choice, check_integer, check_number, shorten
from maskgit_pl.networks.quantizers import quantizers

__all__ = ["Activation", "Downsampling", "Layout", "VQGANConfig"]

Downsampling = Literal["average", "strided"]
Activation = Literal["swish", "relu"]
Layout = Literal["maskgit", "taming"]

_RANGES = {  # well beyond any network that exists: what is larger is a mistake, or meant to fill the memory
    "in_channels": "[1, 1024]",
    "channels": "[1, 16384]",
    "blocks_per_level": "[1, 64]",
    "middle_blocks": "[0, 64]",
    "groups": "[1, 16384]",
    "num_codes": "[2, 16777216]",
    "code_width": "[1, 65536]",
    "patch_size": "[1, 64]",
}
_MOST_LEVELS = 12  # the resolution is halved 11 times
_FIXED_BY_TAMING = ("middle_blocks", "downsampling", "activation", "patch_size")
_OF_TAMING_ALONE = ("attention_levels", "latent_width")


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
        layout: ``maskgit``: the released MaskGIT code's; ``taming``: that of taming-transformers and LlamaGen, with
            biases, self-attention and one more block on each level of the decoder. ``taming`` fixes ``middle_blocks``,
            ``downsampling``, ``activation`` and ``patch_size``; its images are multiples of the downsampling factor.
        attention_levels: Levels whose blocks are each followed by self-attention, 0 being full resolution; ``taming``
            alone, whose middle has self-attention in any case.
        latent_width: Channels between the last 3x3 and the 1x1 convolution before the codes; ``taming`` needs it.

    Raises:
        ValueError: if a size is out of range, a width is not divisible by ``groups``, the quantizer is unknown, or the
            layout does not have what is asked for.

    Source: released code, config and modules of the 256 and 512 px tokenizer; ``taming``: CompVis/taming-transformers,
    modules/diffusionmodules/model.py, and FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py.
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
    layout: Layout = "maskgit"
    attention_levels: tuple[int, ...] = ()
    latent_width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        self._check_sizes()
        self._check_layout()
        check_choice("network downsampling", self.downsampling, get_args(Downsampling))
        check_choice("network activation", self.activation, get_args(Activation))
        check_number("network initial_scale", self.initial_scale, "(0, 1000]")
        quantizers.build(self.quantizer)

    def _check_sizes(self) -> None:
        for name, interval in _RANGES.items():
            check_integer(f"network {name}", getattr(self, name), interval)
        if not 1 <= len(self.multipliers) <= _MOST_LEVELS:
            raise ValueError(
                f"network multipliers must be 1 to {_MOST_LEVELS} integers, one a level, got "
                f"{shorten(self.multipliers)}"
            )
        for multiplier in self.multipliers:
            check_integer("network multipliers", multiplier, "[1, 1024]")
        for width in self.widths:
            if width % self.groups:
                raise ValueError(
                    f"network groups: every width {self.widths} (channels x multipliers) must be a multiple of the "
                    f"number of groups, got {self.groups}; {math.gcd(*self.widths)} and its divisors fit"
                )

    def _check_layout(self) -> None:
        check_choice("network layout", self.layout, get_args(Layout))
        others = _FIXED_BY_TAMING if self.layout == "taming" else _OF_TAMING_ALONE
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in others and value != field.default:
                raise ValueError(
                    f"network {field.name} must be {field.default!r} in layout {self.layout!r}, got {shorten(value)}; "
                    "leave it out or change the layout"
                )
        if self.layout == "taming":
            self._check_taming()

    def _check_taming(self) -> None:
        check_integer("network latent_width of layout 'taming'", self.latent_width, "[1, 65536]")
        levels, known = self.attention_levels, range(len(self.multipliers))
        if len(set(levels)) < len(levels) or any(level not in known for level in levels):
            raise ValueError(
                f"network attention_levels must be different levels out of {list(known)}, 0 being full resolution, "
                f"got {shorten(list(levels))}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def num_blocks(self) -> int:
        """Residual blocks of the encoder, of which each has several tensors."""
        return len(self.multipliers) * self.blocks_per_level + self.middle_blocks

    @property
    def downsampling_factor(self) -> int:
        """Pixels along an edge of what one token covers."""
        return int(self.patch_size * 2 ** (len(self.multipliers) - 1))

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns (h, w) of the token grid of an image.

        Args:
            image_size: Edge of a square image, or (height, width), in pixels.

        Raises:
            ValueError: if the size is not a positive multiple of ``patch_size`` or, in layout ``taming``, of
                the downsampling factor: what its strides leave over would be lost.
        """
        name, unit = (
            ("the downsampling factor", self.downsampling_factor)
            if self.layout == "taming"
            else ("patch_size", self.patch_size)
        )
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for size in (height, width):
            if size < 1 or size % unit:
                raise ValueError(f"image size must be a positive multiple of {name} {unit}, got {size}")
        return -(-height // self.downsampling_factor), -(-width // self.downsampling_factor)

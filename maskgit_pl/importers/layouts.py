"""The layout of a released tokenizer: how to recognise it, and how to read its sizes and its weights.

Used by ``importers.tokenizers``; ``importers.taming``, ``importers.maskbit`` and ``importers.magvit2`` define layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maskgit_pl.importers.torch_file import name_some
from maskgit_pl.networks.skeleton import skeletons
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig

__all__ = [
    "CODEBOOK",
    "LevelNames",
    "TokenizerLayout",
    "count_numbers",
    "read_bits",
    "read_shape",
    "read_widths",
    "tokenizer_weights",
]

CODEBOOK = "quantize.embedding.weight"
"""The codebook, by the name that all projects with a table of codes give it."""
_MAX_BITS = 24  # the largest codebook that a configuration accepts


def _is_the_network_itself(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


def _needs_no_change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights


@dataclass(frozen=True)
class TokenizerLayout:
    """The layout of the tokenizers of a project.

    Attributes:
        name: Name of the project.
        is_marked: True if the tensors' names are those of this layout.
        read_config: Reads the sizes of the network off the shapes of the tensors; the second argument is the content
            of ``config.json`` beside the file, empty if there is none.
        names: Returns the project's name of each tensor of our network, for its sizes and our names.
        others: Names of tensors that are not part of the network; a name that ends in a dot is a beginning.
        prepare: Returns the tensors under today's names and with the axes of a convolution.
        convert: Converts float32 tensors by our names to the state dict of our network.
        codes: Tensors of the quantizer, of which a file has at least one; empty if no tensor tells its kind.
        has_average: True if the project evaluates the averaged weights, where a file has them.
    """

    name: str
    is_marked: Callable[[Mapping[str, Tensor]], bool]
    read_config: Callable[[Mapping[str, Tensor], Mapping[str, Any]], VQGANConfig]
    names: Callable[[VQGANConfig, tuple[str, ...]], dict[str, str]]
    others: tuple[str, ...]
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _is_the_network_itself
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _needs_no_change
    codes: tuple[str, ...] = (CODEBOOK,)
    has_average: bool = False


@dataclass(frozen=True)
class LevelNames:
    """The names that a project gives to the parts of a network without self-attention, and its sizes.

    The encoder's levels are ``encoder.down.0``, ..., and the decoder's ``decoder.up.0``, ...

    Attributes:
        block: Name of the residual blocks of a level.
        middle: Name of the residual blocks of the middle.
        downsample: Name of the convolution at the end of a level of the encoder.
        upsample: Name of the convolution at the end of a level of the decoder.
        norm: Name of the norms at the beginning of the decoder's levels; None if it has none.
        lowest_first: True if the decoder's levels are numbered in the order in which they run, from the lowest
            resolution.
    """

    block: str
    middle: str
    downsample: str
    upsample: str
    norm: str | None = None
    lowest_first: bool = False

    def read_sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Reads the fields of a ``VQGANConfig`` that tell the sizes of encoder and decoder.

        Raises:
            ValueError: if a tensor is missing, or a level is no multiple of the first convolution.
        """
        levels = [f"encoder.down.{level}" for level in range(count_numbers(tensors, "encoder.down."))]
        channels, multipliers = read_widths(
            tensors, "encoder.conv_in.weight", [f"{level}.{self.block}.0.conv1.weight" for level in levels]
        )
        return {
            "in_channels": read_shape(tensors, "encoder.conv_in.weight", axes=4)[1],
            "base_channels": channels,
            "channel_multipliers": multipliers,
            "num_res_blocks": count_numbers(tensors, f"{levels[0]}.{self.block}."),
            "num_middle_blocks": count_numbers(tensors, f"encoder.{self.middle}."),
        }

    def of(self, config: VQGANConfig, ours: tuple[str, ...]) -> dict[str, str]:
        """Returns the project's name of each of our tensors, such as ``decoder.blocks.3.conv1.weight``."""
        places = {
            f"{half}.blocks.{number}": f"{half}.{place}"
            for half, found in (("encoder", self._encoder(config)), ("decoder", self._decoder(config)))
            for number, place in enumerate(found)
        }
        return {name: _name(name, places) for name in ours}

    def _encoder(self, config: VQGANConfig) -> Iterator[str]:
        """Yields the project's names of our encoder's blocks, in their order."""
        last = len(config.channel_multipliers) - 1
        for level in range(last + 1):
            yield from (f"down.{level}.{self.block}.{block}" for block in range(config.num_res_blocks))
            if level < last:
                yield f"down.{level}.{self.downsample}"
        yield from (f"{self.middle}.{block}" for block in range(config.num_middle_blocks))

    def _decoder(self, config: VQGANConfig) -> Iterator[str]:
        """Yields the project's names of our decoder's blocks, in their order."""
        yield from (f"{self.middle}.{block}" for block in range(config.num_middle_blocks))
        last = len(config.channel_multipliers) - 1
        for level in range(last, -1, -1):
            number = last - level if self.lowest_first else level
            if self.norm:
                yield f"{self.norm}.{number}"
            yield from (f"up.{number}.{self.block}.{block}" for block in range(config.num_res_blocks))
            if level > 0:
                yield f"up.{number}.{self.upsample}"


_OUTER = {"stem": "conv_in", "norm": "norm_out", "head": "conv_out"}  # our layers outside the levels -> theirs


def _name(name: str, places: Mapping[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    part, _, inner = layer.rpartition(".")
    if layer == "quantizer":
        return CODEBOOK
    if layer in places or inner == "conv":  # a sampling, whose only layer is a convolution
        return f"{places[layer if layer in places else part]}.{kind}"
    if part in places:
        return f"{places[part]}.{'nin_shortcut' if inner == 'shortcut' else inner}.{kind}"
    return f"{part}.{_OUTER[inner]}.{kind}"


def tokenizer_weights(tensors: Mapping[str, Tensor], config: VQGANConfig, layout: TokenizerLayout) -> dict[str, Tensor]:
    """Converts prepared tensors to the state dict of our ``VQGAN``, float32.

    Args:
        tensors: Tensors of the network by the project's names.
        config: Sizes of the network.
        layout: Layout of the tensors.

    Raises:
        ValueError: if a tensor is missing, superfluous, or has another shape than ``config`` implies.
    """
    # The names and shapes of our network, without memory.
    with skeletons():
        own = {name: tensor.shape for name, tensor in VQGAN(config).state_dict().items()}
    names = layout.names(config, tuple(own))
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise ValueError(f"tensors are missing: {name_some(missing)}")
    left_over = tensors.keys() - set(names.values())
    if left_over:
        raise ValueError(f"tensors are not in the network: {name_some(sorted(left_over))}")
    for ours, theirs in names.items():
        if tensors[theirs].shape != own[ours]:
            got = tuple(tensors[theirs].shape)
            raise ValueError(f"tensor {theirs} must have shape {tuple(own[ours])}, got {got}")
    return layout.convert({ours: tensors[theirs].float() for ours, theirs in names.items()})


def count_numbers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of different numbers that follow a prefix in the names of the tensors."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def read_shape(tensors: Mapping[str, Tensor], name: str, *, axes: int) -> tuple[int, ...]:
    """Returns the shape of a tensor.

    Raises:
        ValueError: if there is no such tensor, or it has another number of axes.
    """
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes:
        raise ValueError(f"tensor {name} must have {axes} axes, got shape {shape}")
    return shape


def read_bits(tensors: Mapping[str, Tensor]) -> int:
    """Returns the number of bits of a token, the number of channels of the encoder's last convolution.

    Raises:
        ValueError: if there is no such tensor, or the codebook would be too large.
    """
    bits = read_shape(tensors, "encoder.conv_out.weight", axes=4)[0]
    if not 1 <= bits <= _MAX_BITS:
        raise ValueError(f"tensor encoder.conv_out.weight must have 1 to {_MAX_BITS} rows, one a bit, got {bits}")
    return bits


def read_widths(tensors: Mapping[str, Tensor], first: str, blocks: list[str]) -> tuple[int, tuple[int, ...]]:
    """Reads the channels of the first convolution, and those of each level as multiples of it.

    Args:
        tensors: Tensors by the project's names.
        first: Name of the first convolution's weight.
        blocks: Name of the weight of the first convolution of each level.

    Raises:
        ValueError: if a tensor is missing, there is no level, or a level is no multiple of the first convolution.
    """
    if not blocks:
        raise ValueError("tensors are missing: those of the levels of the encoder")
    channels = read_shape(tensors, first, axes=4)[0]
    widths = [read_shape(tensors, name, axes=4)[0] for name in blocks]
    if not channels or any(width % channels for width in widths):
        raise ValueError(
            f"channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return channels, tuple(width // channels for width in widths)

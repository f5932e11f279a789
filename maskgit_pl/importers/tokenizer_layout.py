"""The layout of a released tokenizer: how to recognise it, and how to read its sizes and its weights.

Used by ``importers.tokenizers``; ``importers.taming``, ``importers.maskbit`` and ``importers.magvit2`` define layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.importers.torch_file import name_some
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig

__all__ = [
    "CODEBOOK",
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
    with torch.device("meta"):
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
        ValueError: if a tensor is missing, or a level is no multiple of the first convolution.
    """
    channels = read_shape(tensors, first, axes=4)[0]
    widths = [read_shape(tensors, name, axes=4)[0] for name in blocks]
    if not channels or any(width % channels for width in widths):
        raise ValueError(
            f"channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return channels, tuple(width // channels for width in widths)

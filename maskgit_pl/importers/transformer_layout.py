"""The layout of a released transformer: how to recognise it, and how to read its sizes and its weights.

Used by ``importers.transformers``; ``importers.halton`` and ``importers.maskgil`` define the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.torch_file import name_some
from maskgit_pl.networks.backbone import BackboneConfig

__all__ = ["TransformerLayout", "check_shapes", "count_blocks", "find_num_heads", "shape_of"]


@dataclass(frozen=True)
class TransformerLayout:
    """The layout of the transformers of a project.

    Args:
        name: Name of the project.
        markers: Tensors that tell this layout from others.
        tied: Tensor that must equal another one, and that other one; None if there is no such pair.
        read_config: Reads the sizes of the network off the tensors; the arguments are the tensors, the grid of the
            tokenizer (rows, columns), and the number of attention heads or None.
        shapes: Returns the names and shapes of all tensors of a network.
        read_weights: Converts tensors of these names and shapes to the state dict of our network.
        decoding: Returns the decoding settings that the project publishes for a network.
    """

    name: str
    markers: tuple[str, ...]
    tied: tuple[str, str] | None
    read_config: Callable[[Mapping[str, Tensor], tuple[int, int], int | None], BackboneConfig]
    shapes: Callable[[BackboneConfig], dict[str, tuple[int, ...]]]
    read_weights: Callable[[Mapping[str, Tensor], BackboneConfig], dict[str, Tensor]]
    decoding: Callable[[BackboneConfig], DecodingConfig]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Returns the shape of a matrix.

    Raises:
        ValueError: if there is no such tensor, or it is not a matrix with elements.
    """
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"tensor {name} must be a matrix, got shape {shape}")
    return shape[0], shape[1]


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of blocks, whose numbers follow ``prefix`` in the names of the tensors."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def find_num_heads(given: int | None, published: int | None, *, embed_dim: int, depth: int) -> int:
    """Returns the number of attention heads, which no shape of a tensor tells.

    Args:
        given: The number that the user names, or None.
        published: The number of the published network of this size, or None if there is none.
        embed_dim: D of the network, for the message.
        depth: Number of blocks, for the message.

    Raises:
        ValueError: if neither number is known.
    """
    if given is not None:
        return given
    if published is None:
        raise ValueError(
            f"the number of attention heads must be given for a network of {depth} blocks of size {embed_dim}, as no "
            "tensor tells it and no published network has this size; add --num-heads"
        )
    return published


def check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that tensors have exactly the names and shapes of a network.

    Raises:
        ValueError: if a tensor is missing, superfluous, or of another shape.
    """
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"tensors are missing: {name_some(missing)}")
    left_over = sorted(tensors.keys() - wanted.keys())
    if left_over:
        raise ValueError(f"tensors are not in the network: {name_some(left_over)}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"tensor {name} must have shape {shape}, got {tuple(tensors[name].shape)}")

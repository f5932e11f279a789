"""Tables of names: convert tensors of another project to the state dict of our network.

A project is a list of ``Rule``. ``convert`` compares the names and shapes of a file with those that follow from our
network, which is built without memory, before it takes memory for a tensor. The other functions read the sizes of a
network off the shapes of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.importers.checkpoints import name_some

__all__ = ["Rule", "convert", "count_numbers", "number_rules", "read_widths", "shape_of", "shapes_of"]


@dataclass(frozen=True)
class Rule:
    """A rule that makes tensors of ours from tensors of another project.

    The rows of theirs, in their order, are the rows of ours. Names are separated by spaces.

    Attributes:
        ours: Names of one or more of our tensors.
        theirs: Names of one or more tensors of the project, all of one shape.
        axes: Pattern of einops from the axes of each of theirs to ours; empty if they are the same.
    """

    ours: str
    theirs: str
    axes: str = ""


def number_rules(rules: Iterable[Rule], depth: int) -> list[Rule]:
    """Returns rules for a network of ``depth`` blocks: one with ``{}`` in its names stands for every block."""
    return [
        Rule(rule.ours.replace("{}", str(number)), rule.theirs.replace("{}", str(number)), rule.axes)
        for rule in rules
        for number in range(depth if "{}" in rule.ours else 1)
    ]


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a network, which may be without memory."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def convert(
    tensors: Mapping[str, Tensor], rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], **axes: int
) -> dict[str, Tensor]:
    """Converts tensors by rules.

    Args:
        tensors: Tensors of a network by the project's names.
        rules: The table of the project; rules of tensors that our network does not have are not applied.
        shapes: Shape of each of our tensors.
        axes: Sizes of axes that patterns name.

    Returns:
        float32 tensors by our names. They share memory with ``tensors`` where nothing had to change.

    Raises:
        ValueError: if a tensor is missing, superfluous or of another shape.
    """
    rules = [rule for rule in rules if all(name in shapes for name in rule.ours.split())]
    _check_shapes(tensors, {name: shape for rule in rules for name, shape in _their_shapes(rule, shapes, axes)})
    weights: dict[str, Tensor] = {}
    for rule in rules:
        parts = [tensors[name].float() for name in rule.theirs.split()]
        if rule.axes:
            parts = [rearrange(part, rule.axes, **_named_in(rule, axes)) for part in parts]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        names = rule.ours.split()
        if len(names) == 1:
            weights[names[0]] = rows.contiguous()
        else:  # copies, as a file of weights cannot hold two views of one tensor
            sizes = [shapes[name][0] for name in names]
            weights |= {name: part.clone() for name, part in zip(names, torch.split(rows, sizes), strict=True)}
    return weights


def count_numbers(names: Iterable[str], prefix: str) -> int:
    """Returns the number of different numbers that follow a prefix in names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    return len({match[1] for name in names if (match := pattern.match(name))})


def shape_of(tensors: Mapping[str, Any], name: str, axes: int = 2) -> tuple[int, ...]:
    """Returns the shape of a tensor from which a size is read.

    Raises:
        ValueError: if there is no such tensor, or it has another number of axes or no element.
    """
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}, which tells a size of the network")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or not all(shape):
        raise ValueError(f"tensor {name} must have {axes} axes of sizes >= 1, got shape {shape}")
    return shape


def read_widths(channels: int, widths: list[int]) -> tuple[int, ...]:
    """Returns the channels of each level as multiples of those of the first convolution.

    Raises:
        ValueError: if there is no level, or a level is no multiple.
    """
    if not widths or any(width % channels for width in widths):
        raise ValueError(
            f"channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return tuple(width // channels for width in widths)


def _their_shapes(
    rule: Rule, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]
) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the names and shapes of the tensors that a rule reads: the pattern, backwards."""
    ours, theirs = rule.ours.split(), rule.theirs.split()
    shape = (sum(shapes[name][0] for name in ours) // len(theirs), *shapes[ours[0]][1:])
    if rule.axes:
        before, after = rule.axes.split(" -> ")
        shape = tuple(
            rearrange(torch.empty(shape, device="meta"), f"{after} -> {before}", **_named_in(rule, axes)).shape
        )
    return [(name, shape) for name in theirs]


def _named_in(rule: Rule, axes: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in axes.items() if name in rule.axes}


def _check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that tensors have exactly these names and shapes; one message lists all differences."""
    differences = {
        "missing": [name for name in wanted if name not in tensors],
        "not in the network": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {shape}"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    found = [f"{kind}: {name_some(names)}" for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"tensors must have the names and shapes of the network, got {'; '.join(found)}")

"""Initial weights for fine-tuning a pretrained transformer on other classes or another grid. ``TokenModel`` uses them.

A backbone declares its tables with a row for each id, class or token (``Backbone.vocabulary_tables``). All other
tensors are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskgit_pl.networks.backbone import Backbone, BackboneConfig
from maskgit_pl.networks.skeleton import skeletons
from maskgit_pl.pipeline.networks import PretrainedTransformer

__all__ = ["resize_positions", "weights_for"]


def weights_for(config: BackboneConfig, pretrained: PretrainedTransformer) -> dict[str, Tensor]:
    """Returns the weights of a pretrained transformer for a network of the same sizes, any grid and any classes.

    Rows of the codes and of the mask token are copied, and those of the classes if their number is the same. Rows that
    the pretrained network lacks (other classes; the null class, if it was trained without class dropout) are the mean
    of its classes. Learned positions of another grid are interpolated; rotary positions need nothing.

    Args:
        config: Configuration of the network to be trained; the fields of ``BackboneConfig.transferable`` may differ.
        pretrained: The transformer to start from.

    Returns:
        State dict of a network of ``config``.

    Raises:
        ValueError: if the backbone or another field of its configuration differs, or the backbone declares no table
            that follows a field that differs.
    """
    source = pretrained.network
    _check_same(config, source.config)
    weights = source.state_dict()
    for name, convert in _tables(source):
        if name in weights:
            weights[name] = convert(weights[name], source.config, config)
    with skeletons():
        needed = config.create().state_dict()
    # A network with a null class may have tensors that one without it lacks; they keep their initial values.
    fresh = config.create().state_dict() if needed.keys() - weights.keys() else {}
    weights = {name: weights.get(name, fresh.get(name, needed[name])) for name in needed}
    for name, tensor in weights.items():
        if tensor.shape != needed[name].shape:
            raise ValueError(_explain_shape(config, source.config, name, tensor.shape, needed[name].shape))
    return weights


def _check_same(new: BackboneConfig, old: BackboneConfig) -> None:
    """Checks that two configurations differ only in fields that may differ.

    Raises:
        ValueError: if they do not. The message names the field and both values.
    """
    for name in ("backbone", "attention", *(each.name for each in fields(old))):
        wanted, has = getattr(old, name), getattr(new, name, None)
        if wanted == has or name in old.transferable:
            continue
        way_out = "leave the key out, or start from another one"
        if name == "attention":
            way_out = "start from another one, or use a recipe of its kind (RECIPE=autoregressive is causal)"
        raise ValueError(
            f"model.network.{name} must be {wanted}, as in the pretrained transformer, got {has}; {way_out}"
        )


def _explain_shape(
    new: BackboneConfig, old: BackboneConfig, name: str, got: Sequence[int], needed: Sequence[int]
) -> str:
    changed = [each for each in old.transferable if getattr(new, each) != getattr(old, each)]
    field = changed[0] if changed else "backbone"
    return (
        f"model.network.{field} must be {getattr(old, field)}, as in the pretrained transformer, got "
        f"{getattr(new, field)}: tensor {name} must have shape {tuple(needed)}, got {tuple(got)}, and the "
        f"backbone {old.backbone!r} does not list it in vocabulary_tables, class_tables or position_tables; leave the "
        "key out"
    )


_Convert = Callable[[Tensor, BackboneConfig, BackboneConfig], Tensor]


def _tables(network: Backbone) -> Iterator[tuple[str, _Convert]]:
    """Yields the names of the tables of a network, each with the function that converts its rows."""
    for names, convert in (
        (network.vocabulary_tables, _fit_vocabulary),
        (network.class_tables, _fit_classes),
        (network.position_tables, _fit_positions),
    ):
        for name in names:
            yield name, convert


def _fit_vocabulary(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (old vocabulary, ...) to (new vocabulary, ...): codes, classes if it has them, the mask token."""
    codes, classes = table[: old.num_code_rows], table[old.num_code_rows : -1]
    if len(classes):
        classes = _fit_classes(classes, old, new)
    return torch.cat([codes, classes, table[-1:]])


def _fit_classes(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (old classes, ...) to (new classes, ...), each followed by the null class if there is one."""
    classes, null = table[: old.num_classes], table[old.num_classes :]
    mean = classes.mean(0, keepdim=True)
    if new.num_classes != old.num_classes:
        classes = mean.expand(new.num_classes, *mean.shape[1:])
    if new.null_label is None:
        return classes
    return torch.cat([classes, mean if old.null_label is None else null])


def _fit_positions(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (others + old grid, D) to (others + new grid, D)."""
    others = len(table) - old.num_tokens
    return torch.cat([table[:others], resize_positions(table[others:], old.grid, new.grid)])


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolates the position embeddings of a grid for another grid (bicubic, 2-D), as for images of another size.

    Args:
        table: (N, D) float: a row for each token of the old grid, in raster order.
        old: Rows and columns of the old grid; N is their product.
        new: Rows and columns of the new grid.

    Returns:
        (N', D) float for N' tokens of the new grid; ``table`` itself if both grids are the same.

    Source: ViT, arXiv:2010.11929, section 3.2.
    """
    if old == new:
        return table
    planes = rearrange(table.float(), "(h w) d -> 1 d h w", h=old[0])
    is_smaller = new[0] < old[0] or new[1] < old[1]
    planes = F.interpolate(planes, size=new, mode="bicubic", align_corners=False, antialias=is_smaller)
    return rearrange(planes, "1 d h w -> (h w) d").to(table.dtype)

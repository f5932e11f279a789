"""Initial weights for fine-tuning on other classes or grids, from a pretrained transformer. ``TokenModel`` takes them.

A backbone declares its tables with a row for each id, class or token (``Backbone.vocabulary_tables``, ``class_tables``,
``position_tables``); all other tensors are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.pretrained.networks import PretrainedTransformer


def weights_for(config: BackboneConfig, pretrained: PretrainedTransformer) -> dict[str, Tensor]:
    """Returns the weights of a pretrained transformer for a network of the same sizes, any grid and any classes.

    Rows of the codes and of the mask token are copied, and those of the classes if their number is the same. Rows that
    the pretrained network lacks (other classes; the null class, if it was trained without class dropout) are the mean
    of its classes. Learned positions of another grid are interpolated.

    Args:
        config: Configuration of the network to be trained; the fields of ``BackboneConfig.transferable`` may differ.
        pretrained: The transformer to start from.

    Returns:
        State dict of a network of ``config``.
    """
    source = pretrained.network
    _check_same(config, source.config)
    weights = source.state_dict()
    for names, convert in (
        (source.vocabulary_tables, _fit_vocabulary),
        (source.class_tables, _fit_classes),
        (source.position_tables, _fit_positions),
    ):
        weights |= {name: convert(weights[name], source.config, config) for name in names if name in weights}
    with skeletons():
        needed = config.create().state_dict()
    # A network with a null class may have tensors that one without it lacks; they keep their initial values.
    fresh = config.create().state_dict() if needed.keys() - weights.keys() else {}
    return {name: weights.get(name, fresh.get(name, needed[name])) for name in needed}


def _check_same(new: BackboneConfig, old: BackboneConfig) -> None:
    """Checks that two configurations differ only in fields that may differ."""
    for name in ("backbone", "attention", *(field.name for field in fields(old))):
        old_value, new_value = getattr(old, name), getattr(new, name, None)
        if old_value != new_value and name not in old.transferable:
            raise ValueError(
                f"model.network.{name} must be {old_value}, as in the pretrained transformer, got {new_value}; leave "
                "the key out, or start from another one"
            )


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
    """Converts rows (others + old grid, D) to (others + new grid, D), bicubic in each axis. Grids are in raster order.

    An image is a video of one frame.

    Raises:
        ValueError: if one grid is a sequence and the other one is none.

    Source: ViT, arXiv:2010.11929, section 3.2.
    """
    if old.grid == new.grid:
        return table
    if (len(old.grid) == 1) != (len(new.grid) == 1):
        raise ValueError(
            f"model.network.grid must have as many axes as that of the pretrained transformer, {list(old.grid)}, got "
            f"{list(new.grid)}; start from another one"
        )
    others = len(table) - old.num_tokens
    (frames, *image), (new_frames, *new_image) = ((*(1,) * (3 - len(grid)), *grid) for grid in (old.grid, new.grid))
    rows = rearrange(table[others:].float(), "(t h w) d -> t d h w", t=frames, h=image[0])
    rows = _resize(rows, new_image)
    if frames != new_frames:
        columns = rearrange(rows, "t d h w -> 1 d t (h w)")
        columns = _resize(columns, [new_frames, columns.shape[-1]])
        rows = rearrange(columns, "1 d t (h w) -> t d h w", h=new_image[0])
    return torch.cat([table[:others], rearrange(rows, "t d h w -> (t h w) d").to(table.dtype)])


def _resize(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes planes (B, D, h, w) float32 to a size (h, w)."""
    is_smaller = size[0] < planes.shape[-2] or size[1] < planes.shape[-1]
    return F.interpolate(planes, size=tuple(size), mode="bicubic", align_corners=False, antialias=is_smaller)

"""Initial weights for fine-tuning a pretrained transformer on other classes. ``TokenModel`` uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from maskgit_pl.networks.backbone import BackboneConfig
from maskgit_pl.pretrained.networks import PretrainedTransformer

__all__ = ["weights_for"]


def weights_for(config: BackboneConfig, pretrained: PretrainedTransformer) -> dict[str, Tensor]:
    """Returns the weights of a pretrained transformer for a network of the same sizes and any number of classes.

    Rows of the codes and of the mask token are copied, and those of the classes if their number is the same. Rows that
    the pretrained network lacks (other classes; the null class, if it was trained without class dropout) are the mean
    of its classes.

    Args:
        config: Sizes of the network to be trained; dropouts and classes may differ.
        pretrained: The transformer to start from.

    Returns:
        State dict of a transformer of ``config``.

    Raises:
        ValueError: if attention, codebook, grid, embedding, depth, number of heads or MLP differ.
    """
    old = pretrained.network.config
    if config.attention != old.attention:
        raise ValueError(
            f"model.network.attention must be {old.attention}, as in the pretrained transformer, got "
            f"{config.attention}; start from another one, or use a recipe of its kind (RECIPE=autoregressive is causal)"
        )
    for name in ("codebook_size", "grid", "embed_dim", "depth", "num_heads", "mlp_dim"):
        if getattr(config, name) != getattr(old, name):
            raise ValueError(
                f"model.network.{name} must be {getattr(old, name)}, as in the pretrained transformer, got "
                f"{getattr(config, name)}; leave the key out, or start from another one"
            )
    weights = pretrained.network.state_dict()
    return weights | {name: _fit_rows(weights[name], old, config) for name in ("token_embedding.weight", "head_bias")}


def _fit_rows(table: Tensor, old: BackboneConfig, new: BackboneConfig) -> Tensor:
    """Converts rows (old vocabulary, ...) to (new vocabulary, ...)."""
    # Order of the vocabulary: codes, classes, the null class if there is one, the mask token.
    codes, classes = table[: old.codebook_size], table[old.codebook_size : old.codebook_size + old.num_classes]
    mean = classes.mean(0, keepdim=True)
    if new.num_classes != old.num_classes:
        classes = mean.expand(new.num_classes, *mean.shape[1:])
    null = table[:0]
    if new.null_label is not None:
        null = table[old.codebook_size + old.num_classes : -1] if old.null_label is not None else mean
    return torch.cat([codes, classes, null, table[-1:]])

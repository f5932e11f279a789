"""Creates the network of a configuration; a backbone that another package defines is checked first."""

from __future__ import annotations

import torch
from torch import Tensor

from maskgit_pl.networks.backbone import AutoregressiveBackbone, Backbone, BackboneConfig
from maskgit_pl.networks.skeleton import skeletons

__all__ = ["create_network", "is_plugin"]

_checked: set[tuple[type[BackboneConfig], str]] = set()


def create_network(config: BackboneConfig) -> Backbone:
    """Creates the network of a configuration, and checks the contract of a plug-in once for each configuration.

    Raises:
        ValueError: if what ``create`` returns is no ``Backbone`` of this configuration, or its logits have a wrong
            shape.
    """
    key = type(config), repr(config)  # a field such as a mapping cannot be hashed
    if is_plugin(config) and key not in _checked:
        _check_contract(config)
        _checked.add(key)
    return config.create()


def is_plugin(config: BackboneConfig) -> bool:
    """Returns True if another package defines the backbone; those of this package are tested."""
    return not type(config).__module__.startswith("maskgit_pl.")


def _check_contract(config: BackboneConfig) -> None:
    """Creates a network on the meta device, which takes neither memory nor time, and checks the shapes of its logits.

    Raises:
        ValueError: if they are wrong; see ``create_network``.
    """
    where = f"backbone {config.backbone!r}"
    with skeletons():
        network = config.create()
        if not isinstance(network, Backbone):
            raise ValueError(f"{where}: create must return a Backbone, got {type(network).__name__}")
        if getattr(network, "config", None) != config:
            raise ValueError(f"{where}: the config of the network must be the one that creates it")
        if config.attention == "causal" and not isinstance(network, AutoregressiveBackbone):
            raise ValueError(
                f"{where}: create must return an AutoregressiveBackbone for causal attention, got "
                f"{type(network).__name__}"
            )
        batch = 2
        tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64)
        labels = torch.zeros(batch, dtype=torch.int64)
        vectors = torch.zeros(batch, config.condition_dim) if config.condition_dim else None
        logits = network.eval()(tokens, labels, vectors=vectors)
    expected = batch, config.num_tokens, config.codebook_size
    if not isinstance(logits, Tensor) or logits.shape != expected:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{where}: forward must return logits of shape (B, N, K) = {expected}, got {got}")

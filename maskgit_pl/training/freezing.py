"""Parts of a network that keep their weights while the rest is trained. Used by ``Tokenizer``."""

from __future__ import annotations

from torch import nn

__all__ = ["freeze"]


def freeze(part: nn.Module) -> None:
    """Freezes a part of a network in place: its weights take no gradients, and it stays in evaluation mode.

    Args:
        part: Module of the network. Its optimizer must be built later, and must leave out frozen parameters.
    """
    part.requires_grad_(requires_grad=False).eval()
    part.train = lambda mode=True: part  # type: ignore[method-assign]  # Lightning calls train() on every submodule

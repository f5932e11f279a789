"""Conditioning by a vector per image, such as a text embedding: binds the vectors of a batch to the network.

``predictors.build_class_predictor`` uses it, so that all predictors, guidance included, work as without vectors.

Shapes: B images, C size of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["VectorConditionalNetwork", "VectorNetwork", "check_condition_vectors"]


class VectorConditionalNetwork(Protocol):
    """A network that computes the logits of the codes at some positions, given tokens, labels and vectors."""

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor, *, vectors: Tensor | None = None) -> Tensor:
        """Computes logits (B, M, K) at positions (B, M) of tokens (B, N) for labels (B,) and vectors (B, C)."""


@dataclass(frozen=True)
class VectorNetwork:
    """A network with the vectors of a batch, in the form of a network that is conditioned on classes only.

    Guidance doubles the batch: rows i and B + i are the two halves of image i, and both get its vector. With the null
    label, the network hides the vector.

    Args:
        network: The network. Its ``forward_at`` takes ``vectors``.
        vectors: (B, C) float on the network's device.
    """

    network: VectorConditionalNetwork
    vectors: Tensor

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Computes logits (b, M, K) at positions (b, M) of tokens (b, N) for labels (b,), with b = B or 2 B."""
        vectors = self.vectors.repeat(len(tokens) // len(self.vectors), 1)  # (b, C)
        return self.network.forward_at(tokens, labels, positions, vectors=vectors)


def check_condition_vectors(
    vectors: Tensor | None, labels: Sequence[int], *, condition_dim: int, null_label: int | None
) -> Tensor | None:
    """Checks the vectors of a request against the network.

    Args:
        vectors: (n, C) float, or (C,) for all images; None if none are given.
        labels: Label of each image; the null label hides its vector.
        condition_dim: C of the network; 0 if it takes no vectors.
        null_label: Label of "no class and no vector"; None if the network has none.

    Returns:
        (n, C) float32, zeros if all labels are the null label; None for a network without vectors.

    Raises:
        ValueError: if vectors are missing or not wanted, have another shape, are not finite, or would all be hidden.
    """
    if not condition_dim:
        if vectors is not None:
            raise ValueError("vectors must not be given to a model that was trained without vectors; leave them out")
        return None
    expected = len(labels), condition_dim
    is_hidden = all(label == null_label for label in labels)
    if vectors is None:
        if not is_hidden:
            raise ValueError(
                f"vectors must be given: the model was trained with a vector of {condition_dim} values for each image, "
                f"got none; give an array of shape {expected}, or generate images of no class (None)"
            )
        return torch.zeros(expected)
    if is_hidden:
        raise ValueError("classes must be given with vectors, since no class (None) hides the vector, got none")
    if vectors.ndim == 1:
        vectors = vectors.expand(len(labels), -1)
    if tuple(vectors.shape) != expected:
        raise ValueError(
            f"vectors must have shape {expected}, one row of the {condition_dim} values that the model was trained "
            f"with for each image, got {tuple(vectors.shape)}"
        )
    if not vectors.isfinite().all():
        raise ValueError("vectors must be finite, got NaN or infinity")
    return vectors.float()

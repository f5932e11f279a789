"""The vectors of images, such as text embeddings: those that a request gives, or those of a pool.

``predictors.ConditionalModel.bind`` hands the vectors of a batch to the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from maskgit_pl.checks import shorten

__all__ = ["VectorPool", "check_condition_vectors"]


@dataclass(frozen=True)
class VectorPool:
    """Vectors from which images that are given none take theirs, such as those of the val split of the data.

    The image of seed s takes row (s - ``first_seed``) mod n of the n vectors of its class: it depends on its class and
    its seed only, and the images of a class with consecutive seeds take its vectors in turn.

    Args:
        vectors: (m, C) float32.
        labels: (m,) int64, class of each vector; None if every class takes all vectors. A class without vectors takes
            all of them too.
        first_seed: Seed of the image that takes the first vector.

    Raises:
        ValueError: if there are no vectors, or their shape differs from that of the labels.
    """

    vectors: Tensor
    labels: Tensor | None = None
    first_seed: int = 0

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not len(self.vectors):
            raise ValueError(f"vectors must have shape (m, C) with m >= 1, got {tuple(self.vectors.shape)}")
        if self.labels is not None and self.labels.shape != self.vectors.shape[:1]:
            raise ValueError(f"labels must be one for each of {len(self.vectors)} vectors, got {len(self.labels)}")

    @cached_property
    def digest(self) -> str:
        """The SHA-256, hex, of vectors, labels and first seed, which identifies the pool in plans and ledgers."""
        digest = hashlib.sha256(f"{tuple(self.vectors.shape)} {self.first_seed}".encode())
        for tensor in (self.vectors, self.labels):
            digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def draw(self, labels: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Returns the vectors (n, C) of n images with their labels and seeds."""
        rows = [self._rows(label) for label in labels]
        chosen = [own[(seed - self.first_seed) % len(own)] for own, seed in zip(rows, seeds, strict=True)]
        return self.vectors[torch.stack(chosen)]

    def _rows(self, label: int) -> Tensor:
        """Returns the rows of the vectors of a class, in order."""
        if label not in self._rows_of_label:
            found = torch.arange(len(self.vectors))
            if self.labels is not None and bool((self.labels == label).any()):
                found = (self.labels == label).nonzero()[:, 0]
            self._rows_of_label[label] = found
        return self._rows_of_label[label]

    @cached_property
    def _rows_of_label(self) -> dict[int, Tensor]:
        return {}


def check_condition_vectors(
    vectors: object, labels: Sequence[int], *, condition_dim: int, null_label: int | None
) -> Tensor | None:
    """Checks the vectors of a request against the network.

    Args:
        vectors: (n, C) float array or tensor, or (C,) for all images; None if none are given.
        labels: Label of each image; the null label hides its vector.
        condition_dim: C of the network; 0 if it takes no vectors.
        null_label: Label of "no class and no vector"; None if the network has none.

    Returns:
        (n, C) float32, zeros if all labels are the null label; None for a network without vectors.

    Raises:
        ValueError: if vectors are missing or not wanted, have another shape, are not finite, or would all be hidden.
        TypeError: if they are not an array of numbers.
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
    try:
        vectors = torch.as_tensor(vectors)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"vectors must be an array of numbers, got {shorten(vectors)}") from error
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

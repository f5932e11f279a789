"""The base of the transformers ``bert`` and ``adaln``: sizes, head, and losses of large codebooks in chunks.

Shapes: B images, N tokens, M predicted tokens, D embedding dimension, K codebook size, V columns of the logits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskgit_pl.checks import check_choice, check_integer
from maskgit_pl.networks.backbone import Attention, Backbone, BackboneConfig, Measure, Vocabulary, token_head

LARGEST_SIZES = {"embed_dim": 2**16, "depth": 1024, "num_heads": 1024, "mlp_dim": 2**20}
"""Largest sizes, well above any that exists: a larger one is a mistake or an attack."""

_MOST_LOGITS = 2**25  # logits of a step that are computed at once: 128 MiB in float32, of which a step has some copies
_CHUNK_LOGITS = 2**24  # logits of a chunk
_LEAST_COLUMNS = 2**14  # below, the logits are no larger than the activations of the network
_LEAST_ROWS = 128  # of a chunk: with fewer rows, a GPU would wait for the memory of the table


@dataclass(frozen=True)
class TransformerSizes(BackboneConfig):
    """Sizes of a transformer; see ``BackboneConfig`` for the fields of all backbones.

    Args:
        embed_dim: D.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_dim: Hidden size of the MLP of each block.
        attention: ``bidirectional``: a token attends to all tokens; ``causal``: to itself and those before it
            in raster order. Both have the same weights.
    """

    has_token_groups: ClassVar[bool] = True
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    _: KW_ONLY
    attention: Attention = "bidirectional"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in LARGEST_SIZES.items():
            check_integer(f"transformer {name}", getattr(self, name), f"[1, {most}]")
        check_choice("transformer attention", self.attention, get_args(Attention))

    def _check_heads(self, name: str) -> None:
        """Checks that the heads divide the field ``name``."""
        if (size := getattr(self, name)) % self.num_heads:
            raise ValueError(f"transformer {name} must be a multiple of num_heads {self.num_heads}, got {size}")


class Transformer(Backbone):
    """A network of blocks, whose head is tied to the token embedding and runs at all tokens or at some."""

    token_embedding: nn.Embedding
    head_bias: nn.Parameter
    vocabulary_tables = ("token_embedding.weight", "head_bias")
    position_tables = ("position_embedding.weight",)

    @abstractmethod
    def _hidden(
        self,
        tokens: Tensor,
        labels: Tensor,
        vectors: Tensor | None,
        *,
        selected: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Returns what the head multiplies: (B, N, D), or with positions of ``forward_selected`` or ``forward_at``.

        Args:
            tokens: (B, N) int64.
            labels: (B,) int64.
            vectors: (B, C) float, or None.
            selected: (M,) int64 in [0, B N): return (M, D), of these tokens only.
            at: (B, M) int64 in [0, N): return (B, M, D), of these tokens only.
        """

    def _head(self, vocabulary: Vocabulary) -> Callable[[Tensor], Tensor]:
        """Returns the function from hidden states (..., D) to logits (..., V)."""
        return token_head(self.token_embedding.weight, self.head_bias, config=self.config, vocabulary=vocabulary)

    def forward(
        self, tokens: Tensor, labels: Tensor, *, vectors: Tensor | None = None, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits (B, N, V) of all tokens; see ``Backbone``."""
        return self._head(vocabulary)(self._hidden(tokens, labels, vectors))

    def forward_selected(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
    ) -> Tensor:
        """Returns the logits (M, V) at ``positions``; see ``Backbone``. The head runs there only."""
        return self._head(vocabulary)(self._hidden(tokens, labels, vectors, selected=positions))

    def measure_selected(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        measure: Measure,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
    ) -> Tensor:
        """Returns what ``measure`` computes from the logits at ``positions``, in chunks if they are very large."""
        x = self._hidden(tokens, labels, vectors, selected=positions)
        return measure_logits(x, self._head(vocabulary), measure, num_columns=self.config.num_columns(vocabulary))

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor, *, vectors: Tensor | None = None) -> Tensor:
        """Returns the logits (B, M, K) at ``positions``. The last block's queries and the head run there only."""
        return self._head("codes")(self._hidden(tokens, labels, vectors, at=positions))


def needs_chunks(num_tokens: int, num_columns: int) -> bool:
    """Returns True if logits (M, V) are so large that ``measure_logits`` must compute them in chunks.

    It is for large codebooks: V >= 16,384 and M V > 2^25. Smaller logits are computed at once.
    """
    return num_columns >= _LEAST_COLUMNS and num_tokens * num_columns > _MOST_LOGITS


def measure_logits(x: Tensor, head: Callable[[Tensor], Tensor], measure: Measure, *, num_columns: int) -> Tensor:
    """Computes what ``measure`` makes of the logits of hidden states, without a tensor of all logits if they are large.

    1. Compute the logits of a chunk of rows, and their measures. Keep the measures only.
    2. In the backward pass, compute the logits of a chunk again: one more matrix product of the head.

    A chunk has 2^24 logits, or 128 rows if they have more.

    Args:
        x: (M, D) float: hidden states.
        head: Hidden states (m, D) to logits (m, V).
        measure: Logits (m, V) and their place among the M rows -> (m, F) float.
        num_columns: V.

    Returns:
        (M, F) float. In chunks it is the same up to the order of sums.

    Source: the idea of Liger Kernel, arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009.
    """
    if not needs_chunks(len(x), num_columns):
        return measure(head(x), slice(None))

    def compute(part: Tensor, place: slice) -> Tensor:
        return measure(head(part), place)

    size = max(_LEAST_ROWS, _CHUNK_LOGITS // num_columns)
    parts = [
        checkpoint(
            compute, part, slice(size * number, size * (number + 1)), use_reentrant=False, preserve_rng_state=False
        )
        for number, part in enumerate(torch.split(x, size))
    ]
    return torch.cat(parts)

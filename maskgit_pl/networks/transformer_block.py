"""The block of both transformers: post-norm attention and feed-forward, with the ways to run it at some positions.

Used by ``transformer`` (bidirectional attention) and ``causal``.

Shapes: B images, S positions of the sequence, D embedding dimension.

Source: google-research/maskgit, ``maskgit_transformer.py``.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["LAYER_NORM_EPS", "Block", "KVCache", "QKVProjection"]

LAYER_NORM_EPS = 1e-12
"""Epsilon of every layer norm, the released one."""


class QKVProjection(nn.Linear):
    """The projection to queries, keys and values in one product, or to a part of them.

    Args:
        embed_dim: D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim, 3 * embed_dim)

    def query(self, x: Tensor) -> Tensor:
        """(B, S, D) -> queries (B, S, D)."""
        return F.linear(x, self.weight[: self.in_features], self.bias[: self.in_features])

    def key_value(self, x: Tensor) -> Tensor:
        """(B, S, D) -> keys, then values (B, S, 2 D)."""
        return F.linear(x, self.weight[self.in_features :], self.bias[self.in_features :])


class KVCache:
    """Keys and values that a causal block has computed, row after row.

    Args:
        capacity: Largest number of rows; their memory is taken at once.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_rows = 0
        self._rows: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Keeps the next R rows, (2, B, heads, R, D / heads), and returns all of them, (2, B, heads, S, D / heads)."""
        if self._rows is None:
            self._rows = new.new_empty(*new.shape[:3], self.capacity, new.shape[4])
        first, self.num_rows = self.num_rows, self.num_rows + new.shape[3]
        self._rows[:, :, :, first : self.num_rows] = new
        return self._rows[:, :, :, : self.num_rows]


class Block(nn.Module):
    """Post-norm attention and feed-forward: x = LN(x + f(x)), twice.

    Args:
        embed_dim: D, a multiple of ``num_heads``.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the feed-forward part.
        dropout: Of attention probabilities and both outputs, in [0, 1).
        is_causal: A position sees only itself and those before it.

    Attributes:
        entry_points: Methods that a network calls besides ``forward``; under FSDP they gather the weights too.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_with_kv", "forward_next", "forward_cached")

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, *, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.is_causal = is_causal
        self.qkv = QKVProjection(embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.attention_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(embed_dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D); with ``mask`` (B, S) bool only the rows where it is True, (M, D)."""
        query, key, value = self._heads(self.qkv(x), 3)
        attended = self._attend(query, key, value, is_causal=self.is_causal)
        if mask is not None:
            x, attended = x[mask], attended[mask]
        return self._add_and_feed_forward(x, attended)

    def forward_with_kv(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``forward`` with the keys and values that it has computed.

        Args:
            x: (B, S, D).
            positions: (B, M) int64 in [0, S): compute queries, and results, at these only; None for all.

        Returns:
            (B, S or M, D), and keys and then values of all positions (B, S, 2 D).
        """
        assert not self.is_causal
        if positions is None:
            projected = self.qkv(x)  # (B, S, 3 D)
            query, key, value = self._heads(projected, 3)
            return self._add_and_feed_forward(x, self._attend(query, key, value)), projected[..., x.shape[-1] :]
        rows, key_value = _gather_rows(x, positions), self.qkv.key_value(x)
        (query,) = self._heads(self.qkv.query(rows), 1)
        key, value = self._heads(key_value, 2)
        return self._add_and_feed_forward(rows, self._attend(query, key, value)), key_value

    def forward_next(self, x: Tensor, cache: KVCache) -> Tensor:
        """``forward`` of a causal block at the rows that follow those in the cache, which keeps them for later ones.

        Args:
            x: (B, R, D): the block's input at the next R rows; one row, or the first rows.
            cache: Changed in place.

        Returns:
            (B, R, D).
        """
        assert self.is_causal
        assert x.shape[1] == 1 or cache.num_rows == 0  # several later rows would need a mask
        heads = self._heads(self.qkv(x), 3)
        key, value = cache.extend(heads[1:])
        return self._add_and_feed_forward(x, self._attend(heads[0], key, value, is_causal=x.shape[1] > 1))

    def forward_cached(
        self, x: Tensor, positions: Tensor, key_value: Tensor, *, num_queries: int | None = None
    ) -> Tensor:
        """``forward`` at some positions, which attend to all; their new keys and values replace the old ones.

        Args:
            x: (B, R, D): the block's input at ``positions``.
            positions: (B, R) int64 in [0, S).
            key_value: (B, S, 2 D), changed in place.
            num_queries: Results wanted, those of the first positions; None for all.

        Returns:
            (B, num_queries or R, D).
        """
        query, new = self.qkv(x).split([x.shape[-1], key_value.shape[-1]], dim=-1)
        key_value.scatter_(1, positions.unsqueeze(-1).expand_as(new), new)
        (query,) = self._heads(query[:, :num_queries], 1)
        key, value = self._heads(key_value, 2)
        return self._add_and_feed_forward(x[:, :num_queries], self._attend(query, key, value))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, S, parts D) -> (parts, B, heads, S, D / heads)."""
        return rearrange(x, "b s (parts heads d) -> parts b heads s d", parts=parts, heads=self.num_heads)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        """Queries (B, heads, M, D / heads), keys and values (B, heads, S, D / heads) -> (B, M, D)."""
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )
        return rearrange(attended, "b heads m d -> b m (heads d)")

    def _add_and_feed_forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """Input (..., D) and what its heads attended to (..., D) -> the block's output (..., D)."""
        x = self.attention_norm(x + F.dropout(self.proj(attended), self.dropout, self.training))
        hidden = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        normed: Tensor = self.mlp_norm(x + F.dropout(hidden, self.dropout, self.training))
        return normed


def _gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Rows (B, M, D) of x (B, S, D) at ``positions`` (B, M) int64."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

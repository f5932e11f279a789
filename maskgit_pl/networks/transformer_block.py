"""The block of ``transformer``: post-norm attention and feed-forward, with the ways to run it at some positions.

Attention is bidirectional, or causal with a ``KVCache``. ``adaln`` and ``int8`` use parts of it. ``rotate`` and
``rotation_table`` give ``adaln`` its rotary positions.

Shapes: B images, S positions of the sequence, D embedding dimension.

Source: google-research/maskgit, ``maskgit_transformer.py``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.networks.kernels import PackingLinear, add_output, feed_forward

__all__ = [
    "LAYER_NORM_EPS",
    "Block",
    "KVCache",
    "Positions",
    "QKVProjection",
    "rotate",
    "rotation_table",
]

Positions = Literal["learned", "rotary", "rotary-raster"]

LAYER_NORM_EPS = 1e-12
"""Epsilon of every layer norm; the released code's, far below torch's default of 1e-5."""


class Block(nn.Module):
    """A post-norm block, attention and then an MLP: x = LN(x + f(x)), twice.

    Args:
        embed_dim: D, a multiple of ``num_heads``.
        num_heads: Number of attention heads.
        mlp_dim: Hidden size of the MLP.
        dropout: Dropout probability of attention probabilities and of both outputs, in [0, 1).
        is_causal: True if a position attends only to itself and to earlier ones.

    Attributes:
        entry_points: Methods that a network calls besides ``forward``. FSDP gathers the weights for them too.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_at", "forward_next")

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, *, dropout: float, is_causal: bool) -> None:
        super().__init__()
        # The order of the modules decides the initial weights: each draws from the same generator in turn.
        self.num_heads = num_heads
        self.dropout = dropout
        self.is_causal = is_causal
        self.qkv = QKVProjection(embed_dim)
        self.proj = PackingLinear(embed_dim, embed_dim)
        self.attention_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.fc1 = PackingLinear(embed_dim, mlp_dim, gelu=True)
        self.fc2 = PackingLinear(mlp_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Returns the output of the block.

        Args:
            x: (B, S, D).
            rows: (M,) int64 in [0, B S): return only these rows of the (B S, D) output; None for all.

        Returns:
            (B, S, D), or (M, D) with rows.
        """
        query, key, value = self._heads(self.qkv(x), 3)
        attended = self._attend(query, key, value, is_causal=self.is_causal)
        if rows is not None:  # the rest works on rows, so all others can be dropped here
            x, attended = (F.embedding(rows, each.flatten(0, 1)) for each in (x, attended))
        return self._add_and_feed_forward(x, attended)

    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Returns the output of the block at some positions.

        Args:
            x: (B, S, D).
            positions: (B, M) int64 in [0, S).

        Returns:
            (B, M, D).
        """
        assert not self.is_causal  # a position that is left out would shift the causal mask
        # Only M positions ask, but all S positions answer: keys and values of everything.
        rows, key_value = _gather_rows(x, positions), self.qkv.key_value(x)
        (query,) = self._heads(self.qkv.query(rows), 1)
        key, value = self._heads(key_value, 2)
        return self._add_and_feed_forward(rows, self._attend(query, key, value))

    def forward_next(self, x: Tensor, cache: KVCache) -> Tensor:
        """Returns the output of a causal block at the next rows, and adds their keys and values to the cache.

        Args:
            x: (B, R, D): input of the block at the next R rows: any R for the first rows, later R = 1.
            cache: Cache of this block, changed in place.

        Returns:
            (B, R, D).
        """
        assert self.is_causal
        assert x.shape[1] == 1 or cache.num_rows == 0  # several later rows would need a mask
        heads = self._heads(self.qkv(x), 3)
        key, value = cache.extend(heads[1:])
        return self._add_and_feed_forward(x, self._attend(heads[0], key, value, is_causal=x.shape[1] > 1))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Splits (B, S, parts D) into heads: (parts, B, heads, S, D / heads)."""
        # einops would take longer, which shows in a decoding of one image.
        return x.view(*x.shape[:2], parts, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        """Computes (B, M, D): queries (B, heads, M, D / heads) attend to keys and values (B, heads, S, D / heads)."""
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )
        return attended.transpose(1, 2).flatten(2)

    def _add_and_feed_forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """Returns the output (..., D) of the block, given its input and the output of its attention, both (..., D)."""
        # Post-norm: the norm comes after the residual sum.
        if self.training:
            x = self.attention_norm(x + F.dropout(self.proj(attended), self.dropout))
            x = x + F.dropout(feed_forward(x, self.fc1, self.fc2), self.dropout)
        else:
            x = self.attention_norm(add_output(x, self.proj, attended))
            x = feed_forward(x, self.fc1, self.fc2, to=x)
        normed: Tensor = self.mlp_norm(x)
        return normed


def _gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """Returns the rows (B, M, D) of x (B, S, D) at ``positions`` (B, M) int64."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class KVCache:
    """The keys and values that a causal block has computed so far, row after row.

    Args:
        capacity: Largest number of rows. ``extend`` allocates all of them at its first call.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_rows = 0
        self._rows: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Adds R rows and returns all rows so far.

        Args:
            new: (2, B, heads, R, D / heads): keys and values of the next rows.

        Returns:
            (2, B, heads, S, D / heads), a view of the cache.
        """
        if self._rows is None:  # dtype, device and batch are known only now
            self._rows = new.new_empty(*new.shape[:3], self.capacity, new.shape[4])
        first, self.num_rows = self.num_rows, self.num_rows + new.shape[3]
        self._rows[:, :, :, first : self.num_rows] = new
        return self._rows[:, :, :, : self.num_rows]


class QKVProjection(PackingLinear):
    """The projection to queries, keys and values in one matrix product, or to a part of them.

    Args:
        embed_dim: D, size of the input.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim, 3 * embed_dim)  # rows of the weight: queries, keys, values

    def query(self, x: Tensor) -> Tensor:
        """Returns the queries (B, S, D) of x (B, S, D)."""
        return self.part(x, 0, self.in_features)

    def key_value(self, x: Tensor) -> Tensor:
        """Returns the keys, then the values, (B, S, 2 D), of x (B, S, D)."""
        return self.part(x, self.in_features, self.out_features)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates pairs of neighbouring numbers by angles that grow with their position.

    A pair (a, b) at a place t turns by the angle t w into (a cos - b sin, b cos + a sin), so that the product of a
    query and a key depends on the difference of their places only.

    Args:
        x: (..., S, D) float, D even.
        table: (..., S, D / 2, 2) float: cosine and sine of each pair.

    Returns:
        (..., S, D) in the dtype of x.

    Source: RoFormer, arXiv:2104.09864; rows and columns: EVA-02, arXiv:2303.11331, and LlamaGen, arXiv:2406.06525.
    """
    first, second = rearrange(x.float(), "... (pairs two) -> two ... pairs", two=2)  # (..., S, D / 2)
    cos, sin = table.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).type_as(x)


def rotation_table(
    kind: Positions, grid: tuple[int, int], length: int, size: int, base: float, device: torch.device
) -> Tensor:
    """Computes the cosines and sines of a sequence: the tokens of a grid, then a class token and registers.

    ``rotary`` rotates the first half of each head by the row of the token, the second half by its column; all other
    positions are not rotated. ``rotary-raster`` follows the released MaskGIL code: position t of the sequence is
    rotated by t - 1, and the first one has a table of zeros, so that its query and key vanish.

    Args:
        kind: ``rotary`` or ``rotary-raster``.
        grid: Rows and columns of the tokens.
        length: S, positions of the sequence.
        size: D, size of a head.
        base: Base of the wavelengths: pair i of P has the frequency base^(-i / P).
        device: Device that computes the table. It is cheap and not kept: a tensor that a fake or an inference mode made
            would fail in training.

    Returns:
        (S, D / 2, 2) float32.
    """
    if kind == "rotary-raster":
        table = _cos_sin(_angles(torch.arange(length, device=device) - 1, size, base))
        table[0] = 0
        return table
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    angles = torch.cat([_angles(places.flatten(), size // 2, base) for places in (rows, columns)], dim=1)
    # Angle 0 leaves class token and registers as they are.
    return _cos_sin(torch.cat([angles, angles.new_zeros(length - len(angles), angles.shape[1])]))


def _angles(places: Tensor, size: int, base: float) -> Tensor:
    """Returns the angles (places, size / 2) of ``size`` numbers."""
    return torch.outer(places.float(), base ** (-torch.arange(0, size, 2, device=places.device).float() / size))


def _cos_sin(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)

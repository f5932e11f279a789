"""The bidirectional transformer of MaskGIT: a post-norm BERT over a class token and the image's tokens.

Used by ``mvtm.MaskedTokenModel`` in training and, through ``decoding.ClassPredictor``, in decoding. ``Transformer`` and
``Block`` are what it shares with its twin under a causal mask, ``networks.causal``.

Source: paper, implementation details; google-research/maskgit, ``maskgit_transformer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, check_integer, check_number, shorten

__all__ = [
    "LARGEST_GRID",
    "Attention",
    "Block",
    "ContextCache",
    "KeyValues",
    "MaskedTransformer",
    "QueryKeyValue",
    "Transformer",
    "TransformerConfig",
    "Vocabulary",
]

Attention = Literal["bidirectional", "causal"]
Vocabulary = Literal["codes", "all"]

LARGEST_GRID = 256
"""Rows or columns of a token grid, at most: 65,536 tokens, 256 times those of a released image."""

_LARGEST = {  # well above any network that exists: what is larger is a mistake, or meant to fill the memory
    "num_codes": 2**24,
    "num_classes": 100_000,
    "width": 2**16,
    "depth": 1024,
    "num_heads": 1024,
    "mlp_width": 2**20,
}
_LAYER_NORM_EPS = 1e-12
_INIT_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer. The defaults are the released ones.

    Args:
        num_codes: K, size of the tokenizer's codebook.
        num_classes: Classes, at least 1 (1 for data without classes).
        grid: Rows and columns of the token grid (h, w); N = h w.
        width: D, a multiple of ``num_heads``.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_width: Hidden width of the feed-forward part.
        dropout: Of embeddings, attention probabilities and both outputs of a block, in [0, 1).
        class_dropout: Share of training samples whose class is replaced by the null class, in [0, 1). Above 0 the
            vocabulary has a null class, and guidance is possible.
        attention: What a token sees: all others, or those before it in raster order. Both have the same weights.

    Raises:
        ValueError: if a size is out of range, or there is no such attention.
    """

    num_codes: int
    num_classes: int
    grid: tuple[int, int]
    width: int = 768
    depth: int = 24
    num_heads: int = 16
    mlp_width: int = 3072
    dropout: float = 0.1
    class_dropout: float = 0.1
    attention: Attention = "bidirectional"

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        for name, most in _LARGEST.items():
            check_integer(f"transformer {name}", getattr(self, name), f"[1, {most}]")
        if len(self.grid) != 2:
            raise ValueError(f"transformer grid must be two numbers (rows, columns), got {shorten(self.grid)}")
        for side in self.grid:
            check_integer("transformer grid", side, f"[1, {LARGEST_GRID}]")
        if self.width % self.num_heads:
            raise ValueError(f"transformer width must be a multiple of num_heads {self.num_heads}, got {self.width}")
        for name in ("dropout", "class_dropout"):
            check_number(f"transformer {name}", getattr(self, name), "[0, 1)")
        check_choice("transformer attention", self.attention, get_args(Attention))

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None where class dropout is 0."""
        return self.num_classes if self.class_dropout > 0 else None

    @property
    def vocabulary_size(self) -> int:
        """Rows of the word table: codes, classes, the null class if there is one, the mask token."""
        return self.num_codes + self.num_classes + (self.null_label is not None) + 1

    @property
    def mask_token_id(self) -> int:
        """The last row."""
        return self.vocabulary_size - 1


class QueryKeyValue(nn.Linear):
    """The projection to queries, keys and values in one product, or to a part of them.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)

    def query(self, x: Tensor) -> Tensor:
        """(B, S, D) -> queries (B, S, D)."""
        return F.linear(x, self.weight[: self.in_features], self.bias[: self.in_features])

    def key_value(self, x: Tensor) -> Tensor:
        """(B, S, D) -> keys, then values (B, S, 2 D)."""
        return F.linear(x, self.weight[self.in_features :], self.bias[self.in_features :])


@dataclass
class ContextCache:
    """Keys and values that a network has computed for a sequence, layer by layer, for ``MaskedTransformer.update``.

    Args:
        key_values: A layer's keys, then values (B, 1 + N, 2 D), in order; empty before the first pass.
    """

    key_values: list[Tensor] = field(default_factory=list)


class KeyValues:
    """Keys and values that a causal block has computed, row after row.

    Args:
        capacity: Rows that there will be at most; their memory is taken at once.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_rows = 0
        self._rows: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Keeps the next R rows, (2, B, heads, R, D / heads), and gives all of them, (2, B, heads, S, D / heads)."""
        if self._rows is None:
            self._rows = new.new_empty(*new.shape[:3], self.capacity, new.shape[4])
        first, self.num_rows = self.num_rows, self.num_rows + new.shape[3]
        self._rows[:, :, :, first : self.num_rows] = new
        return self._rows[:, :, :, : self.num_rows]


class Block(nn.Module):
    """Post-norm attention and feed-forward: x = LN(x + f(x)), twice.

    Args:
        config: Sizes, and whether a position sees those after it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.is_causal = config.attention == "causal"
        self.query_key_value = QueryKeyValue(config.width)
        self.attention_output = nn.Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.mlp_hidden = nn.Linear(config.width, config.mlp_width)
        self.mlp_output = nn.Linear(config.mlp_width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)

    def forward(self, x: Tensor, asked: Tensor | None = None) -> Tensor:
        """(B, S, D) -> (B, S, D), or ``_at(result, asked)`` without the work for the other positions."""
        if asked is not None and asked.dtype != torch.bool:  # as many in each row: queries of no others are needed
            return self.remember(x, asked)[0]
        return self._attend(x, *self._heads(self.query_key_value(x), 3), asked=asked, is_causal=self.is_causal)

    def extend(self, x: Tensor, seen: KeyValues) -> Tensor:
        """``forward`` of a causal block at rows that follow those that were seen, which it keeps for later ones.

        Args:
            x: (B, R, D): the block's input at the next R rows; one row, or the first rows.
            seen: Changed in place.

        Returns:
            (B, R, D).
        """
        assert self.is_causal
        assert x.shape[1] == 1 or seen.num_rows == 0  # what several later rows may see would need a mask
        heads = self._heads(self.query_key_value(x), 3)
        return self._attend(x, heads[0], *seen.extend(heads[1:]), is_causal=x.shape[1] > 1)

    def remember(self, x: Tensor, asked: Tensor | None) -> tuple[Tensor, Tensor]:
        """``forward``, all positions or those ``asked`` (B, M) int64, and the keys and values (B, S, 2 D) of all."""
        assert not self.is_causal
        if asked is None:
            projected = self.query_key_value(x)
            return self._attend(x, *self._heads(projected, 3)), projected[..., x.shape[-1] :]
        at_asked, key_value = _at(x, asked), self.query_key_value.key_value(x)
        query = self._heads(self.query_key_value.query(at_asked), 1)
        return self._attend(at_asked, *query, *self._heads(key_value, 2)), key_value

    def update(self, x: Tensor, places: Tensor, key_value: Tensor, *, num_asked: int | None = None) -> Tensor:
        """``forward`` at some places, which attend to all; their keys and values take their old ones' places.

        Args:
            x: (B, R, D): the block's input at ``places``.
            places: (B, R) int64 in [0, S).
            key_value: (B, S, 2 D), changed in place.
            num_asked: Results wanted, those of the first places; None for all.

        Returns:
            (B, num_asked or R, D).
        """
        query, new = self.query_key_value(x).split([x.shape[-1], key_value.shape[-1]], dim=-1)
        key_value.scatter_(1, places.unsqueeze(-1).expand_as(new), new)
        query = self._heads(query[:, :num_asked], 1)
        return self._attend(x[:, :num_asked], *query, *self._heads(key_value, 2))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """(B, S, parts D) -> (parts, B, heads, S, D / heads)."""
        return rearrange(x, "b s (parts heads d) -> parts b heads s d", parts=parts, heads=self.num_heads)

    def _attend(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        asked: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Input (B, M, D) and what its heads attend to -> (B, M, D), or the rows where ``asked`` (B, M) is True."""
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )
        attended = rearrange(attended, "b heads m d -> b m (heads d)")
        if asked is not None:
            x, attended = _at(x, asked), _at(attended, asked)
        x = self.attention_norm(x + F.dropout(self.attention_output(attended), self.dropout, self.training))
        hidden = self.mlp_output(F.gelu(self.mlp_hidden(x), approximate="tanh"))
        normed: Tensor = self.mlp_norm(x + F.dropout(hidden, self.dropout, self.training))
        return normed


class Transformer(nn.Module):
    """What both transformers are made of: tables, blocks and a head that is tied to the word table.

    The sequence is [class, tokens in raster order]. All weights start from a normal truncated to two standard
    deviations, times 0.02; biases from 0.

    Args:
        config: Sizes.

    Raises:
        ValueError: The attention is another class's.
    """

    attention: Attention

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.attention != self.attention:
            raise ValueError(
                f"transformer attention: {type(self).__name__} has {self.attention!r}, got {config.attention!r}; "
                "networks.causal.build_transformer makes the one that a configuration names"
            )
        self.config = config
        self.words = nn.Embedding(config.vocabulary_size, config.width)
        self.positions = nn.Embedding(config.num_tokens + 1, config.width)
        self.embedding_norm = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_dense = nn.Linear(config.width, config.width)
        self.head_norm = nn.LayerNorm(config.width, eps=_LAYER_NORM_EPS)
        self.head_bias = nn.Parameter(torch.zeros(config.vocabulary_size))
        self.apply(_initialise)

    def _embed(self, sequence: Tensor, *, first: int = 0) -> Tensor:
        """Rows (B, R) of the word table, at places from ``first`` on -> (B, R, D)."""
        places = self.positions.weight[first : first + sequence.shape[1]]
        x = self.embedding_norm(self.words(sequence) + places)
        return F.dropout(x, self.config.dropout, self.training)

    def _sequence(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens (B, M) -> (B, 1 + M): rows of the word table, the class first."""
        return torch.cat([labels.unsqueeze(1) + self.config.num_codes, tokens], dim=1)

    def _head(self, x: Tensor, vocabulary: Vocabulary) -> Tensor:
        rows = self.config.num_codes if vocabulary == "codes" else self.config.vocabulary_size
        x = self.head_norm(F.gelu(self.head_dense(x), approximate="tanh"))
        return F.linear(x, self.words.weight[:rows], self.head_bias[:rows])


class MaskedTransformer(Transformer):
    """Predicts the codes of masked tokens from the visible ones and the class.

    Args:
        config: Sizes.

    Raises:
        ValueError: Causal attention.
    """

    attention = "bidirectional"

    def forward(
        self, tokens: Tensor, labels: Tensor, positions: Tensor | None = None, *, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Logits where they are asked for; the head runs nowhere else.

        Args:
            tokens: (B, N) int64: codes in [0, K), or ``mask_token_id``.
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            positions: None for all tokens; (B, M) int64 in [0, N) for M a row; (B, N) bool for those that are True, in
                raster order row after row. The last block runs at these alone, once it has attended to all.
            vocabulary: Columns: the K codes, or all rows of the word table.

        Returns:
            (B, N, V), (B, M, V) or (number of True, V) float.
        """
        x = self._embed(self._sequence(tokens, labels))
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, _after_class(positions))
        return self._head(x[:, 1:] if positions is None else x, vocabulary)

    def update(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, newly_known: Tensor, *, cache: ContextCache
    ) -> Tensor:
        """Logits at ``positions``; keys and values elsewhere are those of earlier calls. Approximate, for inference.

        Tokens that stay as they are keep the keys and values that were computed when more of the others were masked;
        the class's are computed anew, for they see all tokens. With an empty cache everything is computed: the result
        is ``forward``'s, and fills the cache.

        Args:
            tokens: As of ``forward``.
            labels: As of ``forward``.
            positions: (B, M) int64 in [0, N).
            newly_known: (B, P) int64 in [0, N): also computed anew, for their tokens are others than at the last call.
            cache: What earlier calls of this run have left; changed in place.

        Returns:
            (B, M, K) float: logits of the codes.
        """
        blocks = cast("Sequence[Block]", self.blocks)
        if not cache.key_values:
            x = self._embed(self._sequence(tokens, labels))
            for block in blocks:
                x, key_value = block.remember(x, positions + 1 if block is blocks[-1] else None)
                cache.key_values.append(key_value)
            return self._head(x, "codes")
        class_place = torch.zeros_like(positions[:, :1])
        places = torch.cat(
            [positions + 1, newly_known + 1, class_place], dim=1
        )  # (B, M + P + 1), those asked for first
        x = self.embedding_norm(self.words(self._sequence(tokens, labels).gather(1, places)) + self.positions(places))
        for block, key_value in zip(blocks, cache.key_values, strict=True):
            x = block.update(x, places, key_value, num_asked=positions.shape[1] if block is blocks[-1] else None)
        return self._head(x, "codes")


def _after_class(positions: Tensor | None) -> Tensor | None:
    """Positions among the tokens as positions of the sequence, where the class stands first."""
    if positions is None:
        return None
    return F.pad(positions, (1, 0)) if positions.dtype == torch.bool else positions + 1


def _at(x: Tensor, asked: Tensor) -> Tensor:
    """Rows of x (B, S, D): (M, D) where ``asked`` (B, S) bool is True, or (B, M, D) at ``asked`` (B, M) int64."""
    if asked.dtype == torch.bool:
        return x[asked]
    return x.gather(1, asked.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

"""The bidirectional transformer of MaskGIT: a post-norm BERT over a class token and the image's tokens.

``mvtm.MaskedTokenModel`` trains ``MaskedTransformer.measure_selected``; the predictors of ``decoding`` call
``forward_at``. ``AutoregressiveTransformer`` is the same network with a causal mask, the paper's baseline:
``autoregressive.AutoregressiveModel`` trains it, and ``decoding.AutoregressiveDecoder`` decodes with it.

Shapes: B images, N tokens, S = 1 + N positions of the sequence (the class first), D embedding dimension, V columns.

Source: paper, implementation details and Table 1 (VQGAN*, "the same setup as MaskGIT");
google-research/maskgit, ``maskgit_transformer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.networks.backbone import AutoregressiveBackbone, KVCache, TokenEmbedding, backbones
from maskgit_pl.networks.base_transformer import Transformer, TransformerSizes
from maskgit_pl.networks.kernels import FastLinear, add_output, attend, feed_forward

_INIT_STD = 0.02  # released code, also BERT's
_NORM_EPSILON = 1e-12  # of every layer norm; released code, far below torch's default of 1e-5


@backbones.register("bert")
@dataclass(frozen=True)
class TransformerConfig(TransformerSizes):
    """Sizes of the backbone ``bert``, by default the released ones; see ``TransformerSizes``.

    The class is the only condition: ``condition_dim`` is 0. Dropout applies to embeddings, attention
    probabilities and both outputs of a block.

    Args:
        embed_dim: D, a multiple of ``num_heads``.
    """

    embed_dim: int = 768
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 3072
    _: KW_ONLY
    backbone: str = "bert"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads("embed_dim")
        if self.condition_dim:
            raise ValueError(
                f"transformer condition_dim must be 0 for the backbone bert, which knows classes only, got "
                f"{self.condition_dim}; use the backbone adaln for conditioning vectors"
            )

    def create(self) -> MaskedTransformer:
        """Creates the transformer whose attention the configuration names, with initial weights."""
        return MaskedTransformer(self) if self.attention == "bidirectional" else AutoregressiveTransformer(self)


class MaskedTransformer(Transformer):
    """Predicts the codes of masked tokens from the visible ones and the class; see ``Backbone`` for its methods.

    The sequence is [class, tokens in raster order], and the head is tied to the token embedding. All weights start from
    a normal truncated to two standard deviations, times 0.02; biases from 0.
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        del self.blocks  # set below: the order of the modules decides the initial weights and the order of parameters
        # One row of positions more than tokens: the class.
        self.token_embedding = TokenEmbedding(config, config.embed_dim)
        self.position_embedding = nn.Embedding(config.num_tokens + 1, config.embed_dim)
        self.embedding_norm = nn.LayerNorm(config.embed_dim, eps=_NORM_EPSILON)
        sizes = config.embed_dim, config.num_heads, config.mlp_dim
        is_causal = config.attention == "causal"
        self.blocks = nn.ModuleList(
            Block(*sizes, dropout=config.dropout, is_causal=is_causal) for _ in range(config.depth)
        )
        self.head_dense = FastLinear(config.embed_dim, config.embed_dim, gelu=True)
        self.head_norm = nn.LayerNorm(config.embed_dim, eps=_NORM_EPSILON)
        # The head multiplies by the token embedding (tied weights) and adds a bias of its own.
        self.head_bias = nn.Parameter(torch.zeros(config.num_rows))
        self.apply(_initialise)

    def _hidden(
        self,
        tokens: Tensor,
        labels: Tensor,
        vectors: Tensor | None,
        *,
        selected: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        x = self._embed(self._sequence(tokens, labels))  # (B, 1 + N, D)
        for block in self.blocks[:-1]:
            x = block(x)
        last = cast("Block", self.blocks[-1])
        if selected is not None:  # the last MLP runs at these rows only
            x = last(x, selected + selected // tokens.shape[1] + 1)  # of sequences of 1 + N: the class comes first
        elif at is not None:  # keys and values of the last block need all positions, its queries and MLP only these
            x = last.forward_at(x, at + 1)
        else:
            x = last(x)[:, 1:]
        return self._last_norm(x)

    def _embed(self, sequence: Tensor, *, first: int = 0) -> Tensor:
        """Embeds ids (B, R) at the positions first, first + 1, ...: (B, R, D)."""
        positions = self.position_embedding.weight[first : first + sequence.shape[1]]
        x = self.embedding_norm(self.token_embedding(sequence) + positions)
        return F.dropout(x, self.config.dropout, self.training)

    def _sequence(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the ids (B, 1 + M) of a sequence: the class, whose id follows the codes', then tokens (B, M)."""
        return torch.cat([labels.unsqueeze(1) + self.config.codebook_size, tokens], dim=1)

    def _last_norm(self, x: Tensor) -> Tensor:
        """Returns what the head multiplies (..., D), from the output of the last block (..., D)."""
        normed: Tensor = self.head_norm(self.head_dense(x))
        return normed


class AutoregressiveTransformer(MaskedTransformer, AutoregressiveBackbone):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [class, x_1 .. x_{N-1}], and the output at each position predicts the next token. The weights have
    the names and shapes of ``MaskedTransformer``; the mask token's row and the last position are not used.
    """

    entry_points = AutoregressiveBackbone.entry_points

    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits (B, K) of the next token; see ``AutoregressiveBackbone``."""
        # The cache holds the rows before ``first``; only the new rows are computed.
        first = cache[0].num_rows if cache is not None else 0
        x = self._embed(self._sequence(tokens, labels)[:, first:], first=first)
        for number, block in enumerate(self.blocks):
            x = block(x, cache=None if cache is None else cache[number])
        return self._head("codes")(self._last_norm(x[:, -1]))

    def _hidden(
        self,
        tokens: Tensor,
        labels: Tensor,
        vectors: Tensor | None,
        *,
        selected: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        assert at is None  # decoding calls forward_next
        x = self._embed(self._sequence(tokens[:, :-1], labels))  # (B, N, D): nothing follows the last token
        for block in self.blocks:
            x = block(x)
        # Rows are selected before the head, the largest matrix product of the network.
        return self._last_norm(x if selected is None else F.embedding(selected, x.flatten(0, 1)))


def _initialise(module: nn.Module) -> None:
    """Draws the initial weights of a layer; norms keep torch's ones and zeros."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


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

    entry_points: ClassVar[tuple[str, ...]] = ("forward_at",)

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, *, dropout: float, is_causal: bool) -> None:
        super().__init__()
        # The order of the modules decides the initial weights: each draws from the same generator in turn.
        self.num_heads = num_heads
        self.dropout = dropout
        self.is_causal = is_causal
        self.qkv = FastLinear(embed_dim, 3 * embed_dim)  # rows of the weight: queries, keys, values
        self.proj = FastLinear(embed_dim, embed_dim)
        self.attention_norm = nn.LayerNorm(embed_dim, eps=_NORM_EPSILON)
        self.fc1 = FastLinear(embed_dim, mlp_dim, gelu=True)
        self.fc2 = FastLinear(mlp_dim, embed_dim)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=_NORM_EPSILON)

    def forward(self, x: Tensor, rows: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Returns the output of the block.

        Args:
            x: (B, S, D).
            rows: (M,) int64 in [0, B S): return only these rows of the (B S, D) output.
            cache: Keys and values of the rows before x, to which those of x are added; x is then one row, or the first.

        Returns:
            (B, S, D), or (M, D) with rows.
        """
        heads, is_causal = self._heads(self.qkv(x), 3), self.is_causal
        query, key, value = heads  # the gradient of two slices would be filled with zeros
        if cache is not None:
            assert x.shape[1] == 1 or cache.num_rows == 0  # several later rows would need a mask
            key, value = cache.extend(heads[1:])
            is_causal = x.shape[1] > 1  # a single new row attends to all rows so far
        attended = self._attend(query, key, value, is_causal=is_causal)
        if rows is not None:  # the rest works on rows, so all others can be dropped here
            x, attended = (F.embedding(rows, states.flatten(0, 1)) for states in (x, attended))
        return self._add_and_feed_forward(x, attended)

    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Returns the output (B, M, D) of the block for x (B, S, D) at positions (B, M) int64 in [0, S)."""
        assert not self.is_causal  # a position that is left out would shift the causal mask
        # Only M positions ask, but all S positions answer: keys and values of everything.
        rows, dim = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1])), x.shape[-1]
        key, value = self._heads(self.qkv.part(x, dim, 3 * dim), 2)
        (query,) = self._heads(self.qkv.part(rows, 0, dim), 1)
        return self._add_and_feed_forward(rows, self._attend(query, key, value))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """Splits (B, S, parts D) into heads: (parts, B, heads, S, D / heads)."""
        # einops would take longer, which shows in a decoding of one image.
        return x.view(*x.shape[:2], parts, self.num_heads, -1).permute(2, 0, 3, 1, 4)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> Tensor:
        """Computes (B, M, D): queries (B, heads, M, D / heads) attend to keys and values (B, heads, S, D / heads)."""
        return attend(query, key, value, dropout=self.dropout if self.training else 0.0, is_causal=is_causal)

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

"""The ``adaln`` backbone: a pre-norm transformer whose condition scales, shifts and gates every layer (adaLN-zero).

``mvtm.MaskedTokenModel`` trains it, and the predictors of ``decoding`` call ``forward_at``.
``AutoregressiveAdaLN`` is its causal form, a baseline as in the paper's Table 1. It is the network of
Halton-MaskGIT.

With the condition c = SiLU(class embedding + projected vector), a block computes

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = W c + b                        all zeros at the start
    x = x + gate_1 proj(attention(norm(x) (1 + scale_1) + shift_1))
    x = x + gate_2 fc2(SiLU(g) v),  (g, v) = fc1(norm(x) (1 + scale_2) + shift_2)       SwiGLU

where norm(x) = x / sqrt(mean(x^2) + 1e-5) (RMSNorm). Queries and keys are normalized in the same way, over all heads.

Shapes: B images, N tokens, S positions of the sequence (tokens in raster order, then registers), D embedding
dimension, C size of a conditioning vector, V columns.

Source: DiT, arXiv:2212.09748 (adaLN-zero); Halton-MaskGIT, arXiv:2503.17076, ``Network/transformer.py``; RMSNorm
arXiv:1910.07467; SwiGLU arXiv:2002.05202; norm of queries and keys arXiv:2302.05442; registers arXiv:2309.16588.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, TypeAlias, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_integer
from maskgit_pl.networks.backbone import AutoregressiveBackbone, KVCache, PredictAt, TokenEmbedding, backbones
from maskgit_pl.networks.base_transformer import LARGEST_SIZES, Transformer, TransformerSizes
from maskgit_pl.networks.kernels import FastLinear, attend, feed_forward, rms_norm

Modulation: TypeAlias = tuple[Tensor, ...]
"""shift_1, 1 + scale_1, gate_1, shift_2, 1 + scale_2 and gate_2, (B, 1, D) each."""

_EPS = 1e-5  # of every RMSNorm; released code
_INIT_STD = 0.02  # of embeddings; released code


@backbones.register("adaln")
@dataclass(frozen=True)
class AdaLNConfig(TransformerSizes):
    """Sizes and options of the ``adaln`` backbone; see ``TransformerSizes`` for the common ones.

    Args:
        embed_dim: D, a multiple of ``num_heads`` unless ``attention_dim`` is given.
        mlp_dim: Hidden size of the SwiGLU MLP, which has 3 D ``mlp_dim`` weights. 8 / 3 D costs as much as an
            ordinary MLP of 4 D.
        num_registers: Number of learned tokens that are added to the sequence and predict nothing, in [0, 1024];
            0 with causal attention.
        attention_dim: Size of all attention heads together, a multiple of ``num_heads``; None for D.
            Halton-MaskGIT's "small" has 6 heads of 85 numbers for D = 512.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 2048
    num_registers: int = 1
    attention_dim: int | None = None
    _: KW_ONLY
    backbone: str = "adaln"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("transformer num_registers", self.num_registers, "[0, 1024]")
        if self.attention_dim is not None:
            check_integer("transformer attention_dim", self.attention_dim, f"[1, {LARGEST_SIZES['embed_dim']}]")
        self._check_heads("attention_dim" if self.attention_dim else "embed_dim")
        if self.attention == "causal" and self.num_registers:
            raise ValueError(
                f"transformer num_registers must be 0 with attention 'causal', got {self.num_registers}; they "
                "follow the tokens, none of which would attend to them"
            )

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return (self.attention_dim or self.embed_dim) // self.num_heads

    @property
    def vocabulary_size(self) -> int:
        """The size of the vocabulary: codes, then the mask token. Classes have a table of their own."""
        return self.codebook_size + 1

    def create(self) -> AdaLNTransformer:
        """Creates the network whose attention the configuration names, with initial weights."""
        return AdaLNTransformer(self) if self.attention == "bidirectional" else AutoregressiveAdaLN(self)


class AdaLNBlock(nn.Module):
    """A pre-norm block of attention and SwiGLU; see the module for its formulas.

    Attributes:
        entry_points: Methods that a network calls besides ``forward``. FSDP2 gathers the weights for them too.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("modulate",)

    def __init__(self, config: AdaLNConfig) -> None:
        super().__init__()
        dim, heads_dim = config.embed_dim, config.num_heads * config.head_dim  # the same, unless attention_dim is given
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.is_causal = config.attention == "causal"
        # The norms have no weights: the scale of the condition has a bias.
        self.modulation = FastLinear(dim, 6 * dim)
        self.query = FastLinear(dim, heads_dim, bias=False)
        self.key_value = FastLinear(dim, 2 * heads_dim, bias=False)
        self.proj = FastLinear(heads_dim, dim, bias=False)
        # Rows of the weight: the gate g, then the value v.
        self.fc1 = FastLinear(dim, 2 * config.mlp_dim, bias=False)
        self.fc2 = FastLinear(config.mlp_dim, dim, bias=False)

    def modulate(self, condition: Tensor) -> Modulation:
        """Returns the modulation of a condition (B, D)."""
        parts = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)  # 6 times (B, 1, D)
        return parts[0], 1 + parts[1], parts[2], parts[3], 1 + parts[4], parts[5]

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        modulation: Modulation | None = None,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns the output of the block, at all positions or at some.

        Args:
            x: (B, S, D).
            condition: (B, D): the condition c.
            modulation: ``modulate(condition)``, if it is known already.
            rows: (M,) int64 in [0, B S): return only these rows of the (B S, D) output.
            positions: (B, M) int64 in [0, S): return only these rows; not with causal attention.
            cache: Keys and values of the rows before x, to which those of x are added; x is then one row, or the first.

        Returns:
            (B, S, D), (M, D) with rows, or (B, M, D) with positions.
        """
        # The method of the class: FSDP2 has gathered the weights already.
        parts: Sequence[Tensor] = type(self).modulate(self, condition) if modulation is None else modulation
        normed = _modulate(rms_norm(x, eps=_EPS), *parts[:2])
        if positions is not None:
            index = positions.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            x, asking = x.gather(1, index), normed.gather(1, index)
            attended = self._attend(asking, normed)
        else:
            attended = self._attend(normed, normed, cache=cache)
        if rows is not None:  # the rest works on rows, so all others can be dropped here
            images = rows // x.shape[1]
            # Unlike that of an index, the gradient of a lookup is bit-equal with any number of threads.
            x, attended = (F.embedding(rows, states.flatten(0, 1)) for states in (x, attended))
            parts = [F.embedding(images, part[:, 0]) for part in parts]
        x = torch.addcmul(x, F.dropout(self.proj(attended), self.dropout, self.training), parts[2])
        normed = _modulate(rms_norm(x, eps=_EPS), *parts[3:5])
        return torch.addcmul(x, feed_forward(normed, self.fc1, self.fc2, self._gate), parts[5])

    def _gate(self, gate: Tensor, value: Tensor) -> Tensor:
        # In place where nothing is differentiated: new memory takes more time than SiLU.
        return F.dropout(F.silu(gate, inplace=not torch.is_grad_enabled()) * value, self.dropout, self.training)

    def _attend(self, asking: Tensor, answering: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """Computes attention (B, M, D) of rows (B, M, D) to rows (B, S, D)."""
        query = self.query(asking)
        key, value = self.key_value(answering).chunk(2, dim=-1)
        query, key = (rms_norm(part, eps=_EPS) for part in (query, key))  # over all heads
        query, key, value = (
            rearrange(part, "b s (heads d) -> b heads s d", heads=self.num_heads) for part in (query, key, value)
        )
        if cache is not None:
            key, value = cache.extend(torch.stack([key, value]))
        is_causal = self.is_causal and query.shape[2] > 1  # a single new row attends to all rows so far
        return attend(query, key, value, dropout=self.dropout if self.training else 0.0, is_causal=is_causal)


class AdaLNTransformer(Transformer):
    """Predicts the codes of masked tokens from the visible ones, the class and, if there is one, a vector."""

    config: AdaLNConfig
    class_tables = ("class_embedding.weight",)

    def __init__(self, config: AdaLNConfig) -> None:
        super().__init__(config)
        dim, has_null = config.embed_dim, config.null_label is not None
        # The order of the modules decides the initial weights.
        self.token_embedding = TokenEmbedding(config, dim)
        self.class_embedding = nn.Embedding(config.num_classes + has_null, dim)  # the null class last
        self.position_embedding = nn.Embedding(config.num_tokens, dim)
        self.register_embedding = nn.Embedding(config.num_registers, dim) if config.num_registers else None
        self.vector_proj = nn.Linear(config.condition_dim, dim) if config.condition_dim else None
        self.null_vector = (
            nn.Parameter(torch.zeros(config.condition_dim)) if config.condition_dim and has_null else None
        )
        self.blocks.extend(AdaLNBlock(config) for _ in range(config.depth))
        self.head_modulation = FastLinear(dim, 2 * dim)
        self.head_bias = nn.Parameter(torch.zeros(config.num_rows))
        self.apply(_initialise)
        for module in (self.head_modulation, *(block.modulation for block in self._blocks())):
            nn.init.zeros_(module.weight)  # adaLN-zero: each block starts as the identity

    def forward_at(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        vectors: Tensor | None = None,
        modulations: Sequence[Modulation] | None = None,
    ) -> Tensor:
        """Returns the logits (B, M, K) at ``positions``; see ``Backbone``.

        ``modulations`` are those of the blocks, if they are known already (``conditioned``).
        """
        return self._head("codes")(self._hidden(tokens, labels, vectors, at=positions, modulations=modulations))

    def conditioned(self, labels: Tensor, vectors: Tensor | None = None) -> PredictAt:
        """Returns ``forward_at`` with fixed classes: their modulations, a third of the weights, are computed here."""
        condition = F.silu(self._embed_condition(labels, vectors))
        modulations = [block.modulate(condition) for block in self._blocks()]
        return lambda tokens, positions: self.forward_at(
            tokens, labels, positions, vectors=vectors, modulations=modulations
        )

    def _hidden(
        self,
        tokens: Tensor,
        labels: Tensor,
        vectors: Tensor | None,
        *,
        selected: Tensor | None = None,
        at: Tensor | None = None,
        modulations: Sequence[Modulation] | None = None,
    ) -> Tensor:
        condition = F.silu(self._embed_condition(labels, vectors))
        x = self.token_embedding(tokens) + self.position_embedding.weight
        if self.register_embedding is not None:
            # Not len(x), which would fix the batch size of an exported network.
            x = torch.cat([x, self.register_embedding.weight.expand(x.shape[0], -1, -1)], dim=1)  # (B, S, D)
        known: Sequence[Modulation | None] = modulations or [None] * len(self.blocks)
        *before, (block, modulation) = zip(self._blocks(), known, strict=True)
        for earlier, own in before:
            x = earlier(x, condition, modulation=own)
        if selected is not None:  # the last MLP runs at these rows only
            images = selected // tokens.shape[1]
            rows = selected + images * (x.shape[1] - tokens.shape[1])  # registers are at the end
            x, condition = block(x, condition, rows=rows), F.embedding(images, condition)  # (M, D)
        elif at is not None:  # the last block's queries and MLP run at these positions only
            x, condition = block(x, condition, modulation=modulation, positions=at), condition.unsqueeze(1)
        else:
            x, condition = block(x, condition)[:, : tokens.shape[1]], condition.unsqueeze(1)
        return self._modulate_last(x, condition)

    def _embed_condition(self, labels: Tensor, vectors: Tensor | None) -> Tensor:
        """Embeds labels (B,) int64 and vectors (B, C): (B, D). The null label hides the vector."""
        embedded: Tensor = self.class_embedding(labels)
        if self.vector_proj is None:
            return embedded
        if vectors is None:
            raise ValueError(
                f"vectors must be given to a network with condition_dim {self.config.condition_dim}, got None"
            )
        vectors = vectors.to(embedded.dtype)
        if self.null_vector is not None:
            is_null = labels.eq(self.config.num_classes).unsqueeze(1)  # (B, 1)
            vectors = torch.where(is_null, self.null_vector, vectors)
        projected: Tensor = self.vector_proj(vectors)
        return embedded + projected

    def _modulate_last(self, x: Tensor, condition: Tensor) -> Tensor:
        """Returns the last norm (..., D) of hidden states (..., D), modulated by the condition (..., D)."""
        shift, scale = self.head_modulation(condition).chunk(2, dim=-1)
        return _modulate(rms_norm(x, eps=_EPS), shift, 1 + scale)

    def _blocks(self) -> Sequence[AdaLNBlock]:
        return cast("Sequence[AdaLNBlock]", self.blocks)


class AutoregressiveAdaLN(AdaLNTransformer, AutoregressiveBackbone):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [mask token, x_1 .. x_{N-1}], and the output at each position predicts the next token.
    """

    entry_points = AutoregressiveBackbone.entry_points

    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits (B, K) of the next token; see ``AutoregressiveBackbone``."""
        x, condition = self._run(tokens, labels, None, cache)
        return self._head("codes")(self._modulate_last(x[:, -1], condition))

    def _hidden(
        self,
        tokens: Tensor,
        labels: Tensor,
        vectors: Tensor | None,
        *,
        selected: Tensor | None = None,
        at: Tensor | None = None,
        modulations: Sequence[Modulation] | None = None,
    ) -> Tensor:
        assert at is None  # decoding calls forward_next
        x, condition = self._run(tokens[:, :-1], labels, vectors)  # nothing follows the last token
        if selected is None:
            return self._modulate_last(x, condition.unsqueeze(1))
        # Rows are selected before the head, the largest matrix product of the network.
        x, condition = F.embedding(selected, x.flatten(0, 1)), F.embedding(selected // tokens.shape[1], condition)
        return self._modulate_last(x, condition)

    def _run(
        self, tokens: Tensor, labels: Tensor, vectors: Tensor | None, cache: Sequence[KVCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the output of the blocks (B, rows that the cache lacks, D), and the condition (B, D)."""
        first = cache[0].num_rows if cache is not None else 0
        condition = F.silu(self._embed_condition(labels, vectors))
        start = torch.full_like(labels, self.config.mask_token_id).unsqueeze(1)  # (B, 1)
        x = self.token_embedding(torch.cat([start, tokens], dim=1))  # (B, 1 + t, D)
        x = (x + self.position_embedding.weight[: x.shape[1]])[:, first:]
        for number, block in enumerate(self.blocks):
            x = block(x, condition, cache=None if cache is None else cache[number])
        return x, condition


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale)


def _initialise(module: nn.Module) -> None:
    """Draws the initial weights of a layer as in the released code of Halton-MaskGIT."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)

"""The ``adaln`` backbone: a pre-norm transformer whose condition scales, shifts and gates every layer (adaLN-zero).

``mvtm.MaskedTokenModel`` trains it, and the predictors of ``decoding`` call ``forward_at``.
``AutoregressiveAdaLN`` is its causal form, a baseline as in the paper's Table 1. It is the network of
Halton-MaskGIT, or with ``conditioning: token`` that of MaskGIL.

With the condition c = SiLU(class embedding + projected vector), a block computes

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = W c + b                        all zeros at the start
    x = x + gate_1 proj(attention(norm(x) (1 + scale_1) + shift_1))
    x = x + gate_2 fc2(SiLU(g) v),  (g, v) = fc1(norm(x) (1 + scale_2) + shift_2)       SwiGLU

where norm(x) = x / sqrt(mean(x^2) + 1e-5) (RMSNorm). Queries and keys are normalized in the same way, over all heads.

With ``conditioning: token``, the embedded condition is a token of the sequence instead, the norms have weights, queries
and keys are not normalized but rotated by their positions, and the logits have a table of their own: a LLaMA block.

Shapes: B images, N tokens, S positions of the sequence (tokens in raster order, then the class token if there
is one, then registers), D embedding dimension, C size of a conditioning vector, V columns.

Source: DiT, arXiv:2212.09748 (adaLN-zero); Halton-MaskGIT, arXiv:2503.17076, ``Network/transformer.py``;
MaskGIL, arXiv:2507.13032, ``Network/gpt.py``; RMSNorm arXiv:1910.07467; SwiGLU arXiv:2002.05202; norm of
queries and keys arXiv:2302.05442; registers arXiv:2309.16588; rotary positions arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, TypeAlias, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.checks import check_choice, check_integer
from maskgit_pl.networks.backbone import (
    LARGEST_SIZES,
    Attention,
    AutoregressiveBackbone,
    Backbone,
    BackboneConfig,
    KVCache,
    PredictAt,
    Project,
    TokenEmbedding,
    Vocabulary,
    backbones,
    token_logits,
)
from maskgit_pl.networks.kernels import PackingLinear, attend, feed_forward, rms_norm

Conditioning = Literal["adaln", "token"]

Modulation: TypeAlias = tuple[Tensor | None, ...]
"""shift_1, 1 + scale_1, gate_1, shift_2, 1 + scale_2 and gate_2, (B, 1, D) each; Nones with ``conditioning: token``."""

_EPS = 1e-5  # of every RMSNorm; both released networks
_INIT_STD = 0.02  # of embeddings; both released networks
_ROTARY_BASE = 10_000.0  # largest wavelength of the rotary positions in units of 2 pi tokens; MaskGIL


@backbones.register("adaln")
@dataclass(frozen=True)
class AdaLNConfig(BackboneConfig):
    """Sizes and options of the ``adaln`` backbone; see ``BackboneConfig`` for the common ones.

    Args:
        embed_dim: D, a multiple of ``num_heads`` unless ``attention_dim`` is given.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        mlp_dim: Hidden size of the SwiGLU MLP, which has 3 D ``mlp_dim`` weights. 8 / 3 D costs as much as an
            ordinary MLP of 4 D.
        num_registers: Number of learned tokens that are added to the sequence and predict nothing, in [0, 1024].
        conditioning: ``adaln``: the condition modulates every block, as in Halton-MaskGIT; ``token``: it is a token of
            the sequence, in a network of LLaMA blocks, as in MaskGIL (see the module).
        attention_dim: Size of all attention heads together, a multiple of ``num_heads``; None for D.
            Halton-MaskGIT's "small" has 6 heads of 85 numbers for D = 512.
        attention: ``bidirectional``: a token attends to all tokens; ``causal``: to itself and those before it
            in raster order, without registers, and with ``adaln``. Both have the same weights.
    """

    has_token_groups: ClassVar[bool] = True
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 2048
    num_registers: int = 1
    conditioning: Conditioning = "adaln"
    attention_dim: int | None = None
    _: KW_ONLY
    backbone: str = "adaln"
    attention: Attention = "bidirectional"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in LARGEST_SIZES.items():
            check_integer(f"transformer {name}", getattr(self, name), f"[1, {most}]")
        check_integer("transformer num_registers", self.num_registers, "[0, 1024]")
        if self.attention_dim is not None:
            check_integer("transformer attention_dim", self.attention_dim, f"[1, {LARGEST_SIZES['embed_dim']}]")
        name, heads_dim = ("attention_dim", self.attention_dim) if self.attention_dim else ("embed_dim", self.embed_dim)
        if heads_dim % self.num_heads:
            raise ValueError(f"transformer {name} must be a multiple of num_heads {self.num_heads}, got {heads_dim}")
        check_choice("transformer conditioning", self.conditioning, get_args(Conditioning))
        check_choice("transformer attention", self.attention, get_args(Attention))
        if self.attention == "causal" and (self.num_registers or self.conditioning == "token"):
            raise ValueError(
                "transformer attention 'causal' must have num_registers 0 and conditioning 'adaln', got "
                f"{self.num_registers} and {self.conditioning!r}"
            )
        if self.conditioning == "token" and self.head_dim % 2:  # pairs of numbers are rotated
            raise ValueError(
                f"transformer {name} / num_heads must be even for conditioning 'token', got {self.head_dim}"
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
        dim, hidden, is_modulated = config.embed_dim, config.mlp_dim, config.conditioning == "adaln"
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.is_causal = config.attention == "causal"
        # Modulated norms need no weights: the scale of the condition has a bias.
        self.modulation = PackingLinear(dim, 6 * dim) if is_modulated else None
        self.attention_norm = nn.RMSNorm(dim, eps=_EPS, elementwise_affine=not is_modulated)
        heads_dim = config.num_heads * config.head_dim  # D, unless attention_dim is given
        self.query = PackingLinear(dim, heads_dim, bias=False)
        self.key_value = PackingLinear(dim, 2 * heads_dim, bias=False)
        self.proj = PackingLinear(heads_dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim, eps=_EPS, elementwise_affine=not is_modulated)
        self.fc1 = PackingLinear(dim, 2 * hidden, bias=False)  # rows of the weight: the gate g, then the value v
        self.fc2 = PackingLinear(hidden, dim, bias=False)

    def modulate(self, condition: Tensor) -> Modulation:
        """Returns the modulation of a condition (B, D)."""
        if self.modulation is None:
            return (None,) * 6
        parts = list(self.modulation(condition).unsqueeze(1).chunk(6, dim=-1))  # 6 times (B, 1, D)
        return parts[0], 1 + parts[1], parts[2], parts[3], 1 + parts[4], parts[5]

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotation: Tensor | None = None,
        *,
        modulation: Modulation | None = None,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Returns the output of the block, at all positions or at some.

        Args:
            x: (B, S, D).
            condition: (B, D): the condition c; not used with ``conditioning: token``.
            rotation: (S, D / heads / 2, 2): cosines and sines of the positions, with ``conditioning: token``.
            modulation: ``modulate(condition)``, if it is known already.
            rows: (M,) int64 in [0, B S): return only these rows of the (B S, D) output.
            positions: (B, M) int64 in [0, S): return only these rows; not with causal attention.
            cache: Keys and values of the rows before x, to which those of x are added; x is then one row, or the first.

        Returns:
            (B, S, D), (M, D) with rows, or (B, M, D) with positions.
        """
        # The method of the class: FSDP2 has gathered the weights already.
        parts: Sequence[Tensor | None] = type(self).modulate(self, condition) if modulation is None else modulation
        normed = _modulate(rms_norm(x, self.attention_norm.weight, eps=_EPS), *parts[:2])
        if positions is not None:
            index = positions.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            x, asking = x.gather(1, index), normed.gather(1, index)
            attended = self._attend(asking, normed, rotation, positions)
        else:
            attended = self._attend(normed, normed, rotation, cache=cache)
        if rows is not None:  # the rest works on rows, so all others can be dropped here
            images = rows // x.shape[1]
            # Unlike that of an index, the gradient of a lookup is bit-equal with any number of threads.
            x, attended = (F.embedding(rows, states.flatten(0, 1)) for states in (x, attended))
            parts = [None if part is None else F.embedding(images, part[:, 0]) for part in parts]
        x = _add(x, F.dropout(self.proj(attended), self.dropout, self.training), parts[2])
        normed = _modulate(rms_norm(x, self.mlp_norm.weight, eps=_EPS), *parts[3:5])
        return _add(x, feed_forward(normed, self.fc1, self.fc2, self._gate), parts[5])

    def _gate(self, gate: Tensor, value: Tensor) -> Tensor:
        # In place where nothing is differentiated: new memory takes more time than SiLU.
        return F.dropout(F.silu(gate, inplace=not torch.is_grad_enabled()) * value, self.dropout, self.training)

    def _attend(
        self,
        asking: Tensor,
        answering: Tensor,
        rotation: Tensor | None,
        at: Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Computes attention (B, M, D) of rows (B, M, D), at the positions ``at`` (B, M) or all, to (B, S, D)."""
        query = self.query(asking)
        key, value = self.key_value(answering).chunk(2, dim=-1)
        if self.modulation is not None:  # over all heads
            query, key = (rms_norm(part, eps=_EPS) for part in (query, key))
        query, key, value = (
            rearrange(part, "b s (heads d) -> b heads s d", heads=self.num_heads) for part in (query, key, value)
        )
        if rotation is not None:
            # At some positions each image has rows of its own; they are the same for all heads.
            query = rotate(query, rotation if at is None else rotation[at].unsqueeze(1))
            key = rotate(key, rotation)
        if cache is not None:
            key, value = cache.extend(torch.stack([key, value]))
        is_causal = self.is_causal and query.shape[2] > 1  # a single new row attends to all rows so far
        return attend(query, key, value, dropout=self.dropout if self.training else 0.0, is_causal=is_causal)


class AdaLNTransformer(Backbone):
    """Predicts the codes of masked tokens from the visible ones, the class and, if there is one, a vector.

    Attributes:
        attention: Attention that the class computes.
    """

    takes_project = True
    attention: ClassVar[Attention] = "bidirectional"
    config: AdaLNConfig
    vocabulary_tables = ("token_embedding.weight", "head_embedding.weight", "head_bias")
    class_tables = ("class_embedding.weight",)
    position_tables = ("position_embedding.weight",)

    def __init__(self, config: AdaLNConfig) -> None:
        super().__init__(config)
        assert config.attention == self.attention  # config.create() chooses the class
        dim, has_null = config.embed_dim, config.null_label is not None
        # The order of the modules decides the initial weights.
        self.token_embedding = TokenEmbedding(config, dim)
        self.class_embedding = nn.Embedding(config.num_classes + has_null, dim)  # the null class last
        is_modulated = config.conditioning == "adaln"
        self.position_embedding = nn.Embedding(config.num_tokens, dim) if is_modulated else None
        self.register_embedding = nn.Embedding(config.num_registers, dim) if config.num_registers else None
        self.vector_proj = nn.Linear(config.condition_dim, dim) if config.condition_dim else None
        self.null_vector = (
            nn.Parameter(torch.zeros(config.condition_dim)) if config.condition_dim and has_null else None
        )
        self.blocks.extend(AdaLNBlock(config) for _ in range(config.depth))
        self.head_modulation = PackingLinear(dim, 2 * dim) if is_modulated else None
        self.head_norm = nn.RMSNorm(dim, eps=_EPS, elementwise_affine=not is_modulated)
        self.head_embedding = None if is_modulated else nn.Embedding(config.num_rows, dim)
        self.head_bias = nn.Parameter(torch.zeros(config.num_rows))
        self.apply(_initialise)
        for module in (self.head_modulation, *(block.modulation for block in self._blocks())):
            if module is not None:  # adaLN-zero: each block starts as the identity
                nn.init.zeros_(module.weight)

    def forward(
        self, tokens: Tensor, labels: Tensor, *, vectors: Tensor | None = None, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits (B, N, V) of all tokens; see ``Backbone``."""
        x, condition, rotation = self._before_last(tokens, labels, vectors)
        x = self.blocks[-1](x, condition, rotation)[:, : tokens.shape[1]]
        return self._head(x, condition.unsqueeze(1), vocabulary)

    def forward_selected(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
        project: Project = F.linear,
    ) -> Tensor:
        """Returns the logits (M, V) at ``positions``; see ``Backbone``. The head runs there only."""
        return self._head(*self._hidden_at(tokens, labels, positions, vectors), vocabulary, project)

    def _hidden_at(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the inputs of the head at ``positions``: hidden states and conditions, (M, D) each."""
        x, condition, rotation = self._before_last(tokens, labels, vectors)
        images = positions // tokens.shape[1]
        rows = positions + images * (x.shape[1] - tokens.shape[1])  # class token and registers are at the end
        # The last MLP runs at these rows only.
        return self.blocks[-1](x, condition, rotation, rows=rows), F.embedding(images, condition)

    def forward_at(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        vectors: Tensor | None = None,
        modulations: Sequence[Modulation] | None = None,
    ) -> Tensor:
        """Returns the logits (B, M, K) at ``positions``. The last block's queries and the head run there only.

        ``modulations`` are those of the blocks, if they are known already (``conditioned``).
        """
        x, condition, rotation = self._before_last(tokens, labels, vectors, modulations)
        modulation = None if modulations is None else modulations[-1]
        x = self.blocks[-1](x, condition, rotation, modulation=modulation, positions=positions)
        return self._head(x, condition.unsqueeze(1), "codes")

    def conditioned(self, labels: Tensor, vectors: Tensor | None = None) -> PredictAt:
        """Returns ``forward_at`` with fixed classes: their modulations, a third of the weights, are computed here."""
        condition = F.silu(self._embed_condition(labels, vectors))
        modulations = [block.modulate(condition) for block in self._blocks()]
        return lambda tokens, positions: self.forward_at(
            tokens, labels, positions, vectors=vectors, modulations=modulations
        )

    def _before_last(
        self,
        tokens: Tensor,
        labels: Tensor,
        vectors: Tensor | None,
        modulations: Sequence[Modulation] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the input (B, S, D) of the last block, the condition (B, D), and the rotary table or None."""
        embedded = self._embed_condition(labels, vectors)
        x = self._embed(tokens, embedded)
        condition = F.silu(embedded)
        is_rotary = self.config.conditioning == "token"
        rotation = rotation_table(x.shape[1], self.config.head_dim, x.device) if is_rotary else None
        for number, block in enumerate(self.blocks[:-1]):
            modulation = None if modulations is None else modulations[number]
            x = block(x, condition, rotation, modulation=modulation)
        return x, condition, rotation

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

    def _embed(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Embeds tokens (B, N), and adds the class token and the registers: (B, S, D)."""
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            parts = [x + self.position_embedding.weight]
        else:
            parts = [x, condition.unsqueeze(1)]
        if self.register_embedding is not None:
            # Not len(x), which would fix the batch size of an exported network.
            parts.append(self.register_embedding.weight.expand(x.shape[0], -1, -1))
        return torch.cat(parts, dim=1)

    def _head(self, x: Tensor, condition: Tensor, vocabulary: Vocabulary, project: Project = F.linear) -> Tensor:
        """Computes the logits (..., V) of hidden states (..., D), given the condition (..., D)."""
        x = rms_norm(x, self.head_norm.weight, eps=_EPS)
        if self.head_modulation is not None:
            shift, scale = self.head_modulation(condition).chunk(2, dim=-1)
            x = _modulate(x, shift, 1 + scale)
        table = (self.head_embedding or self.token_embedding).weight
        return token_logits(x, table, self.head_bias, config=self.config, vocabulary=vocabulary, project=project)

    def _blocks(self) -> Sequence[AdaLNBlock]:
        return cast("Sequence[AdaLNBlock]", self.blocks)


class AutoregressiveAdaLN(AdaLNTransformer, AutoregressiveBackbone):
    """Predicts the code of each token from the class and the tokens before it, in raster order.

    The sequence is [mask token, x_1 .. x_{N-1}], and the output at each position predicts the next token.
    """

    attention = "causal"
    entry_points = AutoregressiveBackbone.entry_points

    def forward(
        self, tokens: Tensor, labels: Tensor, *, vectors: Tensor | None = None, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits (B, N, V) of all tokens (B, N) in one pass, each from the tokens before it."""
        x, condition = self._run(tokens[:, :-1], labels, vectors)
        return self._head(x, condition.unsqueeze(1), vocabulary)

    def _hidden_at(
        self, tokens: Tensor, labels: Tensor, positions: Tensor, vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, condition = self._run(tokens[:, :-1], labels, vectors)
        return F.embedding(positions, x.flatten(0, 1)), F.embedding(positions // tokens.shape[1], condition)

    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits (B, K) of the next token; see ``AutoregressiveBackbone``."""
        x, condition = self._run(tokens, labels, None, cache)
        return self._head(x[:, -1], condition, "codes")

    def _run(
        self, tokens: Tensor, labels: Tensor, vectors: Tensor | None, cache: Sequence[KVCache] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the input of the head (B, rows that the cache lacks, D), and the condition (B, D)."""
        first = cache[0].num_rows if cache is not None else 0
        embedded = self._embed_condition(labels, vectors)
        start = torch.full_like(labels, self.config.mask_token_id).unsqueeze(1)  # (B, 1)
        x = self.token_embedding(torch.cat([start, tokens], dim=1))  # (B, 1 + t, D)
        assert self.position_embedding is not None  # as the conditioning is not ``token``
        x = (x + self.position_embedding.weight[: x.shape[1]])[:, first:]
        condition = F.silu(embedded)
        for number, block in enumerate(self.blocks):
            x = block(x, condition, cache=None if cache is None else cache[number])
        return x, condition


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """Returns x scale + shift, or x without a modulation."""
    return x if shift is None or scale is None else torch.addcmul(shift, x, scale)


def _add(x: Tensor, change: Tensor, gate: Tensor | None) -> Tensor:
    """Returns x + gate change, or x + change without a gate."""
    return x + change if gate is None else torch.addcmul(x, change, gate)


def _initialise(module: nn.Module) -> None:
    """Draws the initial weights of a layer as in the released code of Halton-MaskGIT."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates pairs of neighbouring numbers by angles that grow with their position.

    A pair (a, b) at a place t turns by the angle t w into (a cos - b sin, b cos + a sin), so that the product
    of a query and a key depends on the difference of their places only.

    Args:
        x: (..., S, D) float, D even.
        table: (..., S, D / 2, 2) float: cosine and sine of each pair.

    Returns:
        (..., S, D) in the dtype of x.

    Source: RoFormer, arXiv:2104.09864.
    """
    first, second = rearrange(x.float(), "... (pairs two) -> two ... pairs", two=2)  # (..., S, D / 2)
    cos, sin = table.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).type_as(x)


def rotation_table(length: int, size: int, device: torch.device) -> Tensor:
    """Computes the cosines and sines of a sequence: the tokens of a grid, then a class token and registers.

    As in the released MaskGIL code, position t of the sequence is rotated by t - 1, and the first one has a table of
    zeros, so that its query and key vanish. Pair i of P has the frequency 10000^(-i / P).

    Args:
        length: S, positions of the sequence.
        size: D, size of a head.
        device: Device that computes the table. It is cheap and not kept: a tensor that a fake or an inference
            mode made would fail in training.

    Returns:
        (S, D / 2, 2) float32.
    """
    frequencies = _ROTARY_BASE ** (-torch.arange(0, size, 2, device=device).float() / size)
    angles = torch.outer((torch.arange(length, device=device) - 1).float(), frequencies)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    table[0] = 0
    return table

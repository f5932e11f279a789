"""The peers of the benchmarks: networks of other projects, a plain decoding loop for them, and the sizes of stage 2."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskgit_pl.data import Batch
from maskgit_pl.masking import MaskSampler
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import mask_schedules

Decode = Callable[[], Tensor]
"""Decodes a batch and gives its tokens (B, N)."""

NUM_STEPS = 8

ENCODER = "encoder layers of torch, as dome272"
BERT = "BertModel of transformers, as 1d-tokenizer"
VQMODEL = "diffusers VQModel"
_PACKAGES = {BERT: "transformers", VQMODEL: "diffusers"}
"""The packages that peers need."""


def list_installed(names: Sequence[str]) -> list[str]:
    """Returns the contenders whose packages are installed, and prints the others."""
    missing = [name for name in names if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None]
    for name in missing:
        print(f"{name} is not installed and is left out; to install it: python -m pip install -e '.[benchmarks]'")
    return [name for name in names if name not in missing]


@dataclass(frozen=True)
class Task:
    """The sizes of the network and the batch, without dropout.

    The vocabulary is codebook_size + num_classes + 1: 2025 as released.
    """

    batch: int = 8
    depth: int = 4
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_heads: int = 16
    grid: tuple[int, int] = (16, 16)
    codebook_size: int = 1024
    num_classes: int = 1000

    @property
    def network(self) -> TransformerConfig:
        return TransformerConfig(
            self.codebook_size, self.num_classes, self.grid, self.embed_dim, self.depth, self.num_heads, self.mlp_dim,
            dropout=0.0, class_dropout=0.0,
        )  # fmt: skip

    @property
    def labels(self) -> list[int]:
        """The classes that are decoded: all in turn."""
        return [number % self.num_classes for number in range(self.batch)]

    def describe(self) -> str:
        """Returns the sizes in words."""
        return f"{self.depth} layers x {self.embed_dim}, {self.network.num_tokens + 1} tokens, batch {self.batch}"

    def data(self) -> Batch:
        """Returns the batch that every contender trains on in every round."""
        chance = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.codebook_size, (self.batch, self.network.num_tokens), generator=chance)
        labels = torch.randint(self.num_classes, (self.batch,), generator=chance)
        # Sample i is at position i of epoch 0, and no row is padding.
        index = torch.arange(self.batch)
        return Batch(tokens, labels, index, torch.zeros_like(index), index, index >= 0)

    def mask(self) -> Tensor:
        """Returns the mask (B, N) bool that training draws for ``data``."""
        batch = self.data()
        return MaskSampler(mask_schedules.build("cosine"), seed=0).mask(
            self.network.num_tokens,
            index=batch.index,
            epoch=batch.epoch,
            position=batch.position,
            global_batch=self.batch,
        )


class Encoder(nn.Module):
    """A post-norm layer of torch's own modules with the erf form of GELU, as in dome272/MaskGIT-pytorch."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        width = task.embed_dim
        self.attention = nn.MultiheadAttention(width, task.num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, task.mlp_dim), nn.GELU(), nn.Linear(task.mlp_dim, width))
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, S, D) to (B, S, D)."""
        attended, _ = self.attention(x, x, x, need_weights=False)
        x = self.attention_norm(x + attended)
        normed: Tensor = self.mlp_norm(x + self.mlp(x))
        return normed


class EncoderPeer(nn.Module):
    """The network of dome272/MaskGIT-pytorch: ``Encoder`` layers, and a head that is tied to the token embedding.

    Its released code has no classes; here the class is a token of the sequence, as in ours.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        config = task.network
        self.codebook_size = config.codebook_size
        self.tokens = nn.Embedding(config.vocabulary_size, config.embed_dim)
        self.positions = nn.Parameter(0.02 * torch.randn(config.num_tokens + 1, config.embed_dim))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-12)
        self.layers = nn.Sequential(*(Encoder(task) for _ in range(config.depth)))
        self.head = nn.Sequential(
            nn.Linear(config.embed_dim, config.embed_dim), nn.GELU(), nn.LayerNorm(config.embed_dim, eps=1e-12)
        )
        self.bias = nn.Parameter(torch.zeros(config.num_tokens + 1, config.vocabulary_size))
        nn.init.trunc_normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits (B, N, V) of tokens (B, N) int64 and labels (B,) int64."""
        sequence = torch.cat([labels.unsqueeze(1) + self.codebook_size, tokens], dim=1)
        x = self.layers(self.norm(self.tokens(sequence) + self.positions))
        logits: Tensor = self.head(x) @ self.tokens.weight.T + self.bias
        return logits[:, 1:]


class BertPeer(nn.Module):
    """The network of 1d-tokenizer's ``ImageBert``: the ``BertModel`` of transformers, and a linear head."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = task.network
        self.codebook_size = config.codebook_size
        self.model = BertModel(
            BertConfig(
                vocab_size=config.vocabulary_size,
                hidden_size=config.embed_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=config.mlp_dim,
                max_position_embeddings=config.num_tokens + 1,
                hidden_act="gelu",
            ),
            add_pooling_layer=False,
        )
        self.head = nn.Linear(config.embed_dim, config.codebook_size)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits (B, N, K) of tokens (B, N) int64 and labels (B,) int64."""
        sequence = torch.cat([labels.unsqueeze(1) + self.codebook_size, tokens], dim=1)
        logits: Tensor = self.head(self.model(sequence).last_hidden_state[:, 1:])
        return logits


def build_plain(network: nn.Module, task: Task) -> Decode:
    """Returns a plain decoding loop for a peer's network: all logits in each step, Gumbel draws, cosine schedule."""
    network.eval().requires_grad_(requires_grad=False)
    labels = torch.tensor(task.labels)

    @torch.no_grad()
    def decode() -> Tensor:
        num_tokens = task.network.num_tokens
        tokens = torch.full((task.batch, num_tokens), task.network.mask_token_id)
        for step in range(NUM_STEPS):
            logits = network(tokens, labels)[..., : task.codebook_size].float()
            drawn = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
            masked = tokens == task.network.mask_token_id
            drawn = torch.where(masked, drawn, tokens)
            confidence = logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            confidence -= 4.5 * (1 - (step + 1) / NUM_STEPS) * torch.empty_like(confidence).exponential_().log()
            confidence[~masked] = torch.inf  # known tokens stay
            count = int(num_tokens * math.cos(math.pi / 2 * (step + 1) / NUM_STEPS))
            tokens = drawn
            if count:
                last = confidence.topk(count, largest=False).indices
                tokens = drawn.scatter(1, last, task.network.mask_token_id)
        return tokens

    return decode

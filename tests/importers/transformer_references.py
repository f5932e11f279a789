"""The transformer of Halton-MaskGIT in plain torch, with the names of their tensors.

Written from its description and from the names and shapes of its state dicts; nothing of the package is imported, so
that a mistake in our networks cannot hide here. ``save_checkpoint`` writes files as its training program does.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

HALTON_SIZES = {  # published sizes: (D, blocks, heads), README of valeoai/Halton-MaskGIT
    "tiny": (384, 6, 6),
    "small": (512, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Scale(nn.Module):
    """The gain of an RMS norm, and a bias if asked for."""

    def __init__(self, size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        if bias:
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = rms(x) * self.weight
        return x + self.bias if hasattr(self, "bias") else x


class GatedMLP(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        hidden = math.ceil((8 * size // 3) / 256) * 256
        self.w1, self.w2, self.w3 = (
            nn.Linear(a, b, bias=False) for a, b in ((size, hidden), (hidden, size), (size, hidden))
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w2(gate * gate.sigmoid() * self.w3(x))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, S, heads, d) without a mask, by its definition: (B, S, heads d)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


class SiLULinear(nn.Sequential):
    """SiLU, then a linear layer, which has the index 1."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(size, out))


class HaltonAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * (size // heads)
        self.wq, self.wk, self.wv = (nn.Linear(size, inner, bias=False) for _ in range(3))
        self.wo = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rms(self.wq(x)), rms(self.wk(x)), self.wv(x)
        return self.wo(attend(*(part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))))


class HaltonBlock(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.mlp = SiLULinear(size, 6 * size)
        self.ln1, self.ln2 = Scale(size), Scale(size)
        self.attn, self.ff = HaltonAttention(size, heads), GatedMLP(size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.mlp(condition).unsqueeze(1).chunk(6, -1)
        x = x + gate1 * self.attn(self.ln1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.ff(self.ln2(x) * (1 + scale2) + shift2)


class Halton(nn.Module):
    """Halton-MaskGIT: classes set the norms' shift, scale and gate; registers follow the tokens."""

    def __init__(
        self, *, codes: int, classes: int, side: int, size: int, blocks: int, heads: int, registers: int = 1
    ) -> None:
        super().__init__()
        self.codes, self.classes = codes, classes
        self.cls_emb, self.tok_emb = nn.Embedding(classes + 1, size), nn.Embedding(codes + 1, size)
        self.pos_emb = nn.Embedding(side**2, size)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(HaltonBlock(size, heads) for _ in range(blocks))
        self.last_norm = nn.Module()
        self.last_norm.norm_final, self.last_norm.mlp = Scale(size, bias=True), SiLULinear(size, 2 * size)
        self.head = nn.Linear(size, codes + 1)
        self.head.weight = self.tok_emb.weight
        if registers:
            self.reg_tokens = nn.Embedding(registers, size)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, N, K + 1) of tokens (B, N), masked ones K; the label ``classes`` is that of no class."""
        condition = self.cls_emb(labels)
        x = self.tok_emb(tokens) + self.pos_emb.weight
        count = x.shape[1]
        if hasattr(self, "reg_tokens"):
            x = torch.cat([x, self.reg_tokens.weight.expand(len(x), -1, -1)], 1)
        for block in self.transformer.layers:
            x = block(x, condition)
        shift, scale = self.last_norm.mlp(condition).unsqueeze(1).chunk(2, -1)
        x = self.last_norm.norm_final(x[:, :count]) * (1 + scale) + shift
        return self.head(x)


def randomise(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draws every weight, also those that start at zero or one, at sizes that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.1
        if "emb" in name:  # the head multiplies by this table: its logits have a size near 1
            scale *= 0.6
        weight.data = scale * torch.randn(weight.shape, generator=generator) + ("norm" in name or ".ln" in name)
    return network.eval().requires_grad_(requires_grad=False)


def save_checkpoint(network: nn.Module, file: Path) -> Path:
    """Writes the file that its training program writes."""
    weights = network.state_dict()
    torch.save({"iter": 5, "global_epoch": 1, "model_state_dict": weights, "optimizer_state_dict": None}, file)
    return file


def put(name, value):
    """Returns a function that sets an entry of a state dict."""
    return lambda weights: weights.update({name: value})

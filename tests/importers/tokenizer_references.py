"""Tokenizers in the layouts of other projects, in plain PyTorch, written from the description of their networks.

They share no code with ``maskgit_pl``. Images are in the range that the project uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def swish(x):
    return x * torch.sigmoid(x)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def with_random_values(network):
    """The network with random weights, biases and scales."""
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def nearest(rows, codes):
    """The nearest of (K, D) codes to each of (B, h, w, D) rows: (B, N)."""
    return (rows.unsqueeze(-2) - codes).square().sum(-1).argmin(-1).flatten(1)


# diffusers: VQModel of aMUSEd


class DiffusersBlock(nn.Module):
    def __init__(self, before, after, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, 1e-6), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after, 1e-6), nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x):
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class DiffusersAttention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x):
        rows = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        scores = self.to_q(rows) @ self.to_k(rows).transpose(1, 2) / x.shape[1] ** 0.5
        return x + self.to_out[0](scores.softmax(-1) @ self.to_v(rows)).transpose(1, 2).view_as(x)


class DiffusersConv(nn.Module):
    """``downsamplers.0`` (stride 2) and ``upsamplers.0``."""

    def __init__(self, channels, stride):
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(channels, channels, 3, stride, 0 if stride == 2 else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.stride == 2 else F.interpolate(x, scale_factor=2))


class DiffusersLevel(nn.Module):
    def __init__(self, before, after, blocks, *, groups, attention, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList([DiffusersBlock(after if n else before, after, groups) for n in range(blocks)])
        if attention:
            self.attentions = nn.ModuleList([DiffusersAttention(after, groups) for _ in range(blocks)])
        if down:
            self.downsamplers = nn.ModuleList([DiffusersConv(after, 2)])
        if up:
            self.upsamplers = nn.ModuleList([DiffusersConv(after, 1)])

    def forward(self, x):
        for number, block in enumerate(self.resnets):
            x = block(x)
            if hasattr(self, "attentions"):
                x = self.attentions[number](x)
        for layer in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = layer(x)
        return x


class DiffusersMiddle(nn.Module):
    def __init__(self, channels, groups, *, attention):
        super().__init__()
        self.attentions = nn.ModuleList([DiffusersAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([DiffusersBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x):
        x = self.resnets[0](x)
        return self.resnets[1](self.attentions[0](x) if len(self.attentions) else x)


class DiffusersHalf(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config, *, encoder):
        super().__init__()
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        latent, blocks, last = config["latent_channels"], config["layers_per_block"], len(widths) - 1
        middle, levels = config["mid_block_add_attention"], []
        width = widths[0] if encoder else widths[-1]
        self.encoder = encoder
        self.conv_in = nn.Conv2d(3 if encoder else latent, width, 3, padding=1)
        for place, level in enumerate(range(last + 1) if encoder else range(last, -1, -1)):
            kind = config["down_block_types" if encoder else "up_block_types"][place]
            more = {"down": level < last} if encoder else {"up": level > 0}
            made = DiffusersLevel(
                width, widths[level], blocks + (not encoder), groups=groups, attention="Attn" in kind, **more
            )
            levels.append(made)
            width = widths[level]
        setattr(self, "down_blocks" if encoder else "up_blocks", nn.ModuleList(levels))
        self.mid_block = DiffusersMiddle(widths[-1], groups, attention=middle)
        self.conv_norm_out = nn.GroupNorm(groups, width, 1e-6)
        self.conv_out = nn.Conv2d(width, latent if encoder else 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for part in (*self.down_blocks, self.mid_block) if self.encoder else (self.mid_block, *self.up_blocks):
            x = part(x)
        return self.conv_out(swish(self.conv_norm_out(x)))


def diffusers_config(**changes):
    """A small ``config.json`` of aMUSEd's kind; its own widths are 128 256 256 512 768, with 8192 codes of 64."""
    config = {
        "_class_name": "VQModel",
        "_diffusers_version": "0.25.0.dev0",
        "act_fn": "silu",
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "in_channels": 3,
        "latent_channels": 8,
        "layers_per_block": 2,
        "lookup_from_codebook": True,
        "mid_block_add_attention": False,
        "norm_num_groups": 32,
        "norm_type": "group",
        "num_vq_embeddings": 32,
        "out_channels": 3,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "vq_embed_dim": None,
    }
    return {**config, **changes}


class DiffusersVQModel(nn.Module):
    """``VQModel`` of diffusers; images in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        latent, dim = config["latent_channels"], config["vq_embed_dim"] or config["latent_channels"]
        self.encoder = DiffusersHalf(config, encoder=True)
        self.quant_conv = nn.Conv2d(latent, dim, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config["num_vq_embeddings"], dim)
        self.post_quant_conv = nn.Conv2d(dim, latent, 1)
        self.decoder = DiffusersHalf(config, encoder=False)

    def features(self, images):
        return self.quant_conv(self.encoder(2 * images - 1))

    def tokens(self, features):
        return nearest(features.movedim(1, -1), self.quantize.embedding.weight)

    def decode(self, tokens, grid):
        codes = self.quantize.embedding.weight[tokens].unflatten(1, grid).movedim(-1, 1)
        return (self.decoder(self.post_quant_conv(codes)) + 1) / 2

"""Tokenizers in the layouts of other projects: the network of diffusers itself, and others in plain PyTorch.

The others are written from the description of their networks, and share no code with ``maskgit_pl``. Images are in the
range that the project uses.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

diffusers = pytest.importorskip("diffusers")


def swish(x):
    return x * torch.sigmoid(x)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def with_random_values(network, scale=0.1):
    """The network with random weights, biases and scales."""
    for parameter in network.parameters():
        parameter.data.add_(scale * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def nearest(rows, codes):
    """The nearest of (K, D) codes to each of (B, h, w, D) rows: (B, N)."""
    return (rows.unsqueeze(-2) - codes).square().sum(-1).argmin(-1).flatten(1)


# The tokenizer of diffusers


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


class DiffusersVQModel(diffusers.VQModel):
    """``VQModel`` of diffusers itself; images in [-1, 1], or in [0, 1] as in the pipelines of aMUSEd."""

    def __init__(self, config):
        super().__init__(**{key: value for key, value in config.items() if not key.startswith("_")})
        self.signed = config["mid_block_add_attention"]

    def features(self, images):
        return self.quant_conv(self.encoder(2 * images - 1 if self.signed else images))

    def tokens(self, features):
        return nearest(features.movedim(1, -1), self.quantize.embedding.weight)

    def decode(self, tokens, grid):
        codes = self.quantize.embedding.weight[tokens].unflatten(1, grid).movedim(-1, 1)
        images = self.decoder(self.post_quant_conv(codes))
        return (images + 1) / 2 if self.signed else images


# The tokenizers of taming-transformers, LlamaGen and IBQ: the same network with other names, and other choices of codes

_TAMING_NAMES = {
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"(down|up)samplers\.0": r"\1sample",
    r"group_norm": "norm",
    r"to_([qkv])\.": r"\1.",
    r"to_out\.0": "proj_out",
    r"attentions\.(\d+)": r"attn.\1",
}
_BLOCKS = {
    "taming": {
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attn\.0": "mid.attn_1",
        r"down_blocks": "down",
        r"up_blocks": "up",
        r"resnets": "block",
    },
    "llamagen": {
        r"mid_block\.resnets\.0": "mid.0",
        r"mid_block\.resnets\.1": "mid.2",
        r"mid_block\.attn\.0": "mid.1",
        r"(down|up)_blocks": "conv_blocks",
        r"resnets": "res",
    },
}


class TamingModel(DiffusersVQModel):
    """``VQModel`` of taming-transformers, of LlamaGen (codes of length 1) or of IBQ (largest inner product)."""

    def __init__(self, config, project="taming"):
        super().__init__(config)
        self.project = project

    def named(self):
        """Returns the state dict by the names of the project, with 1x1 convolutions in the self-attention."""
        last = len(self.decoder.up_blocks) - 1
        weights = {}
        for name, value in self.state_dict().items():
            is_matrix = "attentions" in name and value.dim() == 2
            for pattern, new in (
                _TAMING_NAMES | _BLOCKS["llamagen" if self.project == "llamagen" else "taming"]
            ).items():
                name = re.sub(pattern, new, name)
            # taming numbers the decoder's levels from full resolution
            name = re.sub(r"decoder\.up\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)
            weights[name] = value[:, :, None, None] if is_matrix else value
        return weights

    def codes(self):
        codes = self.quantize.embedding.weight
        return F.normalize(codes) if self.project == "llamagen" else codes

    def tokens(self, features):
        rows = features.movedim(1, -1)
        if self.project == "ibq":
            return (rows @ self.codes().T).argmax(-1).flatten(1)
        return nearest(F.normalize(rows, dim=-1) if self.project == "llamagen" else rows, self.codes())

    def decode(self, tokens, grid):
        images = self.decoder(self.post_quant_conv(self.codes()[tokens].unflatten(1, grid).movedim(-1, 1)))
        return (images + 1) / 2 if self.signed else images


# The tokenizer of MaskBit


class MaskBitConv(nn.Conv2d):
    """A convolution with "SAME" padding."""

    def forward(self, x):
        total = [
            max((-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            for size in x.shape[-2:]
        ]
        return super().forward(F.pad(x, (total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2))))


class MaskBitBlock(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.conv1 = norm(before), MaskBitConv(before, after, 3, bias=False)
        self.norm2, self.conv2 = norm(after), MaskBitConv(after, after, 3, bias=False)
        if before != after:
            self.nin_shortcut = MaskBitConv(after, after, 1, bias=False)

    def forward(self, x):
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (self.shortcut(x, h) if hasattr(self, "nin_shortcut") else x)

    def shortcut(self, x, h):
        return self.nin_shortcut(h)


class MaskBitLevel(nn.Module):
    def __init__(self, before, after, blocks, *, down="", up=False):
        super().__init__()
        self.res_blocks = nn.ModuleList([MaskBitBlock(after if n else before, after) for n in range(blocks)])
        self.down = down
        if down == "conv":
            self.down_conv = MaskBitConv(after, after, 3, stride=2)
        if up:
            self.upsample_conv = MaskBitConv(after, after, 3)

    def forward(self, x):
        for block in self.res_blocks:
            x = block(x)
        if self.down:
            x = self.down_conv(x) if self.down == "conv" else F.avg_pool2d(x, 2)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0))
        return x


class MaskBitHalf(nn.Module):
    """The encoder or the decoder; ``old`` numbers the decoder's levels from full resolution."""

    def __init__(self, widths, blocks, dim, *, encoder, down="conv", old=False):
        super().__init__()
        self.encoder, self.old, last = encoder, old, len(widths) - 1
        self.conv_in = MaskBitConv(3, widths[0], 3, bias=False) if encoder else MaskBitConv(dim, widths[-1], 3)
        levels, width = [], widths[0] if encoder else widths[-1]
        for level in range(last + 1) if encoder else range(last, -1, -1):
            more = {"down": down if level < last else ""} if encoder else {"up": level > 0}
            levels.append(MaskBitLevel(width, widths[level], blocks, **more))
            width = widths[level]
        self.mid = MaskBitLevel(widths[-1], widths[-1], blocks)
        setattr(self, "down" if encoder else "up", nn.ModuleList(levels[::-1] if old else levels))
        self.norm_out = norm(width)
        self.conv_out = MaskBitConv(width, dim if encoder else 3, 1 if encoder else 3)

    def forward(self, x):
        x = self.conv_in(x)
        up = () if self.encoder else reversed(self.up) if self.old else self.up
        for part in (*self.down, self.mid) if self.encoder else (self.mid, *up):
            x = part(x)
        return self.conv_out(swish(self.norm_out(x)))


class BitCodes(nn.Module):
    """The constants of MaskBit's quantizer of signs, which its files hold."""

    def __init__(self, bits):
        super().__init__()
        self.register_buffer("bits_to_indices", 2 ** torch.arange(bits).int())
        self.register_buffer("codebook", ((torch.arange(2**bits)[:, None] & self.bits_to_indices) != 0) * 2.0 - 1)


class MaskBitModel(nn.Module):
    """``ConvVQModel``; images in [0, 1]. ``table`` codes of size ``dim``, or ``dim`` bits."""

    def __init__(self, *, widths=(32, 64, 64), blocks=2, dim=6, table=None, down="conv", old=False):
        super().__init__()
        self.encoder = MaskBitHalf(widths, blocks, dim, encoder=True, down=down)
        self.quantize = BitCodes(dim) if table is None else nn.Module()
        if table is not None:
            self.quantize.embedding = nn.Embedding(table, dim)
        self.decoder = MaskBitHalf(widths, blocks, dim, encoder=False, old=old)

    def features(self, images):
        return self.encoder(images)

    def tokens(self, features):
        rows = features.movedim(1, -1)
        if hasattr(self.quantize, "embedding"):
            return nearest(rows, self.quantize.embedding.weight)
        return ((rows > 0) * self.quantize.bits_to_indices).sum(-1).flatten(1)

    def decode(self, tokens, grid):
        table = self.quantize.embedding.weight if hasattr(self.quantize, "embedding") else self.quantize.codebook
        return self.decoder(table[tokens].unflatten(1, grid).movedim(-1, 1))


# The tokenizer of MaskGIT in the layout of open-muse, which TiTok uses too


class OpenMuseModel(MaskBitModel):
    """``MaskGitVQGAN``, the released MaskGIT tokenizer in torch: VQGAN+ with means between levels, and other names."""

    def __init__(self, *, widths=(32, 32, 64), table=32, **sizes):
        super().__init__(widths=widths, table=table, down="mean", old=True, **sizes)

    def state_dict(self):
        weights = super().state_dict().items()
        return {re.sub("res_blocks[.]", "" if ".mid." in name else "block.", name): value for name, value in weights}


# The tokenizer of Open-MAGVIT2


class Magvit2Block(MaskBitBlock):
    """The block of MaskBit with the shortcut on its input."""

    def __init__(self, before, after):
        super().__init__(before, after)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1, bias=False)

    def shortcut(self, x, h):
        return self.nin_shortcut(x)


class Magvit2Norm(nn.Module):
    """A norm with the scale and the shift of the codes of an image."""

    def __init__(self, dim, channels):
        super().__init__()
        self.gamma, self.beta = nn.Linear(dim, channels), nn.Linear(dim, channels)

    def forward(self, x, codes):
        spread = (codes.flatten(2).var(2) + 1e-6).sqrt()
        scale, shift = self.gamma(spread), self.beta(codes.flatten(2).mean(2))
        return F.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + shift[..., None, None]


class Magvit2Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x):
        # Channel (2 row + column) C + c is channel c at this row and column of a square of four.
        batch, channels, height, width = x.shape
        squares = self.conv1(x).view(batch, 2, 2, channels, height, width)
        return squares.permute(0, 3, 4, 1, 5, 2).reshape(batch, channels, 2 * height, 2 * width)


def magvit2_level(before, after, blocks):
    level = nn.Module()
    level.block = nn.ModuleList([Magvit2Block(after if n else before, after) for n in range(blocks)])
    return level


class Magvit2Encoder(nn.Module):
    def __init__(self, widths, blocks, dim):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.down, width = nn.ModuleList(), widths[0]
        for number, after in enumerate(widths):
            made, width = magvit2_level(width, after, blocks), after
            if number < len(widths) - 1:
                made.downsample = nn.Conv2d(after, after, 3, 2, 1)
            self.down.append(made)
        self.mid_block = nn.ModuleList([Magvit2Block(width, width) for _ in range(blocks)])
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, dim, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        for block in self.mid_block:
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Magvit2Decoder(nn.Module):
    def __init__(self, widths, blocks, dim):
        super().__init__()
        width = widths[-1]
        self.conv_in = nn.Conv2d(dim, width, 3, padding=1)
        self.mid_block = nn.ModuleList([Magvit2Block(width, width) for _ in range(blocks)])
        levels, norms = [], []
        for number in reversed(range(len(widths))):
            norms.insert(0, Magvit2Norm(dim, width))
            made, width = magvit2_level(width, widths[number], blocks), widths[number]
            if number > 0:
                made.upsample = Magvit2Upsample(width)
            levels.insert(0, made)
        self.up, self.adaptive = nn.ModuleList(levels), nn.ModuleList(norms)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes):
        x = self.conv_in(codes)
        for block in self.mid_block:
            x = block(x)
        for level, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            x = adaptive(x, codes)
            for block in level.block:
                x = block(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(swish(self.norm_out(x)))


class Magvit2Model(nn.Module):
    """``VQModel`` of Open-MAGVIT2 with ``dim`` bits; images in [-1, 1]."""

    def __init__(self, *, widths=(32, 64, 64), blocks=2, dim=6):
        super().__init__()
        self.encoder = Magvit2Encoder(widths, blocks, dim)
        self.decoder = Magvit2Decoder(widths, blocks, dim)
        self.dim = dim

    def features(self, images):
        return self.encoder(2 * images - 1)

    def tokens(self, features):
        return sum((features[:, bit] > 0).long() * 2**bit for bit in range(self.dim)).flatten(1)

    def decode(self, tokens, grid):
        codes = torch.stack([(tokens // 2**bit) % 2 * 2.0 - 1 for bit in range(self.dim)], dim=1).unflatten(2, grid)
        return (self.decoder(codes) + 1) / 2


def add_average(weights, average):
    """The state dict with averaged weights beside the last ones, as Lightning modules of both projects write it."""
    beside = {f"model_ema.{name.replace('.', '')}": value for name, value in average.items()}
    return {**weights, **beside, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}

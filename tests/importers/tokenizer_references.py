"""Tokenizers in the layouts of other projects: the network of diffusers itself, and others in plain PyTorch.

The others are written from the description of their networks, and share no code with ``maskgit_pl``. Images are in the
range that the project uses.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
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

    def codes(self):
        return self.quantize.embedding.weight

    def tokens(self, features):
        return nearest(features.movedim(1, -1), self.codes())

    def decode(self, tokens, grid):
        codes = self.codes()[tokens].unflatten(1, grid).movedim(-1, 1)
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
        codes = super().codes()
        return F.normalize(codes) if self.project == "llamagen" else codes

    def tokens(self, features):
        rows = features.movedim(1, -1)
        if self.project == "ibq":
            return (rows @ self.codes().T).argmax(-1).flatten(1)
        return nearest(F.normalize(rows, dim=-1) if self.project == "llamagen" else rows, self.codes())


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


class CodeNorm(nn.Module):
    """A norm of Open-MAGVIT2 with the scale and the shift of the codes of an image."""

    def __init__(self, dim, channels):
        super().__init__()
        self.gamma, self.beta = nn.Linear(dim, channels), nn.Linear(dim, channels)

    def forward(self, x, codes):
        spread = (codes.flatten(2).var(2) + 1e-6).sqrt()
        scale, shift = self.gamma(spread), self.beta(codes.flatten(2).mean(2))
        return F.group_norm(x, 32, eps=1e-6) * scale[..., None, None] + shift[..., None, None]


class PaddedUpsample(nn.Module):
    """The upsampling of Open-MAGVIT2: channel (2 row + column) C + c is channel c at a place of a square of four."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x):
        return rearrange(self.conv1(x), "b (row column c) h w -> b c (h row) (w column)", row=2, column=2)


class NearestUpsample(MaskBitConv):
    """The upsampling of MaskBit."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0))


DOWN = {
    "conv": lambda channels: MaskBitConv(channels, channels, 3, stride=2),
    "padded": lambda channels: nn.Conv2d(channels, channels, 3, 2, 1),
    "mean": lambda channels: nn.AvgPool2d(2),
}


class Level(nn.Module):
    def __init__(self, before, after, blocks, block, **resampling):
        super().__init__()
        self.res_blocks = nn.ModuleList([block(after if n else before, after) for n in range(blocks)])
        for name, layer in resampling.items():  # ``down_conv`` or ``upsample_conv``
            setattr(self, name, layer(after))

    def forward(self, x):
        for layer in (*self.res_blocks, *list(self.children())[1:]):
            x = layer(x)
        return x


class Half(nn.Module):
    """The encoder or the decoder; ``old`` numbers the decoder's levels from full resolution."""

    def __init__(self, widths, blocks, dim, *, encoder, down="conv", old=False, block=MaskBitBlock, up=NearestUpsample):
        super().__init__()
        self.encoder, self.old, last = encoder, old, len(widths) - 1
        self.conv_in = MaskBitConv(3, widths[0], 3, bias=False) if encoder else MaskBitConv(dim, widths[-1], 3)
        levels, width = [], widths[0] if encoder else widths[-1]
        for number in range(last + 1) if encoder else range(last, -1, -1):
            resampling = {"down_conv": DOWN[down]} if encoder else {"upsample_conv": up}
            has_more = number < last if encoder else number > 0
            levels.append(Level(width, widths[number], blocks, block, **(resampling if has_more else {})))
            width = widths[number]
        self.mid = Level(widths[-1], widths[-1], blocks, block)
        setattr(self, "down" if encoder else "up", nn.ModuleList(levels[::-1] if old else levels))
        if not encoder and up is PaddedUpsample:
            self.adaptive = nn.ModuleList([CodeNorm(dim, width) for width in (*widths[1:], widths[-1])])
        self.norm_out = norm(width)
        self.conv_out = MaskBitConv(width, dim if encoder else 3, 1 if encoder else 3)

    def forward(self, codes):
        x = self.conv_in(codes)
        if self.encoder:
            for level in self.down:
                x = level(x)
        x = self.mid(x)
        if not self.encoder:
            norms = reversed(self.adaptive) if hasattr(self, "adaptive") else [lambda x, codes: x] * len(self.up)
            for level, adapt in zip(reversed(self.up) if self.old else self.up, norms, strict=True):
                x = level(adapt(x, codes))
        return self.conv_out(swish(self.norm_out(x)))


class BitCodes(nn.Module):
    """The constants of MaskBit's quantizer of signs, which its files hold."""

    def __init__(self, bits):
        super().__init__()
        self.register_buffer("bits_to_indices", 2 ** torch.arange(bits).int())
        self.register_buffer("codebook", ((torch.arange(2**bits)[:, None] & self.bits_to_indices) != 0) * 2.0 - 1)


class MaskBitModel(nn.Module):
    """``ConvVQModel``; images in [0, 1]. ``table`` codes of size ``dim``, or ``dim`` bits."""

    def __init__(self, *, widths=(32, 64, 64), blocks=2, dim=6, table=None, down="conv", old=False, **parts):
        super().__init__()
        self.encoder = Half(widths, blocks, dim, encoder=True, down=down, **parts)
        self.quantize = BitCodes(dim) if table is None else nn.Module()
        if table is not None:
            self.quantize.embedding = nn.Embedding(table, dim)
        self.decoder = Half(widths, blocks, dim, encoder=False, old=old, **parts)

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


class OpenMuseModel(MaskBitModel):
    """``MaskGitVQGAN``, the released MaskGIT tokenizer in torch: VQGAN+ with means between levels, and other names."""

    def __init__(self, *, widths=(32, 32, 64), table=32, **sizes):
        super().__init__(widths=widths, table=table, down="mean", old=True, **sizes)

    def state_dict(self):
        weights = super().state_dict().items()
        return {re.sub("res_blocks[.]", "" if ".mid." in name else "block.", name): value for name, value in weights}


class Magvit2Block(MaskBitBlock):
    """The block of MaskBit with the shortcut on its input."""

    def __init__(self, before, after):
        super().__init__(before, after)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1, bias=False)

    def shortcut(self, x, h):
        return self.nin_shortcut(x)


class Magvit2Model(MaskBitModel):
    """``VQModel`` of Open-MAGVIT2 with ``dim`` bits; images in [-1, 1]."""

    def __init__(self, *, widths=(32, 64, 64), **sizes):
        super().__init__(widths=widths, down="padded", old=True, block=Magvit2Block, up=PaddedUpsample, **sizes)

    def state_dict(self):
        weights = {}
        for name, value in super().state_dict().items():
            if not name.startswith("quantize."):
                for old, new in (("mid.res_blocks", "mid_block"), ("res_blocks", "block"), ("_conv.conv1", ".conv1")):
                    name = name.replace(old, new)
                weights[name.replace("down_conv", "downsample").replace("upsample_conv", "upsample")] = value
        return weights

    def features(self, images):
        return self.encoder(2 * images - 1)

    def decode(self, tokens, grid):
        return (super().decode(tokens, grid) + 1) / 2


def add_average(weights, average):
    """The state dict with averaged weights beside the last ones, as Lightning modules of both projects write it."""
    beside = {f"model_ema.{name.replace('.', '')}": value for name, value in average.items()}
    return {**weights, **beside, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}

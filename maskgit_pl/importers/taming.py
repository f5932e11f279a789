"""Layouts of tokenizers with the network of taming-transformers. Used by ``importers.tokenizers``.

taming-transformers, LlamaGen, diffusers and IBQ have the same network (``networks.vqgan_layouts``) under three sets of
names, which tell them apart, except IBQ from taming-transformers. All sizes are read off the shapes of the tensors.

LlamaGen compares features and codes at length 1. Its codebook is stored normalised: the nearest code of length 1, by
|z|^2 - 2 z c + |c|^2, does not depend on the length of z, so tokens and images are the same. Fine-tuning such a
tokenizer keeps neither codes nor features at length 1.

No file tells the range of the images. It is [-1, 1], except for the only network without self-attention in the middle,
aMUSEd's, in the layout of diffusers or in taming's, as open-muse saved it: its pipeline does not normalize images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.checks import shorten
from maskgit_pl.importers.layouts import CODEBOOK, TokenizerLayout, count_numbers, read_shape, read_widths
from maskgit_pl.networks.vqgan import VQGANConfig

__all__ = ["DIFFUSERS", "IBQ", "LLAMAGEN", "TAMING"]

_GROUPS = 32  # groups of every GroupNorm, unless config.json sets another number
_LEGACY_LOSS = {"name": "gradient", "commitment": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.0}
_OTHERS = (
    "loss.",  # discriminator and perceptual network of Lightning checkpoints
    "discriminator.",
    "model_ema.",
    "quantize.codebook_used",
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
)


@dataclass(frozen=True)
class _Names:
    """The names that a project gives to the parts of the network.

    Attributes:
        encoder_levels: Prefix of the number of a level in the encoder.
        decoder_levels: Prefix of the number of a level in the decoder.
        block: Name of the residual blocks of a level.
        attention: Name of the self-attentions of a level.
        downsample: Name of the downsampling of a level.
        upsample: Name of the upsampling of a level.
        middle: Names of block, attention and block in the middle.
        lowest_first: True if the decoder's levels are numbered in the order in which they run, from the lowest
            resolution.
        norm_out: Name of the norm before the last convolution of both halves.
        shortcut: Name of the convolution on the input of a block.
        inner: Our name of a layer of a self-attention -> the project's.
    """

    encoder_levels: str
    decoder_levels: str
    block: str
    attention: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    lowest_first: bool
    norm_out: str
    shortcut: str
    inner: Mapping[str, str]

    def of_layer(self, part: str, layer: str) -> str:
        """Returns the project's name of a layer of a part of the network."""
        if layer == "shortcut":
            return f"{part}.{self.shortcut}"
        is_attention = part.endswith(self.middle[1]) or part.rpartition(".")[0].endswith(f".{self.attention}")
        return f"{part}.{self.inner.get(layer, layer) if is_attention else layer}"

    def of_outer(self) -> dict[str, str]:
        """Returns the project's names of our layers outside the levels."""
        return {
            "encoder.stem": "encoder.conv_in",
            "encoder.norm": f"encoder.{self.norm_out}",
            "encoder.head": "encoder.conv_out",
            "encoder.projection": "quant_conv",
            "decoder.projection": "post_quant_conv",
            "decoder.stem": "decoder.conv_in",
            "decoder.norm": f"decoder.{self.norm_out}",
            "decoder.head": "decoder.conv_out",
        }


_TAMING_INNER = {"query": "q", "key": "k", "value": "v", "output": "proj_out"}
_TAMING = _Names(
    encoder_levels="encoder.down.",
    decoder_levels="decoder.up.",
    block="block",
    attention="attn",
    downsample="downsample",
    upsample="upsample",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    lowest_first=False,
    norm_out="norm_out",
    shortcut="nin_shortcut",
    inner=_TAMING_INNER,
)
_LLAMAGEN = _Names(
    encoder_levels="encoder.conv_blocks.",
    decoder_levels="decoder.conv_blocks.",
    block="res",
    attention="attn",
    downsample="downsample",
    upsample="upsample",
    middle=("mid.0", "mid.1", "mid.2"),
    lowest_first=True,
    norm_out="norm_out",
    shortcut="nin_shortcut",
    inner=_TAMING_INNER,
)
_DIFFUSERS = _Names(
    encoder_levels="encoder.down_blocks.",
    decoder_levels="decoder.up_blocks.",
    block="resnets",
    attention="attentions",
    downsample="downsamplers.0",
    upsample="upsamplers.0",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    lowest_first=True,
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    inner={"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0"},
)
# Old name of a layer of a self-attention of diffusers -> today's.
_OLD_DIFFUSERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(_OLD_DIFFUSERS)})\.")


def _is_marked(tensors: Mapping[str, Tensor], *, parts: _Names) -> bool:
    # Open-MAGVIT2 has taming's levels, but another middle.
    middle = f"encoder.{parts.middle[0]}."
    return any(name.startswith(parts.encoder_levels) for name in tensors) and any(
        name.startswith(middle) for name in tensors
    )


def _read_config(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, parts: _Names, quantizer: Mapping[str, Any]
) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors."""
    levels = [f"{parts.encoder_levels}{level}" for level in range(count_numbers(tensors, parts.encoder_levels))]
    channels, multipliers = read_widths(
        tensors, "encoder.conv_in.weight", [f"{level}.{parts.block}.0.conv1.weight" for level in levels]
    )
    codebook_size, code_dim = read_shape(tensors, CODEBOOK, axes=2)
    has_middle_attention = any(name.startswith(f"encoder.{parts.middle[1]}.") for name in tensors)
    return VQGANConfig(
        read_shape(tensors, "encoder.conv_in.weight", axes=4)[1],
        base_channels=channels,
        channel_multipliers=multipliers,
        num_res_blocks=count_numbers(tensors, f"{levels[0]}.{parts.block}."),
        num_groups=settings.get("norm_num_groups", _GROUPS),
        codebook_size=codebook_size,
        code_dim=code_dim,
        quantizer=quantizer,
        layout="taming",
        attention_levels=tuple(
            number for number, level in enumerate(levels) if count_numbers(tensors, f"{level}.{parts.attention}.")
        ),
        middle_attention=has_middle_attention,
        latent_channels=read_shape(tensors, "encoder.conv_out.weight", axes=4)[0],
        signed_images=has_middle_attention,
    )


def _names(config: VQGANConfig, ours: tuple[str, ...], *, parts: _Names) -> dict[str, str]:
    """Returns the project's name of each of our tensors, such as ``encoder.blocks.3.shortcut.bias``."""
    outer, places = parts.of_outer(), _places(config, parts)
    names = {}
    for name in ours:
        # encoder.blocks.3.shortcut.bias: block encoder.blocks.3, layer shortcut, kind bias.
        layer, _, kind = name.rpartition(".")
        part, _, inner = layer.rpartition(".")
        if layer == "quantizer":
            names[name] = CODEBOOK
        elif layer in outer:
            names[name] = f"{outer[layer]}.{kind}"
        else:
            names[name] = f"{parts.of_layer(places[part], inner)}.{kind}"
    return names


def _places(config: VQGANConfig, parts: _Names) -> dict[str, str]:
    """Returns the project's name of each of our blocks, by our name, such as ``decoder.blocks.0``."""
    named = {"encoder": _encoder_places(config, parts), "decoder": _decoder_places(config, parts)}
    return {f"{side}.blocks.{number}": part for side, places in named.items() for number, part in enumerate(places)}


def _encoder_places(config: VQGANConfig, parts: _Names) -> Iterator[str]:
    """Yields the project's names of our encoder's blocks, in their order."""
    last = len(config.channel_multipliers) - 1
    for level in range(last + 1):
        name = f"{parts.encoder_levels}{level}"
        yield from _level_places(name, config, parts, level=level, blocks=config.num_res_blocks)
        if level < last:
            yield f"{name}.{parts.downsample}"
    yield from _middle_places("encoder", config, parts)


def _decoder_places(config: VQGANConfig, parts: _Names) -> Iterator[str]:
    """Yields the project's names of our decoder's blocks, in their order."""
    yield from _middle_places("decoder", config, parts)
    last = len(config.channel_multipliers) - 1
    for level in range(last, -1, -1):
        name = f"{parts.decoder_levels}{last - level if parts.lowest_first else level}"
        yield from _level_places(name, config, parts, level=level, blocks=config.num_res_blocks + 1)
        if level > 0:
            yield f"{name}.{parts.upsample}"


def _level_places(name: str, config: VQGANConfig, parts: _Names, *, level: int, blocks: int) -> Iterator[str]:
    """Yields the project's names of the blocks of a level, in the order of our blocks."""
    for block in range(blocks):
        yield f"{name}.{parts.block}.{block}"
        if level in config.attention_levels:
            yield f"{name}.{parts.attention}.{block}"


def _middle_places(side: str, config: VQGANConfig, parts: _Names) -> Iterator[str]:
    block, attention, last = (f"{side}.{part}" for part in parts.middle)
    yield from (block, attention, last) if config.middle_attention else (block, last)


def _normalize_codes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with codes of length 1, which give the same tokens; see above."""
    return {**weights, "quantizer.codebook": F.normalize(weights["quantizer.codebook"], dim=1)}


def _read_diffusers_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes; ``config.json`` tells the groups of the norms, and what no tensor tells must be supported."""
    for key, supported in (("_class_name", "VQModel"), ("act_fn", "silu"), ("norm_type", "group")):
        if settings.get(key, supported) != supported:
            raise ValueError(f"{key} of config.json must be {supported!r}, got {shorten(settings[key])}")
    if any(".conv_norm_out.conv_y." in name or ".norm_layer." in name for name in tensors):
        raise ValueError("norm_type must be 'group', got spatial norms (MOVQ), which are not supported")
    return _read_config(tensors, settings, parts=_DIFFUSERS, quantizer=_LEGACY_LOSS)


def _prepare_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with today's names of the self-attention, whose matrices become 1x1 convolutions."""
    prepared = {}
    for name, tensor in tensors.items():
        new = _OLD_ATTENTION.sub(lambda match: f"{match[1]}.{_OLD_DIFFUSERS[match[2]]}.", name)
        if new in prepared or (new != name and new in tensors):
            raise ValueError(f"tensor {new} must be there once, got it by its old name too")
        is_matrix = ".attentions." in new and new.endswith(".weight") and tensor.dim() == 2
        prepared[new] = tensor[:, :, None, None] if is_matrix else tensor
    return prepared


TAMING = TokenizerLayout(
    name="taming-transformers",
    is_marked=partial(_is_marked, parts=_TAMING),
    read_config=partial(_read_config, parts=_TAMING, quantizer=_LEGACY_LOSS),
    names=partial(_names, parts=_TAMING),
    others=_OTHERS,
)
"""Source: CompVis/taming-transformers, modules/diffusionmodules/model.py and modules/vqvae/quantize.py, whose weights
of the two losses are swapped: 1 and 0.25."""

LLAMAGEN = TokenizerLayout(
    name="LlamaGen",
    is_marked=partial(_is_marked, parts=_LLAMAGEN),
    read_config=partial(
        _read_config,
        parts=_LLAMAGEN,
        quantizer={"name": "gradient", "commitment": 0.25, "codebook_weight": 1.0, "entropy_weight": 0.0},
    ),
    names=partial(_names, parts=_LLAMAGEN),
    others=_OTHERS,
    convert=_normalize_codes,
)
"""Source: FoundationVision/LlamaGen, tokenizer_image/vq_model.py."""

IBQ = TokenizerLayout(
    name="IBQ",
    is_marked=partial(_is_marked, parts=_TAMING),
    read_config=partial(
        _read_config,
        parts=_TAMING,
        quantizer={"name": "ibq", "commitment": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.05},
    ),
    names=partial(_names, parts=_TAMING),
    others=_OTHERS,
    has_average=True,
)
"""The names are those of taming-transformers, but the code of a feature is that of the largest inner product.

Source: arXiv:2412.02692; TencentARC/SEED-Voken, IBQ/models/ibqgan.py and IBQ/modules/vqvae/quantize.py."""

DIFFUSERS = TokenizerLayout(
    name="diffusers",
    is_marked=partial(_is_marked, parts=_DIFFUSERS),
    read_config=_read_diffusers_config,
    names=partial(_names, parts=_DIFFUSERS),
    others=(),
    prepare=_prepare_diffusers,
)
"""Source: huggingface/diffusers, models/autoencoders/vq_model.py and vae.py, whose ``VectorQuantizer`` is taming's with
beta 0.25; the tokenizers of aMUSEd (arXiv:2401.01808) and of Lumina-DiMOO (arXiv:2510.06308). Range of the images:
pipelines/amused/pipeline_amused_img2img.py (``do_normalize=False``)."""

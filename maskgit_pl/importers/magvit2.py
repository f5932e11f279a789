"""Layouts of Open-MAGVIT2, MaskBit and open-muse, tokenizers without self-attention. Used by ``importers.tokenizers``.

A quantizer of bits, ours is ``lfq``, has no table: token k has bit i set where channel i is positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from maskgit_pl.importers.layouts import CODEBOOK, LevelNames, TokenizerLayout, count_numbers, read_bits, read_shape
from maskgit_pl.networks.vqgan import VQGANConfig

__all__ = [
    "MASKBIT",
    "OPEN_MAGVIT2",
    "OPEN_MUSE",
]

_GROUPS = 32  # groups of every GroupNorm
_BITS = "quantize.bits_to_indices"
_MAGVIT2_NAMES = LevelNames(
    block="block", middle="mid_block", downsample="downsample", upsample="upsample.conv1", norm="adaptive"
)
_MASKBIT_NAMES = LevelNames(
    block="res_blocks", middle="mid.res_blocks", downsample="down_conv", upsample="upsample_conv", lowest_first=True
)
# Between levels of its encoder is a mean, which has no name.
_MUSE_NAMES = LevelNames(block="block", middle="mid", downsample="", upsample="upsample_conv")


def _is_magvit2(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.mid_block.0.conv1.weight" in tensors and "decoder.adaptive.0.gamma.weight" in tensors


def _read_magvit2(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors; the losses are those of the 256 px recipes."""
    bits = read_bits(tensors)
    return VQGANConfig(
        **_MAGVIT2_NAMES.read_sizes(tensors),
        num_groups=_GROUPS,
        codebook_size=2**bits,
        code_dim=bits,
        # Weights of the entropy of each feature and of the mean assignment: 0.1.
        quantizer={
            "name": "lfq",
            "commitment": 0.25,
            "entropy_weight": 0.1,
            "entropy_temperature": 0.01,
            "diversity": 1.0,
        },
        layout="magvit2",
    )


def _reorder_upsamplings(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with the channels of the upsamplings in the order of torch's pixel shuffle.

    The convolution gives four channels for each place: theirs are numbered place first, torch's channel first.
    """
    return {
        name: rearrange(tensor, "(place c) ... -> (c place) ...", place=4)
        if name.startswith("decoder.blocks.") and name.split(".")[3] == "conv"
        else tensor
        for name, tensor in weights.items()
    }


def _is_maskbit(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.down.0.res_blocks.0.conv1.weight" in tensors


def _read_maskbit(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors; the losses are those of configs/tokenizer."""
    quantizer: dict[str, Any]
    if CODEBOOK in tensors:
        codebook_size, code_dim = read_shape(tensors, CODEBOOK, axes=2)
        quantizer = {"name": "gradient", "commitment": 0.25, "codebook_weight": 1.0, "entropy_weight": 0.0}
    else:
        code_dim = read_bits(tensors)
        codebook_size = 2**code_dim
        quantizer = {
            "name": "lfq",
            "commitment": 0.25,
            "entropy_weight": 0.02,
            "entropy_temperature": 0.01,
            "diversity": 1.0,
        }
    return VQGANConfig(
        **_MASKBIT_NAMES.read_sizes(tensors),
        downsampling="strided-3x3" if "encoder.down.0.down_conv.weight" in tensors else "average",
        num_groups=_GROUPS,
        codebook_size=codebook_size,
        code_dim=code_dim,
        quantizer=quantizer,
    )


def _order_levels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with the decoder's levels in the order in which they run.

    The class for older weights numbers them from full resolution; its level 0 has no upsampling.
    """
    count = count_numbers(tensors, "decoder.up.")
    is_old = count > 1 and "decoder.up.0.upsample_conv.weight" not in tensors
    if not is_old:
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        level, _, rest = name.removeprefix("decoder.up.").partition(".")
        is_level = name.startswith("decoder.up.") and level.isdecimal()
        renamed[f"decoder.up.{count - 1 - int(level)}.{rest}" if is_level else name] = tensor
    return renamed


def _is_open_muse(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.down.0.block.0.conv1.weight" in tensors and "encoder.mid.0.conv1.weight" in tensors


def _read_open_muse(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors; its losses are those of the released code."""
    codebook_size, code_dim = read_shape(tensors, CODEBOOK, axes=2)
    return VQGANConfig(
        **_MUSE_NAMES.read_sizes(tensors), num_groups=_GROUPS, codebook_size=codebook_size, code_dim=code_dim
    )


OPEN_MAGVIT2 = TokenizerLayout(
    name="Open-MAGVIT2",
    is_marked=_is_magvit2,
    read_config=_read_magvit2,
    names=_MAGVIT2_NAMES.of,
    others=("loss.", "model_ema."),
    convert=_reorder_upsamplings,
    codes=(),
    has_average=True,
)
"""Tokens of bits. Lightning checkpoints hold averaged weights too, which the project evaluates.

Source: arXiv:2409.04410; TencentARC/Open-MAGVIT2, modules/diffusionmodules/improved_model.py,
modules/vqvae/lookup_free_quantize.py, models/lfqgan.py and evaluation.py."""

MASKBIT = TokenizerLayout(
    name="MaskBit",
    is_marked=_is_maskbit,
    read_config=_read_maskbit,
    names=_MASKBIT_NAMES.of,
    others=(_BITS, "quantize.codebook"),  # constants of the bits
    prepare=_order_levels,
    codes=(CODEBOOK, _BITS),
)
"""VQGAN+: our ``VQGAN`` in layout ``maskgit`` with a 3x3 convolution of stride 2 between levels.

Codes are bits or in a table. Images are in [0, 1].

Source: arXiv:2409.16211; markweberdev/maskbit, modeling/modules/autoencoder.py, modeling/conv_vqgan.py,
modeling/quantizer and configs/tokenizer."""

OPEN_MUSE = TokenizerLayout(
    name="open-muse",
    is_marked=_is_open_muse,
    read_config=_read_open_muse,
    names=_MUSE_NAMES.of,
    others=(),
)
"""The released MaskGIT tokenizer itself, converted from JAX; TiTok decodes with the same file. Images are in [0, 1].

Source: huggingface/open-muse, muse/modeling_maskgit_vqgan.py; bytedance/1d-tokenizer,
modeling/modules/maskgit_vqgan.py."""

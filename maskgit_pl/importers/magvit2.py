"""The layout of Open-MAGVIT2's image tokenizers. Used by ``importers.tokenizers``.

The codes are the signs of the features: token k has bit i set where channel i is positive, as in our quantizer ``lfq``,
so that a file holds no codes. Lightning checkpoints hold averaged weights too, which the project evaluates.

Source: arXiv:2409.04410; TencentARC/Open-MAGVIT2, modules/diffusionmodules/improved_model.py,
modules/vqvae/lookup_free_quantize.py, models/lfqgan.py and evaluation.py.

Layouts of tokenizers with the network of the released MaskGIT code in torch. Used by ``importers.tokenizers``.

The network is our ``VQGAN`` in layout ``maskgit``, and images are in [0, 1].

- MaskBit: VQGAN+ with a 3x3 convolution of stride 2 between levels, and a table of codes or bits. Without a table,
  token k has bit i set where channel i is positive, as in our quantizer ``lfq``.
- open-muse: the released MaskGIT tokenizer itself, converted from JAX; TiTok decodes with the same file.

Source: arXiv:2409.16211; markweberdev/maskbit, modeling/modules/autoencoder.py, modeling/conv_vqgan.py,
modeling/quantizer and configs/tokenizer; huggingface/open-muse, muse/modeling_maskgit_vqgan.py;
bytedance/1d-tokenizer, modeling/modules/maskgit_vqgan.py.
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
_NAMES = LevelNames(
    block="block", middle="mid_block", downsample="downsample", upsample="upsample.conv1", norm="adaptive"
)
# Weights of the 256 px recipes: commitment 0.25, and entropy 0.1 for each feature and for the mean assignment.
_QUANTIZER = {
    "name": "lfq",
    "commitment": 0.25,
    "entropy_weight": 0.1,
    "entropy_temperature": 0.01,
    "diversity": 1.0,
}


def _is_marked(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.mid_block.0.conv1.weight" in tensors and "decoder.adaptive.0.gamma.weight" in tensors


def _read_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors."""
    bits = read_bits(tensors)
    return VQGANConfig(
        **_NAMES.read_sizes(tensors),
        num_groups=_GROUPS,
        codebook_size=2**bits,
        code_dim=bits,
        quantizer=_QUANTIZER,
        layout="magvit2",
    )


def _convert(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with the channels of the upsamplings in the order of torch's pixel shuffle.

    The convolution gives four channels for each place: theirs are numbered place first, torch's channel first.
    """
    return {
        name: rearrange(tensor, "(place c) ... -> (c place) ...", place=4) if _is_upsampling(name) else tensor
        for name, tensor in weights.items()
    }


def _is_upsampling(name: str) -> bool:
    return name.startswith("decoder.blocks.") and name.split(".")[3] == "conv"


OPEN_MAGVIT2 = TokenizerLayout(
    name="Open-MAGVIT2",
    is_marked=_is_marked,
    read_config=_read_config,
    names=_NAMES.of,
    others=("loss.", "model_ema."),
    convert=_convert,
    codes=(),
    has_average=True,
)

_BITS = "quantize.bits_to_indices"
_MASKBIT = LevelNames(
    block="res_blocks", middle="mid.res_blocks", downsample="down_conv", upsample="upsample_conv", lowest_first=True
)
# Between levels of its encoder is a mean, which has no name.
_OPEN_MUSE = LevelNames(block="block", middle="mid", downsample="", upsample="upsample_conv")


def _is_maskbit(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.down.0.res_blocks.0.conv1.weight" in tensors


def _is_open_muse(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.down.0.block.0.conv1.weight" in tensors and "encoder.mid.0.conv1.weight" in tensors


def _read_maskbit(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors."""
    has_table = CODEBOOK in tensors
    if has_table:
        codebook_size, code_dim = read_shape(tensors, CODEBOOK, axes=2)
    else:
        codebook_size, code_dim = 2 ** read_bits(tensors), read_bits(tensors)
    return VQGANConfig(
        **_MASKBIT.read_sizes(tensors),
        downsampling="strided-3x3" if "encoder.down.0.down_conv.weight" in tensors else "average",
        num_groups=_GROUPS,
        codebook_size=codebook_size,
        code_dim=code_dim,
        quantizer=_quantizer(has_table=has_table),
    )


def _read_open_muse(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors; its losses are those of the released code."""
    codebook_size, code_dim = read_shape(tensors, CODEBOOK, axes=2)
    return VQGANConfig(
        **_OPEN_MUSE.read_sizes(tensors), num_groups=_GROUPS, codebook_size=codebook_size, code_dim=code_dim
    )


def _quantizer(*, has_table: bool) -> dict[str, Any]:
    """Returns the quantizer with the weights of configs/tokenizer: no entropy loss with a table of codes."""
    if has_table:
        return {"name": "gradient", "commitment": 0.25, "codebook_weight": 1.0, "entropy_weight": 0.0}
    return {"name": "lfq", "commitment": 0.25, "entropy_weight": 0.02, "entropy_temperature": 0.01, "diversity": 1.0}


def _prepare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


MASKBIT = TokenizerLayout(
    name="MaskBit",
    is_marked=_is_maskbit,
    read_config=_read_maskbit,
    names=_MASKBIT.of,
    others=(_BITS, "quantize.codebook"),  # constants of the bits
    prepare=_prepare,
    codes=(CODEBOOK, _BITS),
)

OPEN_MUSE = TokenizerLayout(
    name="open-muse",
    is_marked=_is_open_muse,
    read_config=_read_open_muse,
    names=_OPEN_MUSE.of,
    others=(),
)

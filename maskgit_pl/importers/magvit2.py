"""The layout of Open-MAGVIT2's image tokenizers. Used by ``importers.tokenizers``.

The codes are the signs of the features: token k has bit i set where channel i is positive, as in our quantizer ``lfq``,
so that a file holds no codes. Lightning checkpoints hold averaged weights too, which the project evaluates.

Source: arXiv:2409.04410; TencentARC/Open-MAGVIT2, modules/diffusionmodules/improved_model.py,
modules/vqvae/lookup_free_quantize.py, models/lfqgan.py and evaluation.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from maskgit_pl.importers.layouts import LevelNames, TokenizerLayout, read_bits
from maskgit_pl.networks.vqgan import VQGANConfig

__all__ = ["OPEN_MAGVIT2"]

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

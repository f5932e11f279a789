"""The layout of Open-MAGVIT2's image tokenizers. Used by ``importers.tokenizers``.

The codes are the signs of the features: token k has bit i set where channel i is positive, as in our quantizer ``lfq``,
so that a file holds no codes. Lightning checkpoints hold averaged weights too, which the project evaluates.

Source: arXiv:2409.04410; TencentARC/Open-MAGVIT2, modules/diffusionmodules/improved_model.py,
modules/vqvae/lookup_free_quantize.py, models/lfqgan.py and evaluation.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from maskgit_pl.importers.tokenizer_layout import TokenizerLayout, count_numbers, read_bits, read_shape, read_widths
from maskgit_pl.networks.vqgan import VQGANConfig

__all__ = ["OPEN_MAGVIT2"]

_GROUPS = 32  # groups of every GroupNorm
_OUTER = {  # our layers outside the levels -> theirs
    "stem": "conv_in",
    "norm": "norm_out",
    "head": "conv_out",
}
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
    levels = [f"encoder.down.{level}" for level in range(count_numbers(tensors, "encoder.down."))]
    channels, multipliers = read_widths(
        tensors, "encoder.conv_in.weight", [f"{level}.block.0.conv1.weight" for level in levels]
    )
    bits = read_bits(tensors)
    return VQGANConfig(
        read_shape(tensors, "encoder.conv_in.weight", axes=4)[1],
        base_channels=channels,
        channel_multipliers=multipliers,
        num_res_blocks=count_numbers(tensors, f"{levels[0]}.block."),
        num_middle_blocks=count_numbers(tensors, "encoder.mid_block."),
        num_groups=_GROUPS,
        codebook_size=2**bits,
        code_dim=bits,
        quantizer=_QUANTIZER,
        layout="magvit2",
    )


def _names(config: VQGANConfig, ours: tuple[str, ...]) -> dict[str, str]:
    """Returns their name of each of our tensors, such as ``decoder.blocks.3.conv1.weight``."""
    places = {
        f"{half}.blocks.{number}": f"{half}.{place}"
        for half, found in (("encoder", _encoder_places(config)), ("decoder", _decoder_places(config)))
        for number, place in enumerate(found)
    }
    return {name: _name(name, places) for name in ours}


def _name(name: str, places: Mapping[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    if layer in places:  # a downsampling is a convolution itself
        return f"{places[layer]}.{kind}"
    part, _, inner = layer.rpartition(".")
    if part in places:
        inner = {"shortcut": "nin_shortcut", "conv": "conv1"}.get(inner, inner)  # conv: of an upsampling
        return f"{places[part]}.{inner}.{kind}"
    return f"{part}.{_OUTER[inner]}.{kind}"


def _encoder_places(config: VQGANConfig) -> Iterator[str]:
    """Yields their names of our encoder's blocks, in their order."""
    last = len(config.channel_multipliers) - 1
    for level in range(last + 1):
        yield from (f"down.{level}.block.{block}" for block in range(config.num_res_blocks))
        if level < last:
            yield f"down.{level}.downsample"
    yield from (f"mid_block.{block}" for block in range(config.num_middle_blocks))


def _decoder_places(config: VQGANConfig) -> Iterator[str]:
    """Yields their names of our decoder's blocks, in their order; levels are numbered from full resolution."""
    yield from (f"mid_block.{block}" for block in range(config.num_middle_blocks))
    for level in reversed(range(len(config.channel_multipliers))):
        yield f"adaptive.{level}"
        yield from (f"up.{level}.block.{block}" for block in range(config.num_res_blocks))
        if level > 0:
            yield f"up.{level}.upsample"


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
    names=_names,
    others=("loss.", "model_ema."),
    convert=_convert,
    codes=(),
    has_average=True,
)

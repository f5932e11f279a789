"""The layout of MaskBit's tokenizers, VQGAN+ with a table of codes or with bits. Used by ``importers.tokenizers``.

The network is our ``VQGAN`` in layout ``maskgit`` with a 3x3 convolution of stride 2 between levels. Images are in
[0, 1]. Without a table of codes, token k has bit i set where channel i is positive, as in our quantizer ``lfq``.

Source: arXiv:2409.16211; markweberdev/maskbit, modeling/modules/autoencoder.py, modeling/conv_vqgan.py,
modeling/quantizer and configs/tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from maskgit_pl.importers.tokenizer_layout import (
    CODEBOOK,
    TokenizerLayout,
    count_numbers,
    read_bits,
    read_shape,
    read_widths,
)
from maskgit_pl.networks.vqgan import VQGANConfig

__all__ = ["MASKBIT"]

_GROUPS = 32  # groups of every GroupNorm
_BITS = "quantize.bits_to_indices"
_OUTER = {  # our layers outside the levels -> theirs
    "stem": "conv_in",
    "norm": "norm_out",
    "head": "conv_out",
}


def _is_marked(tensors: Mapping[str, Tensor]) -> bool:
    return "encoder.down.0.res_blocks.0.conv1.weight" in tensors


def _read_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors."""
    levels = [f"encoder.down.{level}" for level in range(count_numbers(tensors, "encoder.down."))]
    channels, multipliers = read_widths(
        tensors, "encoder.conv_in.weight", [f"{level}.res_blocks.0.conv1.weight" for level in levels]
    )
    has_table = CODEBOOK in tensors
    if has_table:
        codebook_size, code_dim = read_shape(tensors, CODEBOOK, axes=2)
    else:
        codebook_size, code_dim = 2 ** read_bits(tensors), read_bits(tensors)
    return VQGANConfig(
        read_shape(tensors, "encoder.conv_in.weight", axes=4)[1],
        base_channels=channels,
        channel_multipliers=multipliers,
        num_res_blocks=count_numbers(tensors, f"{levels[0]}.res_blocks."),
        num_middle_blocks=count_numbers(tensors, "encoder.mid.res_blocks."),
        downsampling="strided-3x3" if f"{levels[0]}.down_conv.weight" in tensors else "average",
        num_groups=_GROUPS,
        codebook_size=codebook_size,
        code_dim=code_dim,
        quantizer=_quantizer(has_table=has_table),
    )


def _quantizer(*, has_table: bool) -> dict[str, Any]:
    """Returns the quantizer with the weights of configs/tokenizer: no entropy loss with a table of codes."""
    if has_table:
        return {"name": "gradient", "commitment": 0.25, "codebook_weight": 1.0, "entropy_weight": 0.0}
    return {"name": "lfq", "commitment": 0.25, "entropy_weight": 0.02, "entropy_temperature": 0.01, "diversity": 1.0}


def _names(config: VQGANConfig, ours: tuple[str, ...]) -> dict[str, str]:
    """Returns their name of each of our tensors, such as ``decoder.blocks.3.conv1.weight``."""
    places = {
        f"{half}.blocks.{number}": f"{half}.{place}"
        for half, found in (("encoder", _encoder_places(config)), ("decoder", _decoder_places(config)))
        for number, place in enumerate(found)
    }
    return {name: _name(name, places) for name in ours}


def _name(name: str, places: Mapping[str, str]) -> str:
    if name == "quantizer.codebook":
        return CODEBOOK
    half, layer, kind = name.partition(".")[0], name.split(".")[-2], name.rpartition(".")[2]
    part = name.removesuffix(f".{layer}.{kind}")
    if part == half:
        return f"{half}.{_OUTER[layer]}.{kind}"
    # Our samplings hold one convolution; theirs are convolutions of a level.
    if places[part].endswith("_conv"):
        return f"{places[part]}.{kind}"
    return f"{places[part]}.{'nin_shortcut' if layer == 'shortcut' else layer}.{kind}"


def _encoder_places(config: VQGANConfig) -> Iterator[str]:
    """Yields their names of our encoder's blocks, in their order."""
    last = len(config.channel_multipliers) - 1
    for level in range(last + 1):
        yield from (f"down.{level}.res_blocks.{block}" for block in range(config.num_res_blocks))
        if level < last:
            yield f"down.{level}.down_conv"
    yield from (f"mid.res_blocks.{block}" for block in range(config.num_middle_blocks))


def _decoder_places(config: VQGANConfig) -> Iterator[str]:
    """Yields their names of our decoder's blocks, in their order; levels are numbered as they run."""
    yield from (f"mid.res_blocks.{block}" for block in range(config.num_middle_blocks))
    last = len(config.channel_multipliers) - 1
    for level in range(last + 1):
        yield from (f"up.{level}.res_blocks.{block}" for block in range(config.num_res_blocks))
        if level < last:
            yield f"up.{level}.upsample_conv"


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
    is_marked=_is_marked,
    read_config=_read_config,
    names=_names,
    others=(_BITS, "quantize.codebook"),  # constants of the bits
    prepare=_prepare,
    codes=(CODEBOOK, _BITS),
)

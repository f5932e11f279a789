"""Imports tokenizers in torch that others released as pretrained folders. Used by ``maskgit import-tokenizer``.

A project is one ``TokenizerLayout``: the names of the parts of its network, and what no tensor tells. The names of the
tensors tell the layouts apart, except IBQ from taming-transformers, and their shapes tell all sizes.

No file tells the range of the images. It is [-1, 1] in layout ``taming``, except for the only network without
self-attention in the middle, aMUSEd's: its pipeline does not normalize images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskgit_pl.checks import ImageSize
from maskgit_pl.files import read_json
from maskgit_pl.importers import TOKENIZER_LAYOUTS
from maskgit_pl.importers.checkpoints import (
    check_weights,
    find_weights,
    name_file,
    name_some,
    read_checkpoint,
    select_tensors,
)
from maskgit_pl.importers.conversion import (
    Imported,
    Rule,
    check_out,
    convert,
    count_numbers,
    read_widths,
    shape_of,
    shapes_of,
    write_import,
)
from maskgit_pl.networks.vqgan import VQGAN, Layout, VQGANConfig
from maskgit_pl.text import shorten

_AVERAGE = "model_ema."
_CODEBOOK = "quantize.embedding.weight"  # of all projects with a table of codes
_MAX_BITS = 24  # the largest codebook that a configuration accepts
_GROUPS = 32  # groups of every GroupNorm, unless config.json sets another number
_SAME_NAMES = "tokenizers of IBQ have the same names, but choose other codes; if this is one, import with --layout IBQ"
_OF_TAMING = (  # tensors beside the network
    "loss.",  # discriminator and perceptual network of Lightning checkpoints
    "discriminator.",
    _AVERAGE,
    "quantize.codebook_used",
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
)
_TAMING_LAYERS = {"shortcut": "nin_shortcut", "query": "q", "key": "k", "value": "v", "output": "proj_out"}
_PLAIN_LAYERS = {"shortcut": "nin_shortcut", "conv": ""}  # a sampling is its only convolution
# Keys of diffusers' config.json that no tensor tells, with the only values that are imported.
_SETTINGS = {"_class_name": "VQModel", "act_fn": "silu", "norm_type": "group"}


@dataclass(frozen=True)
class TokenizerLayout:
    """The names that a project gives to the parts of its network, and what no tensor tells.

    Attributes:
        name: Name of the project.
        marks: Beginnings of names, each of which a tensor of this layout has.
        layout: Our layout of the network.
        quantizer: Our quantizer and its losses; for tokens of bits, that of ``bits`` instead.
        encoder: Name of the encoder's levels.
        decoder: Name of the decoder's levels.
        block: Name of the residual blocks of a level.
        middle: Names of block, attention and block in the middle, or one name of all blocks there.
        attention: Name of the self-attentions of a level.
        downsample: Name of the downsampling at the end of a level of the encoder.
        upsample: Name of the upsampling at the end of a level of the decoder.
        norm: Name of the norms at the beginning of the decoder's levels, if it has them.
        norm_out: Name of the norm before the last convolution of both halves.
        layers: Our name of a layer of a block -> the project's; an empty one is left out, others are the same.
        lowest_first: True if the decoder's levels are numbered in the order in which they run, from the
            lowest resolution.
        bits: The quantizer of tokens of bits, which have no table.
        others: Names of tensors that are not part of the network; a name that ends in a dot is a beginning.
        prepare: Returns the tensors under today's names and with the axes of a convolution; by default all as they are.
        finish: Changes float32 tensors by our names to the state dict of our network; by default they are it.
        has_average: True if the project evaluates the averaged weights, where a file has them.
    """

    name: str
    marks: tuple[str, ...]
    layout: Layout
    quantizer: str | Mapping[str, Any] = "gradient"
    encoder: str = "encoder.down"
    decoder: str = "decoder.up"
    block: str = "block"
    middle: tuple[str, ...] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    attention: str = "attn"
    downsample: str = "downsample"
    upsample: str = "upsample"
    norm: str = ""
    norm_out: str = "norm_out"
    layers: Mapping[str, str] = field(default_factory=lambda: _TAMING_LAYERS)
    lowest_first: bool = False
    bits: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    has_average: bool = False

    def is_of(self, tensors: Mapping[str, Any]) -> bool:
        """Returns True if the tensors' names are those of this layout."""
        return all(any(name.startswith(mark) for name in tensors) for mark in self.marks)

    def read_config(self, tensors: Mapping[str, Tensor], *, num_groups: int = _GROUPS) -> VQGANConfig:
        """Reads the sizes of the network off the shapes of its tensors."""
        levels = [f"{self.encoder}.{level}" for level in range(count_numbers(tensors, f"{self.encoder}."))]
        channels, in_channels, _, _ = shape_of(tensors, "encoder.conv_in.weight", axes=4)
        widths = [shape_of(tensors, f"{level}.{self.block}.0.conv1.weight", axes=4)[0] for level in levels]
        multipliers = read_widths(channels, widths)
        last = shape_of(tensors, "encoder.conv_out.weight", axes=4)[0]
        quantizer = self.quantizer
        if self.bits and _CODEBOOK not in tensors:
            codebook_size, code_dim, quantizer = 2 ** min(last, _MAX_BITS + 1), last, self.bits
        else:
            codebook_size, code_dim = shape_of(tensors, _CODEBOOK)
        more: dict[str, Any]
        if self.layout == "taming":
            has_middle = any(name.startswith(f"encoder.{self.middle[1]}.") for name in tensors)
            more = {
                "attention_levels": tuple(
                    level for level, name in enumerate(levels) if count_numbers(tensors, f"{name}.{self.attention}.")
                ),
                "middle_attention": has_middle,
                "latent_channels": last,
                "signed_images": has_middle,
            }
        else:
            more = {"num_middle_blocks": count_numbers(tensors, f"encoder.{self.middle[0]}.")}
            if self.layout == "maskgit" and f"{levels[0]}.{self.downsample}.weight" in tensors:
                more["downsampling"] = "strided-3x3"
        return VQGANConfig(
            in_channels,
            base_channels=channels,
            channel_multipliers=multipliers,
            num_res_blocks=count_numbers(tensors, f"{levels[0]}.{self.block}."),
            num_groups=num_groups,
            codebook_size=codebook_size,
            code_dim=code_dim,
            quantizer=quantizer,
            layout=self.layout,
            **more,
        )

    def convert(self, tensors: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
        """Converts prepared tensors to the state dict of our ``VQGAN``, float32."""
        shapes = shapes_of(partial(VQGAN, config))
        return self.finish(convert(tensors, self.rules(config, shapes), shapes))

    def rules(self, config: VQGANConfig, names: Iterable[str]) -> list[Rule]:
        """Returns the rules of a network of these sizes, whose tensors have these names."""
        parts = {"encoder.projection": "quant_conv", "decoder.projection": "post_quant_conv"}
        outer = {"stem": "conv_in", "norm": self.norm_out, "head": "conv_out"}
        for half in ("encoder", "decoder"):
            parts |= {f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in outer.items()}
            parts |= {f"{half}.blocks.{number}": name for number, name in enumerate(self._blocks(half, config))}
        rules = [Rule("quantizer.codebook", _CODEBOOK)]
        for name in names:
            # encoder.blocks.3.shortcut.bias: the part encoder.blocks.3, the layer shortcut, the kind bias.
            if match := re.fullmatch(r"(\w+\.(?:blocks\.\d+|\w+))(?:\.(\w+))?\.(weight|bias)", name):
                layer = self.layers.get(match[2] or "", match[2])
                rules.append(Rule(name, ".".join(filter(None, (parts[match[1]], layer, match[3])))))
        return rules

    def _blocks(self, half: str, config: VQGANConfig) -> list[str]:
        """Returns the project's names of the blocks of our encoder or decoder, in their order."""
        is_decoder, is_taming = half == "decoder", config.layout == "taming"
        levels, last = [], len(config.channel_multipliers) - 1
        for level in range(last + 1):
            number = last - level if is_decoder and self.lowest_first else level
            name = f"{self.decoder if is_decoder else self.encoder}.{number}"
            blocks = [f"{self.norm}.{number}"] if is_decoder and self.norm else []
            for block in range(config.num_res_blocks + (is_decoder and is_taming)):
                blocks.append(f"{name}.{self.block}.{block}")
                if level in config.attention_levels:
                    blocks.append(f"{name}.{self.attention}.{block}")
            if is_decoder and level > 0:
                blocks.append(f"{name}.{self.upsample}")
            if not is_decoder and level < last:
                blocks.append(f"{name}.{self.downsample}")  # no tensor has this name if it is a mean
            levels.append(blocks)
        if is_taming:
            middle = [f"{half}.{name}" for name in self.middle if config.middle_attention or name != self.middle[1]]
        else:
            middle = [f"{half}.{self.middle[0]}.{block}" for block in range(config.num_middle_blocks)]
        # The encoder runs from full resolution to the middle, and the decoder back.
        return [*middle, *chain(*reversed(levels))] if is_decoder else [*chain(*levels), *middle]


def _normalize_codes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with codes of length 1.

    LlamaGen compares features and codes at length 1. The nearest code of length 1, by |z|^2 - 2 z c + |c|^2, does not
    depend on the length of z, so that tokens and images are the same. Fine-tuning does not keep the lengths.
    """
    return {**weights, "quantizer.codebook": F.normalize(weights["quantizer.codebook"], dim=1)}


def _prepare_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with the matrices of the self-attention as 1x1 convolutions."""
    return {
        name: tensor[:, :, None, None] if ".attentions." in name and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def _order_levels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of MaskBit with the decoder's levels in the order in which they run.

    The class for older weights numbers them from full resolution; its level 0 has no upsampling.
    """
    count = count_numbers(tensors, "decoder.up.")
    if count < 2 or "decoder.up.0.upsample_conv.weight" in tensors:
        return dict(tensors)
    return {
        re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{count - 1 - int(match[1])}", name): tensor
        for name, tensor in tensors.items()
    }


def _reorder_upsamplings(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights with the channels of the upsamplings in the order of torch's pixel shuffle.

    The convolution gives four channels for each place: Open-MAGVIT2's are numbered place first, torch's channel first.
    """
    return {
        name: rearrange(tensor, "(place c) ... -> (c place) ...", place=4)
        if re.match(r"decoder\.blocks\.\d+\.conv\.", name)
        else tensor
        for name, tensor in weights.items()
    }


def _gradient(commitment: float, codebook_weight: float) -> dict[str, Any]:
    return {"name": "gradient", "commitment": commitment, "codebook_weight": codebook_weight, "entropy_weight": 0.0}


def _lfq(entropy_weight: float) -> dict[str, Any]:
    entropy = {"entropy_weight": entropy_weight, "entropy_temperature": 0.01, "diversity": 1.0}
    return {"name": "lfq", "commitment": 0.25, **entropy}


TAMING = TokenizerLayout(
    name="taming-transformers",
    marks=("encoder.down.", "encoder.mid.block_1."),
    layout="taming",
    quantizer=_gradient(1.0, 0.25),
    others=_OF_TAMING,
)
"""Source: CompVis/taming-transformers, modules/diffusionmodules/model.py and modules/vqvae/quantize.py, whose weights
of the two losses are swapped: 1 and 0.25."""

LLAMAGEN = TokenizerLayout(
    name="LlamaGen",
    marks=("encoder.conv_blocks.", "encoder.mid.0."),
    layout="taming",
    quantizer=_gradient(0.25, 1.0),
    encoder="encoder.conv_blocks",
    decoder="decoder.conv_blocks",
    block="res",
    middle=("mid.0", "mid.1", "mid.2"),
    lowest_first=True,
    others=_OF_TAMING,
    finish=_normalize_codes,
)
"""Source: FoundationVision/LlamaGen, tokenizer_image/vq_model.py."""

DIFFUSERS = TokenizerLayout(
    name="diffusers",
    marks=("encoder.down_blocks.", "encoder.mid_block.resnets.0."),
    layout="taming",
    quantizer=_gradient(1.0, 0.25),
    encoder="encoder.down_blocks",
    decoder="decoder.up_blocks",
    block="resnets",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    attention="attentions",
    downsample="downsamplers.0",
    upsample="upsamplers.0",
    norm_out="conv_norm_out",
    layers={
        "shortcut": "conv_shortcut",
        "norm": "group_norm",
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "output": "to_out.0",
    },
    lowest_first=True,
    prepare=_prepare_diffusers,
)
"""Source: huggingface/diffusers, models/autoencoders/vq_model.py and vae.py, whose ``VectorQuantizer`` is taming's with
beta 0.25; the tokenizers of aMUSEd (arXiv:2401.01808) and of Lumina-DiMOO (arXiv:2510.06308). Range of the images:
pipelines/amused/pipeline_amused_img2img.py (``do_normalize=False``)."""

MASKBIT = TokenizerLayout(
    name="MaskBit",
    marks=("encoder.down.0.res_blocks.0.conv1.weight",),
    layout="maskgit",
    quantizer=_gradient(0.25, 1.0),
    block="res_blocks",
    middle=("mid.res_blocks",),
    downsample="down_conv",
    upsample="upsample_conv",
    layers=_PLAIN_LAYERS,
    lowest_first=True,
    bits=_lfq(0.02),
    others=("quantize.bits_to_indices", "quantize.codebook"),  # constants of the bits
    prepare=_order_levels,
)
"""VQGAN+: our layout ``maskgit`` with a 3x3 convolution of stride 2 between levels.

Codes are in a table, or bits: token k has bit i set where channel i is positive. Images are in [0, 1].

Source: arXiv:2409.16211; markweberdev/maskbit, modeling/modules/autoencoder.py, modeling/conv_vqgan.py,
modeling/quantizer and configs/tokenizer."""

OPEN_MAGVIT2 = TokenizerLayout(
    name="Open-MAGVIT2",
    marks=("encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"),
    layout="magvit2",
    middle=("mid_block",),
    upsample="upsample.conv1",
    norm="decoder.adaptive",
    layers=_PLAIN_LAYERS,
    bits=_lfq(0.1),
    others=("loss.", _AVERAGE),
    finish=_reorder_upsamplings,
    has_average=True,
)
"""Tokens of bits. Lightning checkpoints hold averaged weights too, which the project evaluates.

Source: arXiv:2409.04410; TencentARC/Open-MAGVIT2, modules/diffusionmodules/improved_model.py,
modules/vqvae/lookup_free_quantize.py, models/lfqgan.py and evaluation.py; losses of the 256 px recipes."""

IBQ = replace(
    TAMING,
    name="IBQ",
    quantizer={"name": "ibq", "commitment": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.05},
    has_average=True,
)
"""The names are those of taming-transformers, but the code of a feature is that of the largest inner product.

Source: arXiv:2412.02692; TencentARC/SEED-Voken, IBQ/models/ibqgan.py and IBQ/modules/vqvae/quantize.py."""

OPEN_MUSE = TokenizerLayout(
    name="open-muse",
    marks=("encoder.down.0.block.0.conv1.weight", "encoder.mid.0.conv1.weight"),
    layout="maskgit",
    middle=("mid",),
    downsample="",
    upsample="upsample_conv",
    layers=_PLAIN_LAYERS,
)
"""The released MaskGIT tokenizer itself, converted from JAX; TiTok decodes with the same file. Images are in [0, 1].

Source: huggingface/open-muse, muse/modeling_maskgit_vqgan.py; bytedance/1d-tokenizer,
modeling/modules/maskgit_vqgan.py."""

LAYOUTS = (TAMING, LLAMAGEN, DIFFUSERS, MASKBIT, OPEN_MAGVIT2, IBQ, OPEN_MUSE)


def import_tokenizer(
    file: Path,
    out: Path,
    *,
    image_size: ImageSize = 256,
    layout: str | None = None,
) -> Imported:
    """Writes ``out/tokenizer`` from a checkpoint.

    1. Check that ``out`` is new, and open the file.
    2. Find the layout by the names, and separate the network's tensors from others.
    3. Read the sizes off the shapes, build the network without memory, and check names, shapes and numbers.
    4. Convert and write them.

    Args:
        file: A ``.ckpt``, ``.pt``, ``.bin`` or ``.safetensors`` file of a tokenizer, or a folder of diffusers.
        out: Pretrained folder to make.
        image_size: Side, or (height, width), of the images that it will encode, in pixels.
        layout: Name of the layout, such as ``IBQ``; by default the one that the names of the tensors tell.
    """
    # 1.
    check_out(out)
    file = find_weights(file)
    contents = read_checkpoint(file)
    with name_file(file):
        # 2.
        kind = tokenizer_layout_of(contents, layout)
        path = file.with_name("config.json")
        settings = read_json(path) if kind is DIFFUSERS and path.is_file() else {}
        tensors = select_tensors(contents, kind.others)
        if kind.has_average and any(name.startswith(_AVERAGE) for name in contents):
            tensors = _average_tensors(tensors, contents)
        # 3.
        check_weights(tensors, file.stat().st_size)
        tensors = kind.prepare(tensors)
        config = kind.read_config(tensors, num_groups=settings.get("norm_num_groups", _GROUPS))
        for key, value in _SETTINGS.items():
            if settings.get(key, value) != value:
                raise ValueError(f"{key} of config.json must be {value!r}, got {shorten(settings[key])}")
        weights = kind.convert(tensors, config)
    # 4.
    notes = [_SAME_NAMES] if kind is TAMING else []
    return write_import(Imported(out, kind.name, config, weights, image_size, notes=notes))


def tokenizer_layout_of(tensors: Mapping[str, Any], name: str | None = None) -> TokenizerLayout:
    """Returns the layout of a state dict, by its names.

    Args:
        tensors: State dict of a tokenizer, perhaps with other entries.
        name: Name of the layout, or None. The names of IBQ and taming-transformers are the same, but not the code that
            they choose, so that averaged weights, which IBQ writes and taming-transformers does not, ask for it.
    """
    fitting = {layout.name: layout for layout in LAYOUTS if layout.is_of(tensors)}
    if not fitting:
        projects = ", ".join(TOKENIZER_LAYOUTS)
        raise ValueError(
            f"it must be a tokenizer of {projects}, got something else ({name_some(tensors)}); name a file of one of "
            "these, or import a transformer with maskgit import-transformer"
        )
    names = " or ".join(fitting)
    if name is None and len(fitting) > 1 and any(tensor.startswith(_AVERAGE) for tensor in tensors):
        raise ValueError(
            f"--layout must be given, {names}: the file has averaged weights ({_AVERAGE}*), and the names of its "
            "tensors are those of both"
        )
    chosen = fitting.get(name or next(iter(fitting)))
    if chosen is None:
        raise ValueError(f"--layout must be {names} for the names of these tensors, got {name}")
    return chosen


def _average_tensors(tensors: Mapping[str, Tensor], contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the averaged weights in place of the last ones.

    An average has the name of its weight without dots, such as ``model_ema.encoderconv_inweight``.
    """
    names = {name: f"{_AVERAGE}{name.replace('.', '')}" for name in tensors}
    missing = [name for name in names.values() if not isinstance(contents.get(name), Tensor)]
    if missing:
        raise ValueError(f"averaged tensors are missing: {name_some(missing)}")
    return {name: contents[average] for name, average in names.items()}

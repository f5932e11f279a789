"""Imports tokenizers of taming-transformers and LlamaGen as pretrained folders. Used by ``maskgit import-taming``.

Both have the same network (``networks.taming``) with two sets of names, which tell the layouts apart. All sizes are
inferred from the shapes of the tensors. No file is executed: torch's loader for tensors reads it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit_pl.files import write_folder
from maskgit_pl.importers.files import check_out
from maskgit_pl.importers.torch_file import name_some, read_checkpoint
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.networks.weight_file import check_held, check_tensor
from maskgit_pl.pretrained import save_tokenizer

__all__ = ["ImportedTokenizer", "Layout", "import_taming", "layout_of", "tokenizer_config", "tokenizer_weights"]

_GROUPS = 32  # groups of every GroupNorm in both projects
_CODEBOOK = "quantize.embedding.weight"
# Entries that hold the tensors; as in LlamaGen, its average comes before "model".
_WEIGHTS = ("state_dict", "ema", "model")
_NOT_THE_NETWORK = (  # names, or beginnings that end in a dot
    "loss.",  # discriminator and perceptual network of Lightning checkpoints
    "discriminator.",
    "model_ema.",
    "quantize.codebook_used",
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
)
_GUMBEL = ("quantize.embed.weight", "quantize.proj.weight")
_TRANSFORMER = re.compile(r"(^|\.)(transformer|first_stage_model|tok_emb|tok_embeddings|layers\.0)\.")
_OUTER = {  # our layers outside the levels -> both projects'
    "encoder.stem": "encoder.conv_in",
    "encoder.norm": "encoder.norm_out",
    "encoder.head": "encoder.conv_out",
    "encoder.projection": "quant_conv",
    "decoder.projection": "post_quant_conv",
    "decoder.stem": "decoder.conv_in",
    "decoder.norm": "decoder.norm_out",
    "decoder.head": "decoder.conv_out",
}
_INNER = {"shortcut": "nin_shortcut", "query": "q", "key": "k", "value": "v", "output": "proj_out"}


@dataclass(frozen=True)
class Layout:
    """The names that a project gives to the parts of the network.

    Attributes:
        name: Name of the project.
        encoder_levels: Prefix of the number of a level in the encoder.
        decoder_levels: Prefix of the number of a level in the decoder.
        block: Name of the residual blocks of a level.
        middle: Names of block, attention and block in the middle.
        lowest_first: True if the decoder's levels are numbered in the order in which they run, from the lowest
            resolution.
        normalized_codes: True if codes are compared and used at length 1.
        quantizer: Our quantizer with the losses of the project.

    Source: CompVis/taming-transformers, modules/diffusionmodules/model.py and modules/vqvae/quantize.py (whose weights
    of the two losses are swapped: 1 and 0.25); FoundationVision/LlamaGen, tokenizer_image/vq_model.py.
    """

    name: str
    encoder_levels: str
    decoder_levels: str
    block: str
    middle: tuple[str, str, str]
    lowest_first: bool
    normalized_codes: bool
    quantizer: Mapping[str, Any]


_LAYOUTS = (
    Layout(
        name="taming-transformers",
        encoder_levels="encoder.down.",
        decoder_levels="decoder.up.",
        block="block",
        middle=("block_1", "attn_1", "block_2"),
        lowest_first=False,
        normalized_codes=False,
        quantizer={"name": "gradient", "commitment": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.0},
    ),
    Layout(
        name="LlamaGen",
        encoder_levels="encoder.conv_blocks.",
        decoder_levels="decoder.conv_blocks.",
        block="res",
        middle=("0", "1", "2"),
        lowest_first=True,
        normalized_codes=True,
        quantizer={"name": "gradient", "commitment": 0.25, "codebook_weight": 1.0, "entropy_weight": 0.0},
    ),
)


@dataclass(frozen=True)
class ImportedTokenizer:
    """A tokenizer that was imported.

    Attributes:
        folder: Tokenizer folder, for ``load_tokenizer``.
        layout: Name of the file's layout.
        config: Sizes of the network.
        num_parameters: Number of parameters, codebook included.
        ignored: Other entries of the file.
    """

    folder: Path
    layout: str
    config: VQGANConfig
    num_parameters: int
    ignored: tuple[str, ...]

    def report(self, image_size: int) -> str:
        """Returns text for people: sizes, ignored entries, and the next command."""
        config = self.config
        rows, columns = config.grid(image_size)
        levels = "".join(f"level {level} and " for level in config.attention_levels)
        return "\n".join(
            [
                f"{self.folder}: {self.layout} layout, {self.num_parameters:,} parameters",
                f"  images    {config.in_channels} x {image_size} x {image_size} -> {rows} x {columns} tokens",
                f"  codebook  {config.codebook_size} codes of size {config.code_dim}",
                f"  network   channels {' '.join(map(str, config.widths))}, {config.num_res_blocks} blocks a level, "
                f"self-attention in {levels}the middle",
                f"  ignored   {', '.join(self.ignored) or 'nothing'}",
                f"next: make train-transformer DATASET=... RECIPE=paper-256 TOKENIZER={self.folder}",
            ]
        )


def import_taming(file: Path, out: Path, *, image_size: int = 256) -> ImportedTokenizer:
    """Writes ``out/tokenizer`` from a checkpoint.

    LlamaGen compares features and codes at length 1. The codebook is stored normalised: the nearest code of length 1,
    by |z|^2 - 2 z c + |c|^2, does not depend on the length of z, so tokens and images are the same. Fine-tuning such a
    tokenizer keeps neither codes nor features at length 1.

    Args:
        file: A ``.ckpt``, ``.pt`` or ``.safetensors`` file of a tokenizer in either layout.
        out: Pretrained folder to make.
        image_size: Side of the square images that it will encode, in pixels; no file has it.

    Raises:
        FileNotFoundError: if there is no such file.
        FileExistsError: if ``out`` exists.
        ValueError: if it is not such a tokenizer, describes more than it holds, has non-finite numbers, or its
            downsampling factor does not divide the size.
    """
    check_out(out)
    contents, beside = read_checkpoint(file, entries=_WEIGHTS)
    try:
        tensors, ignored = _network_tensors(contents)
        check_held(tensors, file.stat().st_size)
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
        config = tokenizer_config(tensors)
        weights = tokenizer_weights(tensors, config)
    except ValueError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error
    config.grid(image_size)
    with write_folder(out) as fresh:
        save_tokenizer(fresh / "tokenizer", config, weights, image_size=image_size)
    count = sum(tensor.numel() for tensor in weights.values())
    return ImportedTokenizer(out / "tokenizer", layout_of(tensors).name, config, count, (*beside, *ignored))


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """Returns the layout of a state dict, by its names.

    Raises:
        ValueError: if it has neither layout. The message says what it is, if that is known.
    """
    gumbel = [name for name in _GUMBEL if name in tensors]
    if gumbel:
        raise ValueError(
            f"the tokenizer must quantize to the nearest code, got a Gumbel-softmax tokenizer ({gumbel[0]})"
        )
    found = [layout for layout in _LAYOUTS if any(name.startswith(layout.encoder_levels) for name in tensors)]
    if not found:
        kind = "a transformer" if any(map(_TRANSFORMER.search, tensors)) else "something else"
        raise ValueError(
            f"it must be a tokenizer of taming-transformers or LlamaGen, got {kind} ({name_some(tensors)})"
        )
    if _CODEBOOK not in tensors:
        raise ValueError(f"tensor {_CODEBOOK} must be there: it is the codebook; name a tokenizer")
    return found[0]


def tokenizer_config(tensors: Mapping[str, Tensor]) -> VQGANConfig:
    """Infers the sizes of the network from the shapes of its tensors.

    Args:
        tensors: State dict of the network in either layout.

    Raises:
        ValueError: if it has neither layout, a tensor is missing, or the sizes are not those of this network.
    """
    layout = layout_of(tensors)
    channels, in_channels, *_ = _shape(tensors, "encoder.conv_in.weight", axes=4)
    codebook_size, code_dim = _shape(tensors, _CODEBOOK, axes=2)
    levels = _count(tensors, layout.encoder_levels)
    widths = [
        _shape(tensors, f"{layout.encoder_levels}{level}.{layout.block}.0.conv1.weight", axes=4)[0]
        for level in range(levels)
    ]
    # Our configuration has channels as multiples of the first convolution's.
    uneven = [width for width in widths if width % channels]
    if uneven:
        raise ValueError(
            f"channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return VQGANConfig(
        in_channels,
        base_channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=_count(tensors, f"{layout.encoder_levels}0.{layout.block}."),
        num_groups=_GROUPS,
        codebook_size=codebook_size,
        code_dim=code_dim,
        quantizer=layout.quantizer,
        layout="taming",
        attention_levels=tuple(
            level for level in range(levels) if _count(tensors, f"{layout.encoder_levels}{level}.attn.")
        ),
        latent_channels=_shape(tensors, "encoder.conv_out.weight", axes=4)[0],
    )


def tokenizer_weights(tensors: Mapping[str, Tensor], config: VQGANConfig) -> dict[str, Tensor]:
    """Converts a state dict to that of our ``VQGAN``, float32.

    Args:
        tensors: State dict of the network in either layout.
        config: Sizes of the network.

    Raises:
        ValueError: if a tensor is missing, superfluous, or has another shape than ``config`` implies.
    """
    layout = layout_of(tensors)
    # The names and shapes of our network, without memory.
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in VQGAN(config).state_dict().items()}
    parts = _parts(config, layout)
    theirs = {name: _their_name(name, parts) for name in wanted}
    missing = [name for name in theirs.values() if name not in tensors]
    if missing:
        raise ValueError(f"tensors are missing: {name_some(missing)}")
    left_over = tensors.keys() - set(theirs.values())
    if left_over:
        raise ValueError(f"tensors are not in the network: {name_some(sorted(left_over))}")
    for name, shape in wanted.items():
        if tensors[theirs[name]].shape != shape:
            got = tuple(tensors[theirs[name]].shape)
            raise ValueError(f"tensor {theirs[name]} must have shape {tuple(shape)}, got {got}")
    weights = {name: tensors[theirs[name]].float() for name in wanted}
    # See import_taming: codes of length 1 give the same tokens.
    if layout.normalized_codes:
        weights["quantizer.codebook"] = F.normalize(weights["quantizer.codebook"], dim=1)
    return weights


def _their_name(name: str, parts: Mapping[str, str]) -> str:
    """Returns the project's name of one of our tensors, such as ``encoder.blocks.3.shortcut.bias``."""
    if name == "quantizer.codebook":
        return _CODEBOOK
    # encoder.blocks.3.shortcut.bias: block encoder.blocks.3, layer shortcut, kind bias.
    layer, _, kind = name.rpartition(".")
    if layer in _OUTER:
        return f"{_OUTER[layer]}.{kind}"
    part, _, inner = layer.rpartition(".")
    return f"{parts[part]}.{_INNER.get(inner, inner)}.{kind}"


def _parts(config: VQGANConfig, layout: Layout) -> dict[str, str]:
    """Returns the project's name of each of our blocks, by our name, such as ``decoder.blocks.0``."""
    named = {"encoder": _encoder_parts(config, layout), "decoder": _decoder_parts(config, layout)}
    return {f"{side}.blocks.{number}": part for side, parts in named.items() for number, part in enumerate(parts)}


def _encoder_parts(config: VQGANConfig, layout: Layout) -> Iterator[str]:
    """Yields the project's names of our encoder's blocks, in their order."""
    last = len(config.channel_multipliers) - 1
    for level in range(last + 1):
        name = f"{layout.encoder_levels}{level}"
        yield from _level_parts(name, config, layout, level=level, blocks=config.num_res_blocks)
        if level < last:
            yield f"{name}.downsample"
    yield from (f"encoder.mid.{part}" for part in layout.middle)


def _decoder_parts(config: VQGANConfig, layout: Layout) -> Iterator[str]:
    """Yields the project's names of our decoder's blocks, in their order."""
    yield from (f"decoder.mid.{part}" for part in layout.middle)
    last = len(config.channel_multipliers) - 1
    for level in range(last, -1, -1):
        name = f"{layout.decoder_levels}{last - level if layout.lowest_first else level}"
        yield from _level_parts(name, config, layout, level=level, blocks=config.num_res_blocks + 1)
        if level > 0:
            yield f"{name}.upsample"


def _level_parts(name: str, config: VQGANConfig, layout: Layout, *, level: int, blocks: int) -> Iterator[str]:
    """Yields the project's names of the blocks of a level, in the order of our blocks."""
    for block in range(blocks):
        yield f"{name}.{layout.block}.{block}"
        if level in config.attention_levels:
            yield f"{name}.attn.{block}"


def _network_tensors(contents: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the network's tensors, and the names of known others with their counts."""
    # Only known others are ignored: an unknown tensor means another network.
    tensors: dict[str, Tensor] = {}
    ignored: Counter[str] = Counter()
    for name, value in contents.items():
        known = next((other for other in _NOT_THE_NETWORK if _matches(name, other)), None)
        if known is not None:
            ignored[f"{known}*" if known.endswith(".") else known] += 1
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            raise ValueError(f"entry {name} must be a tensor, got {type(value).__name__}")
    return tensors, tuple(
        f"{name} ({count} tensors)" if name.endswith("*") else name for name, count in ignored.items()
    )


def _matches(name: str, known: str) -> bool:
    return name.startswith(known) if known.endswith(".") else name == known


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of numbers that follow a prefix."""
    return len({name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)})


def _shape(tensors: Mapping[str, Tensor], name: str, *, axes: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"tensors are missing: {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes:
        raise ValueError(f"tensor {name} must have {axes} axes, got shape {shape}")
    return shape

"""Imports checkpoints of the released MaskGIT code (JAX) as pretrained folders. Used by ``maskgit import-jax``.

Weights are converted by the rules below, and in golden tests gradients too.

Source: google-research/maskgit, ``maskgit_transformer.py`` and ``vqgan_tokenizer.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.checkpoints import Array, name_file, name_some, read_flax
from maskgit_pl.importers.conversion import (
    Imported,
    ImportedTransformer,
    Rule,
    check_out,
    choose_class_names,
    convert,
    count_numbers,
    number_rules,
    read_widths,
    shape_of,
    shapes_of,
    write_import,
)
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, Activation, ResidualBlock, VQGANConfig
from maskgit_pl.networks.weights import check_tensor, skeletons

Arrays: TypeAlias = Mapping[str, Array]

_PARAMS = "params/"
# An array that only this network has, by which files are told apart.
_MARKS = {"tokenizer": "quantizer/codebook", "transformer": "Embed_0/word_embeddings/embedding"}
_KINDS: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm", ResidualBlock: "ResBlock"}
_DROPOUT = 0.1  # released configuration
_STEPS, _STEPS_OF_LARGE_GRIDS, _LARGE_GRID = 8, 12, 32  # paper, tables 1 and 2: 8 steps at 256 px, 12 at 512 px
_MASK_SCHEDULE, _CHOICE_TEMPERATURE = "cosine", 4.5
# flax keeps inputs first and outputs last, torch outputs first.
_DENSE = "inputs outputs -> outputs inputs"
_CONV = "rows columns inputs outputs -> outputs inputs rows columns"
_TO_HEADS = "inputs heads head_width -> (heads head_width) inputs"
_FROM_HEADS = "heads head_width outputs -> outputs (heads head_width)"
_HEADS = "heads head_width -> (heads head_width)"
_ATTENTION, _MLP = "TransformerLayer_{}/Attention_0", "TransformerLayer_{}/Mlp_0"
_QUERY = f"{_ATTENTION}/self_attention/query/kernel"


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}.weight", f"{theirs}/scale"), Rule(f"{ours}.bias", f"{theirs}/bias")


def _layer(ours: str, theirs: str, axes: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}.weight", f"{theirs}/kernel", axes), Rule(f"{ours}.bias", f"{theirs}/bias")


def _query_key_value(kind: str) -> str:
    """Returns the names of three arrays, whose rows are those of our one product."""
    return " ".join(f"{_ATTENTION}/self_attention/{name}/{kind}" for name in ("query", "key", "value"))


_TRANSFORMER = (
    Rule("token_embedding.weight", _MARKS["transformer"]),
    Rule("position_embedding.weight", "Embed_0/position_embeddings/embedding"),
    *_norm("embedding_norm", "Embed_0/embeddings_ln"),
    Rule("blocks.{}.qkv.weight", _query_key_value("kernel"), _TO_HEADS),
    Rule("blocks.{}.qkv.bias", _query_key_value("bias"), _HEADS),
    *_layer("blocks.{}.proj", f"{_ATTENTION}/self_attention/out", _FROM_HEADS),
    *_norm("blocks.{}.attention_norm", f"{_ATTENTION}/attention_output_ln"),
    *_layer("blocks.{}.fc1", f"{_MLP}/intermediate_output", _DENSE),
    *_layer("blocks.{}.fc2", f"{_MLP}/layer_output", _DENSE),
    *_norm("blocks.{}.mlp_norm", f"{_MLP}/layer_output_ln"),
    *_layer("head_dense", "MlmLayer_0/mlm_dense", _DENSE),
    *_norm("head_norm", "MlmLayer_0/mlm_ln"),
    Rule("head_bias", "MlmLayer_0/mlm_bias/bias"),
)


def import_jax(
    tokenizer: Path,
    out: Path,
    *,
    transformer: Path | None = None,
    image_size: int = 256,
) -> Imported:
    """Writes a pretrained folder from released checkpoints.

    Args:
        tokenizer: Checkpoint such as ``tokenizer_imagenet256_checkpoint``.
        out: Folder to make.
        transformer: Checkpoint such as ``maskgit_imagenet256_checkpoint``, trained on this tokenizer's tokens.
        image_size: Side of the images in pixels. With a transformer it follows from its grid.
    """
    check_out(out)
    with name_file(tokenizer):
        arrays = parameters(read_flax(tokenizer))
        vqgan = tokenizer_config(arrays)
        weights = tokenizer_weights(arrays, vqgan)
    imported = None
    if transformer is not None:
        with name_file(transformer):
            arrays = parameters(read_flax(transformer))
            config = transformer_config(arrays, codebook_size=vqgan.codebook_size)
            state = transformer_weights(arrays, config)
        names = choose_class_names(config.num_classes)
        imported = ImportedTransformer(config, state, _MASK_SCHEDULE, _decoding(config), names)
        image_size = config.grid[0] * vqgan.downsampling_factor  # released grids are square
    return write_import(Imported(out, "google-research/maskgit", vqgan, weights, image_size, imported))


def parameters(arrays: Arrays) -> dict[str, Array]:
    """Returns the collection ``params`` of a checkpoint without the prefix."""
    return {name.removeprefix(_PARAMS): array for name, array in arrays.items() if name.startswith(_PARAMS)}


def transformer_config(arrays: Arrays, *, codebook_size: int) -> TransformerConfig:
    """Infers the sizes of a transformer from the shapes of its arrays.

    Args:
        arrays: Result of ``parameters``.
        codebook_size: K of its tokenizer.

    Returns:
        The sizes, with the released dropout of 0.1 and without a null class.
    """
    _check_kind(arrays, "transformer")
    vocabulary_size, embed_dim = shape_of(arrays, _MARKS["transformer"])
    positions, _ = shape_of(arrays, "Embed_0/position_embeddings/embedding")
    _, num_heads, _ = shape_of(arrays, _QUERY.format(0), axes=3)
    edge = math.isqrt(positions - 1)  # the first position is the class
    num_classes = vocabulary_size - codebook_size - 1  # codes, classes, mask token
    if num_classes < 1:
        raise ValueError(
            f"transformer vocabulary must hold {codebook_size} codes of the tokenizer, >= 1 class and the mask token, "
            f"got {vocabulary_size}; this transformer was not trained with this tokenizer"
        )
    return TransformerConfig(
        codebook_size=codebook_size,
        num_classes=num_classes,
        grid=(edge, edge),
        embed_dim=embed_dim,
        depth=count_numbers(arrays, "TransformerLayer_"),
        num_heads=num_heads,
        mlp_dim=shape_of(arrays, f"{_MLP.format(0)}/intermediate_output/kernel")[1],
        dropout=_DROPOUT,
        class_dropout=0.0,
    )


def transformer_weights(arrays: Arrays, config: TransformerConfig) -> dict[str, Tensor]:
    """Converts weights, or gradients, of a transformer to our names and layouts.

    Args:
        arrays: Result of ``parameters``.
        config: Sizes.

    Returns:
        State dict of a ``MaskedTransformer`` of ``config``, float32.
    """
    rules, shapes = number_rules(_TRANSFORMER, config.depth), shapes_of(config.create)
    return convert(_tensors(arrays), rules, shapes, heads=config.num_heads)


def tokenizer_config(arrays: Arrays, *, activation: Activation = "swish") -> VQGANConfig:
    """Infers the sizes of a tokenizer from the shapes of its arrays.

    Args:
        arrays: Result of ``parameters``.
        activation: Activation of its blocks, which no array shows.
    """
    _check_kind(arrays, "tokenizer")
    _, _, in_channels, channels = shape_of(arrays, "encoder/Conv_0/kernel", axes=4)
    codebook_size, code_dim = shape_of(arrays, _MARKS["tokenizer"])
    levels = count_numbers(arrays, "decoder/Conv_") - 1  # first, last, and one for each doubling of the resolution
    num_res_blocks = count_numbers(arrays, "encoder/ResBlock_") // max(levels + 1, 1)  # as many in the middle
    kernels = [f"encoder/ResBlock_{level * num_res_blocks}/Conv_0/kernel" for level in range(levels)]
    return VQGANConfig(
        in_channels,
        base_channels=channels,
        channel_multipliers=read_widths(channels, [shape_of(arrays, name, axes=4)[-1] for name in kernels]),
        num_res_blocks=num_res_blocks,
        num_middle_blocks=num_res_blocks,
        downsampling="strided" if count_numbers(arrays, "encoder/Conv_") > 2 else "average",
        activation=activation,
        codebook_size=codebook_size,
        code_dim=code_dim,
    )


def tokenizer_weights(arrays: Arrays, config: VQGANConfig) -> dict[str, Tensor]:
    """Converts weights, or gradients, of a tokenizer to our names and layouts; see ``transformer_weights``."""
    with skeletons():
        network = VQGAN(config)
    halves = [rule for half in ("encoder", "decoder") for rule in _rules_of(network.get_submodule(half), half, half)]
    rules = [Rule("quantizer.codebook", _MARKS["tokenizer"]), *halves]
    return convert(_tensors(arrays), rules, shapes_of(lambda: network))


def _rules_of(module: nn.Module, ours: str, theirs: str) -> Iterator[Rule]:
    """Yields the rules of a module's children. flax numbers modules of a kind in the order of their creation."""
    # Conv_0, Conv_1, ..., ResBlock_0, ...: each module counts each kind of its children from 0.
    numbers: Counter[str] = Counter()
    for name, child in _children(module, ours):
        kind = _KINDS[type(child)]
        path = f"{theirs}/{kind}_{numbers[kind]}"
        numbers[kind] += 1
        if kind == "ResBlock":
            yield from _rules_of(child, name, path)
        else:
            yield from _layer(name, path, _CONV) if kind == "Conv" else _norm(name, path)


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the nearest descendants that flax has too, with our names; ours have containers that flax lacks."""
    for part, child in module.named_children():
        if type(child) in _KINDS:
            yield f"{name}.{part}", child
        else:
            yield from _children(child, f"{name}.{part}")


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Returns arrays as tensors of the same memory, after a check that they hold finite floating point numbers."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    return tensors


def _decoding(config: TransformerConfig) -> DecodingConfig:
    """Returns the paper's decoding; released transformers have no null class, so there is no guidance."""
    return DecodingConfig(
        num_steps=_STEPS_OF_LARGE_GRIDS if config.grid[0] >= _LARGE_GRID else _STEPS,
        token_selector={"name": "confidence", "choice_temperature": _CHOICE_TEMPERATURE},
        guidance={"name": "constant", "scale": 0.0},
    )


def _check_kind(arrays: Arrays, kind: str) -> None:
    if _MARKS[kind] not in arrays:
        actual = next((name for name, mark in _MARKS.items() if mark in arrays), None)
        others = name_some(sorted({name.partition("/")[0] for name in arrays})) or "none"
        got = f"those of a {actual}; name that file with --{actual}" if actual else others
        raise ValueError(f"{kind} arrays must be those of a released {kind}, got {got}")

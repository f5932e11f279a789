"""Imports checkpoints of the released MaskGIT code (JAX) as pretrained folders. Used by ``maskgit import-jax``.

Names and shapes of the released code stand beside ours in a list of rules for each network. Weights are converted by
them, and in golden tests gradients too.

Source: google-research/maskgit, ``maskgit_transformer.py`` and ``vqgan_tokenizer.py``.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.data.folders import write_folder
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.files import check_flax_file, check_out, choose_class_names
from maskgit_pl.importers.flax import Array, read_flax
from maskgit_pl.importers.layouts import training_commands
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, Activation, ResidualBlock, VQGANConfig
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.pipeline.pretrained import fingerprint, save_tokenizer, save_transformer

__all__ = [
    "import_jax",
    "parameters",
    "tokenizer_config",
    "tokenizer_weights",
    "transformer_config",
    "transformer_weights",
]

Arrays: TypeAlias = Mapping[str, Array]

_PARAMS = "params/"
# An array that only this network has, by which files are told apart.
_MARKS = {"tokenizer": "quantizer/codebook", "transformer": "Embed_0/word_embeddings/embedding"}
_KINDS: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm", ResidualBlock: "ResBlock"}
_DROPOUT = 0.1  # released configuration
_MAX_SIZE = 1 << 20  # largest axis; the released code's longest is 3072
_SHOWN, _SHOWN_LETTERS = 3, 120  # names in an error, and letters of each
_TOKENIZER_SIZE = 256  # px, without a transformer: the smaller of the two released sizes
_STEPS, _STEPS_OF_LARGE_GRIDS, _LARGE_GRID = 8, 12, 32  # paper, tables 1 and 2: 8 steps at 256 px, 12 at 512 px
_CHOICE_TEMPERATURE = 4.5
# flax keeps inputs first and outputs last, torch outputs first.
_DENSE = "inputs outputs -> outputs inputs"
_CONV = "rows columns inputs outputs -> outputs inputs rows columns"
_TO_HEADS = "inputs heads head_width -> (heads head_width) inputs"
_FROM_HEADS = "heads head_width outputs -> outputs (heads head_width)"
_HEADS = "heads head_width -> (heads head_width)"
_log = logging.getLogger(__name__)


def import_jax(
    tokenizer: Path,
    out: Path,
    *,
    transformer: Path | None = None,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a pretrained folder from released checkpoints; it appears when all parts are complete.

    1. Check the first bytes of the files, and that ``out`` is new.
    2. Read the arrays, infer sizes from their shapes, and convert them to our names and layouts.
    3. Write the folder, then log its sizes.

    Args:
        tokenizer: Checkpoint such as ``tokenizer_imagenet256_checkpoint``.
        out: Folder to make.
        transformer: Checkpoint such as ``maskgit_imagenet256_checkpoint``, trained on this tokenizer's tokens.
        image_size: Side of the images in pixels. Default: the size that follows from the transformer's grid; 256
            without a transformer.
        class_names: Name of each class. Default: ImageNet's names for 1000 classes, otherwise numbers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is of another kind, damaged, or not of this size, parts do not belong together, or the
            number of names is wrong.
        FileExistsError: if ``out`` exists.
    """
    # 1.
    check_out(out)
    for path in (tokenizer, transformer):
        if path is not None:
            check_flax_file(path)
    if transformer is None and class_names is not None:
        raise ValueError("class names must come with a transformer, which has the classes; add --transformer")
    # 2. and 3.
    vqgan, vqgan_weights = _read_tokenizer(tokenizer)
    if transformer is None:
        _write_tokenizer(out, vqgan, vqgan_weights, _TOKENIZER_SIZE if image_size is None else image_size)
        return
    config, weights = _read_transformer(transformer, vqgan)
    size = _image_size(config, vqgan, image_size)
    names = choose_class_names(class_names, config.num_classes)
    with write_folder(out, name="--out", check=check_out) as fresh:
        save_tokenizer(fresh / "tokenizer", vqgan, vqgan_weights, image_size=size)
        save_transformer(
            fresh / "transformer",
            config,
            weights,
            mask_schedule="cosine",
            decoding=_decoding(config),
            class_names=names,
            tokenizer_fingerprint=fingerprint(fresh / "tokenizer"),
        )
    _report_tokenizer(vqgan, vqgan_weights, size)
    _report_transformer(config, weights, names)
    _log.info("%s: written; next: maskgit sample %s --classes 0,%d", out, out, config.num_classes - 1)


def parameters(arrays: Arrays) -> dict[str, Array]:
    """Returns the collection ``params`` of a checkpoint without the prefix. Other collections are named in the log.

    Raises:
        ValueError: if there is none.
    """
    found = {name.removeprefix(_PARAMS): array for name, array in arrays.items() if name.startswith(_PARAMS)}
    others = sorted({name.partition("/")[0] for name in arrays if not name.startswith(_PARAMS)})
    if not found:
        raise ValueError(f"checkpoint must have a collection 'params', got {_some(others)}; name another file")
    if others:
        _log.info("not imported: %s", _some(others))
    return found


def transformer_config(arrays: Arrays, *, codebook_size: int) -> TransformerConfig:
    """Infers the sizes of a transformer from the shapes of its arrays.

    Args:
        arrays: Result of ``parameters``.
        codebook_size: K of its tokenizer.

    Returns:
        The sizes, with the released dropout of 0.1 and without a null class.

    Raises:
        ValueError: if it is not a transformer of the released code, not of this tokenizer, or its grid is not square.
    """
    _check_kind(arrays, "transformer")
    vocabulary_size, embed_dim = _shape(arrays, _MARKS["transformer"], axes=2)
    positions, _ = _shape(arrays, "Embed_0/position_embeddings/embedding", axes=2)
    _, num_heads, _ = _shape(arrays, "TransformerLayer_0/Attention_0/self_attention/query/kernel", axes=3)
    _, mlp_dim = _shape(arrays, "TransformerLayer_0/Mlp_0/intermediate_output/kernel", axes=2)
    edge = math.isqrt(max(positions - 1, 0))  # the first position is the class
    if edge < 1 or edge**2 != positions - 1:
        raise ValueError(
            f"transformer positions must be 1 plus a square number (257, 1025, ...), got {positions}; only square "
            "grids can be imported"
        )
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
        depth=_count(arrays, "TransformerLayer_"),
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        dropout=_DROPOUT,
        class_dropout=0.0,
    )


def transformer_weights(arrays: Arrays, config: TransformerConfig) -> dict[str, Tensor]:
    """Converts weights, or gradients, of a transformer to our names and layouts.

    Args:
        arrays: Result of ``parameters``.
        config: Sizes.

    Returns:
        State dict of a ``MaskedTransformer`` of ``config``: float32 copies.

    Raises:
        ValueError: if an array is missing, superfluous or of another shape, or holds non-finite numbers.
    """
    return _convert(dict(arrays), list(_transformer_rules(config)), "transformer")


def tokenizer_config(
    arrays: Arrays, *, activation: Activation = "swish", quantizer: str | Mapping[str, Any] = "gradient"
) -> VQGANConfig:
    """Infers the sizes of a tokenizer from the shapes of its arrays.

    Args:
        arrays: Result of ``parameters``.
        activation: Activation of its blocks, which no array shows.
        quantizer: Name or mapping of a quantizer whose only state is the codebook.

    Raises:
        ValueError: if it is not a tokenizer of the released code, or its blocks do not make levels.
    """
    _check_kind(arrays, "tokenizer")
    _, _, in_channels, channels = _shape(arrays, "encoder/Conv_0/kernel", axes=4)
    codebook_size, code_dim = _shape(arrays, _MARKS["tokenizer"], axes=2)
    levels = _count(arrays, "decoder/Conv_") - 1  # first, last, and one for each doubling of the resolution
    blocks = _count(arrays, "encoder/ResBlock_")
    num_res_blocks = blocks // max(levels + 1, 1)  # as many in the middle
    if levels < 1 or blocks < 1 or blocks != num_res_blocks * (levels + 1):
        raise ValueError(
            f"tokenizer blocks must be the same number at each of {levels} levels and in the middle, got {blocks} in "
            "the encoder; this is not a released tokenizer"
        )
    kernels = [f"encoder/ResBlock_{level * num_res_blocks}/Conv_0/kernel" for level in range(levels)]
    widths = [_shape(arrays, name, axes=4)[-1] for name in kernels]
    if any(width % channels or width < channels for width in widths):
        raise ValueError(
            f"tokenizer channels of each level must be multiples of the first convolution's {channels}, got {widths}"
        )
    return VQGANConfig(
        in_channels,
        base_channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        num_res_blocks=num_res_blocks,
        num_middle_blocks=num_res_blocks,
        downsampling="strided" if _count(arrays, "encoder/Conv_") > 2 else "average",
        activation=activation,
        codebook_size=codebook_size,
        code_dim=code_dim,
        quantizer=quantizer,
    )


def tokenizer_weights(arrays: Arrays, config: VQGANConfig) -> dict[str, Tensor]:
    """Converts weights, or gradients, of a tokenizer to our names and layouts; see ``transformer_weights``."""
    return _convert(dict(arrays), list(_tokenizer_rules(config)), "tokenizer")


@contextmanager
def _name_file(path: Path) -> Iterator[None]:
    """Adds the name of the file to each ValueError that has none."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def _read_tokenizer(path: Path) -> tuple[VQGANConfig, dict[str, Tensor]]:
    with _name_file(path):
        arrays = parameters(read_flax(path))
        config = tokenizer_config(arrays)
        return config, tokenizer_weights(arrays, config)


def _read_transformer(path: Path, vqgan: VQGANConfig) -> tuple[TransformerConfig, dict[str, Tensor]]:
    with _name_file(path):
        arrays = parameters(read_flax(path))
        config = transformer_config(arrays, codebook_size=vqgan.codebook_size)
        return config, transformer_weights(arrays, config)


def _image_size(config: TransformerConfig, vqgan: VQGANConfig, wanted: int | None) -> int:
    """Returns the side of the images in pixels, which follows from the transformer's grid."""
    size = config.grid[0] * vqgan.downsampling_factor  # released grids are square
    if wanted is not None and wanted != size:
        raise ValueError(
            f"--image-size must be {size}, for {config.grid[0]} x {config.grid[1]} tokens of this transformer, got "
            f"{wanted}; leave --image-size out, or name the checkpoints of {wanted} px"
        )
    return size


def _decoding(config: TransformerConfig) -> DecodingConfig:
    """Returns the paper's decoding; released transformers have no null class, so there is no guidance."""
    return DecodingConfig(
        num_steps=_STEPS_OF_LARGE_GRIDS if config.grid[0] >= _LARGE_GRID else _STEPS,
        token_selector={"name": "confidence", "choice_temperature": _CHOICE_TEMPERATURE},
        guidance={"name": "constant", "scale": 0.0},
        draw_method="gumbel",
    )


def _write_tokenizer(out: Path, config: VQGANConfig, weights: Mapping[str, Tensor], size: int) -> None:
    """Writes a folder with a tokenizer only."""
    config.grid(size)  # raises for a size that is not positive
    with write_folder(out, name="--out", check=check_out) as fresh:
        save_tokenizer(fresh / "tokenizer", config, weights, image_size=size)
    _report_tokenizer(config, weights, size)
    _log.info("%s: written; next: %s; then: %s", out, *training_commands(config, out / "tokenizer", size))


def _report_tokenizer(config: VQGANConfig, weights: Mapping[str, Tensor], size: int) -> None:
    _log.info(
        "tokenizer: %s parameters; %d codes; images of %d x %d px are %d x %d tokens",
        f"{_count_numbers(weights):,}", config.codebook_size, size, size, *config.grid(size),
    )  # fmt: skip


def _report_transformer(config: TransformerConfig, weights: Mapping[str, Tensor], names: Sequence[str]) -> None:
    _log.info(
        "transformer: %s parameters; %d blocks of size %d; %d classes, %r to %r",
        f"{_count_numbers(weights):,}", config.depth, config.embed_dim, config.num_classes, names[0], names[-1],
    )  # fmt: skip


def _count_numbers(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())


@dataclass(frozen=True)
class _Rule:
    """A rule that makes one of our tensors from arrays of the released code.

    Args:
        ours: Name of the tensor in our state dict.
        theirs: Names of the arrays that become its rows, in this order.
        shape: Shape of each of these arrays.
        axes: Pattern of einops by which each is rearranged.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    axes: str = "... -> ..."


def _transformer_rules(config: TransformerConfig) -> Iterator[_Rule]:
    width = config.embed_dim
    yield _Rule("token_embedding.weight", (_MARKS["transformer"],), (config.vocabulary_size, width))
    yield _Rule("position_embedding.weight", ("Embed_0/position_embeddings/embedding",), (config.num_tokens + 1, width))
    yield from _norm_rules("embedding_norm", "Embed_0/embeddings_ln", width)
    for number in range(config.depth):
        yield from _layer_rules(f"blocks.{number}", f"TransformerLayer_{number}", config)
    yield from _dense_rules("head_dense", "MlmLayer_0/mlm_dense", width, width)
    yield from _norm_rules("head_norm", "MlmLayer_0/mlm_ln", width)
    yield _Rule("head_bias", ("MlmLayer_0/mlm_bias/bias",), (config.vocabulary_size,))


def _layer_rules(ours: str, theirs: str, config: TransformerConfig) -> Iterator[_Rule]:
    width, heads = config.embed_dim, config.num_heads
    attention, mlp = f"{theirs}/Attention_0", f"{theirs}/Mlp_0"
    split = (heads, width // heads)
    # Three arrays of theirs become the rows of our one product: query, key, value.
    kernels, biases = (
        tuple(f"{attention}/self_attention/{name}/{kind}" for name in ("query", "key", "value"))
        for kind in ("kernel", "bias")
    )
    yield _Rule(f"{ours}.qkv.weight", kernels, (width, *split), _TO_HEADS)
    yield _Rule(f"{ours}.qkv.bias", biases, split, _HEADS)
    output = f"{attention}/self_attention/out"
    yield _Rule(f"{ours}.proj.weight", (f"{output}/kernel",), (*split, width), _FROM_HEADS)
    yield _Rule(f"{ours}.proj.bias", (f"{output}/bias",), (width,))
    yield from _norm_rules(f"{ours}.attention_norm", f"{attention}/attention_output_ln", width)
    yield from _dense_rules(f"{ours}.fc1", f"{mlp}/intermediate_output", width, config.mlp_dim)
    yield from _dense_rules(f"{ours}.fc2", f"{mlp}/layer_output", config.mlp_dim, width)
    yield from _norm_rules(f"{ours}.mlp_norm", f"{mlp}/layer_output_ln", width)


def _tokenizer_rules(config: VQGANConfig) -> Iterator[_Rule]:
    with skeletons():  # shapes only
        network = VQGAN(config)
    yield _Rule("quantizer.codebook", (_MARKS["tokenizer"],), (config.codebook_size, config.code_dim))
    for half in ("encoder", "decoder"):
        yield from _module_rules(network.get_submodule(half), half, half)


def _module_rules(module: nn.Module, ours: str, theirs: str) -> Iterator[_Rule]:
    """Yields the rules of a module's children. flax numbers modules of a kind in the order of their creation."""
    # Conv_0, Conv_1, ..., ResBlock_0, ...: each module counts each kind of its children from 0.
    numbers: Counter[str] = Counter()
    for name, child in _children(module, ours):
        kind = _KINDS[type(child)]
        path = f"{theirs}/{kind}_{numbers[kind]}"
        numbers[kind] += 1
        if isinstance(child, nn.Conv2d):
            yield from _convolution_rules(name, path, child)
        elif isinstance(child, nn.GroupNorm):
            yield from _norm_rules(name, path, child.num_channels)
        else:
            yield from _module_rules(child, name, path)


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the nearest descendants that flax has too, with our names; ours have containers that flax lacks."""
    for part, child in module.named_children():
        if type(child) in _KINDS:
            yield f"{name}.{part}", child
        else:
            yield from _children(child, f"{name}.{part}")


def _convolution_rules(ours: str, theirs: str, convolution: nn.Conv2d) -> Iterator[_Rule]:
    outputs, inputs, rows, columns = convolution.weight.shape
    yield _Rule(f"{ours}.weight", (f"{theirs}/kernel",), (rows, columns, inputs, outputs), _CONV)
    if convolution.bias is not None:
        yield _Rule(f"{ours}.bias", (f"{theirs}/bias",), (outputs,))


def _dense_rules(ours: str, theirs: str, inputs: int, outputs: int) -> Iterator[_Rule]:
    yield _Rule(f"{ours}.weight", (f"{theirs}/kernel",), (inputs, outputs), _DENSE)
    yield _Rule(f"{ours}.bias", (f"{theirs}/bias",), (outputs,))


def _norm_rules(ours: str, theirs: str, width: int) -> Iterator[_Rule]:
    yield _Rule(f"{ours}.weight", (f"{theirs}/scale",), (width,))
    yield _Rule(f"{ours}.bias", (f"{theirs}/bias",), (width,))


def _convert(arrays: dict[str, Array], rules: Sequence[_Rule], kind: str) -> dict[str, Tensor]:
    """Converts arrays by the rules.

    Arrays are removed from the mapping one by one, so that a large file is not held in memory twice.
    """
    shapes = {name: rule.shape for rule in rules for name in rule.theirs}
    # All differences are collected first: one message shows whether the file is of another network.
    differences = {
        "missing": [name for name in shapes if name not in arrays],
        "superfluous": [name for name in arrays if name not in shapes],
        "of another shape": [
            f"{name} {arrays[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in arrays and arrays[name].shape != shape
        ],
    }
    found = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if found:
        raise ValueError(f"{kind} arrays must have the names and shapes of the released code, got {'; '.join(found)}")
    return {rule.ours: _tensor(arrays, rule, kind) for rule in rules}


def _tensor(arrays: dict[str, Array], rule: _Rule, kind: str) -> Tensor:
    parts = [arrays.pop(name) for name in rule.theirs]
    for name, part in zip(rule.theirs, parts, strict=True):
        if part.dtype.kind != "f":
            raise ValueError(f"{kind} {name} must hold floating point numbers, got {part.dtype}; name another file")
    rows = [rearrange(part, rule.axes) for part in parts]
    tensor = np.empty((sum(map(len, rows)), *rows[0].shape[1:]), np.float32)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused below
        np.concatenate(rows, out=tensor, casting="same_kind")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{kind} {_some(rule.theirs)} must hold finite numbers only; download the file again")
    return torch.from_numpy(tensor)


def _check_kind(arrays: Arrays, kind: str) -> None:
    if _MARKS[kind] in arrays:
        return
    other = next((name for name, mark in _MARKS.items() if mark in arrays), None)
    top = sorted({name.partition("/")[0] for name in arrays})
    found = f"those of a {other}; name that file with --{other}" if other else f"{_some(top)}; name another file"
    raise ValueError(f"{kind} arrays must be those of a released {kind}, got {found}")


def _shape(arrays: Arrays, name: str, *, axes: int) -> tuple[int, ...]:
    if name not in arrays:
        raise ValueError(f"{name} must be in the file, since sizes are inferred from it; name a released checkpoint")
    shape = arrays[name].shape
    if len(shape) != axes or not all(1 <= size <= _MAX_SIZE for size in shape):
        raise ValueError(f"{name} must have {axes} axes of sizes in [1, {_MAX_SIZE}], got {shape}")
    return shape


def _count(arrays: Arrays, prefix: str) -> int:
    """Returns the number of names ``PREFIX0``, ``PREFIX1``, ..."""
    return len({name.removeprefix(prefix).partition("/")[0] for name in arrays if name.startswith(prefix)})


def _some(names: Iterable[str]) -> str:
    """Lists the first few names in natural order, and the number of the others."""
    ordered = sorted(names, key=_natural)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{', '.join(name[:_SHOWN_LETTERS] for name in ordered[:_SHOWN]) or 'nothing'}{more}"


def _natural(name: str) -> list[str | int]:
    """Returns a sort key that puts ResBlock_2 before ResBlock_10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]

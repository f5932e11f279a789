"""Networks of the released MaskGIT code (JAX): their names and shapes beside ours.

A table of rules for each network, by which weights, and trees of gradients, get our names and layouts.

Source: google-research/maskgit, ``maskgit_transformer.py`` and ``vqgan_tokenizer.py``.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from maskgit_pl.importers.flax import Array
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, Activation, ResidualBlock, VQGANConfig

__all__ = ["parameters", "tokenizer_config", "tokenizer_weights", "transformer_config", "transformer_weights"]

log = logging.getLogger(__name__)

_KINDS: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm", ResidualBlock: "ResBlock"}

Arrays: TypeAlias = Mapping[str, Array]

_PARAMS = "params/"
_MARKS = {"tokenizer": "quantizer/codebook", "transformer": "Embed_0/word_embeddings/embedding"}
_DROPOUT = 0.1
_MAX_SIZE = 1 << 20  # of an axis; the released code's longest is 3072
_SHOWN, _SHOWN_LETTERS = 3, 120  # names in an error


@dataclass(frozen=True)
class _Rule:
    """A tensor of ours, from arrays of theirs.

    Args:
        ours: Its name in our state dict.
        theirs: Names of the arrays that become its rows, in this order.
        shape: Of each of these arrays.
        axes: How einops rearranges each.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    axes: str = "... -> ..."


_DENSE = "inputs outputs -> outputs inputs"
_CONV = "rows columns inputs outputs -> outputs inputs rows columns"
_TO_HEADS = "inputs heads head_width -> (heads head_width) inputs"
_FROM_HEADS = "heads head_width outputs -> outputs (heads head_width)"
_HEADS = "heads head_width -> (heads head_width)"


def parameters(arrays: Arrays) -> dict[str, Array]:
    """Returns the collection ``params`` of a checkpoint without the prefix; others are named in the log.

    Raises:
        ValueError: if there is none.
    """
    found = {name.removeprefix(_PARAMS): array for name, array in arrays.items() if name.startswith(_PARAMS)}
    others = sorted({name.partition("/")[0] for name in arrays if not name.startswith(_PARAMS)})
    if not found:
        raise ValueError(f"checkpoint: a collection 'params' is needed, got {_some(others)}; name another file")
    if others:
        log.info("not imported: %s", _some(others))
    return found


def transformer_config(arrays: Arrays, *, codebook_size: int) -> TransformerConfig:
    """Reads the sizes of a transformer off its arrays.

    Args:
        arrays: As ``parameters`` gives them.
        codebook_size: K of its tokenizer.

    Returns:
        The sizes; dropout is the released 0.1, and there is no null class.

    Raises:
        ValueError: if it is not a transformer of the released code, not of this tokenizer, or its grid is not square.
    """
    _check_kind(arrays, "transformer")
    words, width = _shape(arrays, _MARKS["transformer"], axes=2)
    positions, _ = _shape(arrays, "Embed_0/position_embeddings/embedding", axes=2)
    _, num_heads, _ = _shape(arrays, "TransformerLayer_0/Attention_0/self_attention/query/kernel", axes=3)
    _, mlp_dim = _shape(arrays, "TransformerLayer_0/Mlp_0/intermediate_output/kernel", axes=2)
    edge = math.isqrt(max(positions - 1, 0))
    if edge < 1 or edge**2 != positions - 1:
        raise ValueError(
            f"transformer positions: 1 and a square of tokens are needed (257, 1025, ...), got {positions}; "
            "grids that are not square cannot be imported"
        )
    num_classes = words - codebook_size - 1  # codes, classes, mask token
    if num_classes < 1:
        raise ValueError(
            f"transformer vocabulary: {codebook_size} codes of the tokenizer, at least 1 class and the mask token are "
            f"needed, got {words}; this transformer and this tokenizer do not belong together"
        )
    return TransformerConfig(
        codebook_size=codebook_size,
        num_classes=num_classes,
        grid=(edge, edge),
        embed_dim=width,
        depth=_count(arrays, "TransformerLayer_"),
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        dropout=_DROPOUT,
        class_dropout=0.0,
    )


def transformer_weights(arrays: Arrays, config: TransformerConfig) -> dict[str, Tensor]:
    """Returns weights, or gradients, of a transformer under our names.

    Args:
        arrays: As ``parameters`` gives them.
        config: Sizes.

    Returns:
        State dict of a ``MaskedTransformer`` of ``config``: float32 copies.

    Raises:
        ValueError: if an array is missing, left over, of another shape, or holds what is not a finite number.
    """
    return _carried_over(dict(arrays), list(_transformer_rules(config)), "transformer")


def tokenizer_config(
    arrays: Arrays, *, activation: Activation = "swish", quantizer: str | Mapping[str, Any] = "gradient"
) -> VQGANConfig:
    """Reads the sizes of a tokenizer off its arrays.

    Args:
        arrays: As ``parameters`` gives them.
        activation: Activation of its blocks; the arrays do not show it.
        quantizer: Name or mapping of a quantizer with no state beside the codebook.

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
            f"tokenizer blocks: as many on each of {levels} levels and in the middle are needed, got {blocks} in the "
            "encoder; this is not a released tokenizer"
        )
    kernels = [f"encoder/ResBlock_{level * num_res_blocks}/Conv_0/kernel" for level in range(levels)]
    widths = [_shape(arrays, name, axes=4)[-1] for name in kernels]
    if any(width % channels or width < channels for width in widths):
        raise ValueError(f"tokenizer widths: multiples of the first, {channels}, are needed, got {widths}")
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
    """Returns weights, or gradients, of a tokenizer under our names; see ``transformer_weights``."""
    return _carried_over(dict(arrays), list(_tokenizer_rules(config)), "tokenizer")


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
    with torch.device("meta"):  # shapes alone
        network = VQGAN(config)
    yield _Rule("quantizer.codebook", (_MARKS["tokenizer"],), (config.codebook_size, config.code_dim))
    for half in ("encoder", "decoder"):
        yield from _module_rules(network.get_submodule(half), half, half)


def _module_rules(module: nn.Module, ours: str, theirs: str) -> Iterator[_Rule]:
    """Yields the rules of the modules inside; flax numbers those of a kind in the order of their creation."""
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
    """Yields modules of the kinds that flax has, also those inside of other kinds."""
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


def _carried_over(arrays: dict[str, Array], rules: Sequence[_Rule], kind: str) -> dict[str, Tensor]:
    """Returns tensors by the rules; takes the arrays out one by one, so that a large file is not held twice."""
    shapes = {name: rule.shape for rule in rules for name in rule.theirs}
    differences = {
        "missing": [name for name in shapes if name not in arrays],
        "left over": [name for name in arrays if name not in shapes],
        "of another shape": [
            f"{name} {arrays[name].shape} instead of {shape}"
            for name, shape in shapes.items()
            if name in arrays and arrays[name].shape != shape
        ],
    }
    found = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if found:
        raise ValueError(f"{kind} arrays: names and shapes of the released code are needed, {'; '.join(found)}")
    return {rule.ours: _tensor(arrays, rule, kind) for rule in rules}


def _tensor(arrays: dict[str, Array], rule: _Rule, kind: str) -> Tensor:
    parts = [arrays.pop(name) for name in rule.theirs]
    for name, part in zip(rule.theirs, parts, strict=True):
        if part.dtype.kind != "f":
            raise ValueError(f"{kind} {name}: floating point numbers are needed, got {part.dtype}; name another file")
    rows = [rearrange(part, rule.axes) for part in parts]
    tensor = np.empty((sum(map(len, rows)), *rows[0].shape[1:]), np.float32)
    with np.errstate(over="ignore"):  # float64 that float32 does not hold becomes infinite, and is refused
        np.concatenate(rows, out=tensor, casting="same_kind")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{kind} {_some(rule.theirs)}: finite numbers are needed, got others; download the file again")
    return torch.from_numpy(tensor)


def _check_kind(arrays: Arrays, kind: str) -> None:
    if _MARKS[kind] in arrays:
        return
    other = next((name for name, mark in _MARKS.items() if mark in arrays), None)
    top = sorted({name.partition("/")[0] for name in arrays})
    found = f"those of a {other}; name that file with --{other}" if other else f"{_some(top)}; name another file"
    raise ValueError(f"{kind} arrays: those of a released {kind} are needed, got {found}")


def _shape(arrays: Arrays, name: str, *, axes: int) -> tuple[int, ...]:
    if name not in arrays:
        raise ValueError(f"{name}: it is needed to know the sizes, got a file without it; name a released checkpoint")
    shape = arrays[name].shape
    if len(shape) != axes or not all(1 <= size <= _MAX_SIZE for size in shape):
        raise ValueError(f"{name}: {axes} axes of sizes in [1, {_MAX_SIZE}] are needed, got {shape}")
    return shape


def _count(arrays: Arrays, prefix: str) -> int:
    """Returns the number of names ``PREFIX0``, ``PREFIX1``, ..."""
    return len({name.removeprefix(prefix).partition("/")[0] for name in arrays if name.startswith(prefix)})


def _some(names: Iterable[str]) -> str:
    """Returns the first few names in natural order, and the number of the others."""
    ordered = sorted(names, key=_natural)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return f"{', '.join(name[:_SHOWN_LETTERS] for name in ordered[:_SHOWN]) or 'nothing'}{more}"


def _natural(name: str) -> list[str | int]:
    """Sorts ResBlock_2 before ResBlock_10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]

"""Full-size checkpoints that need not be stored: every array is a fixed function of a seed and its own name.

``write`` makes flax's msgpack bytes of {"params": ...}, as the released checkpoints are, and returns their sha256.
``full/full_golden.json`` holds the sums for seed 31, the seed of the arrays recorded beside it.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import msgpack
import numpy as np

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Iterator[tuple[str, Shape]]  # path -> shape, in the order in which the file has them

_ARRAY = 1  # flax's msgpack extension type of an array


def transformer(
    *, layers: int = 24, width: int = 768, heads: int = 16, mlp: int = 3072, words: int = 2025, positions: int = 257
) -> Shapes:
    """The masked transformer. ``words``: codes, classes and the mask token; ``positions``: tokens and the class."""
    split = (heads, width // heads)
    yield "Embed_0/word_embeddings/embedding", (words, width)
    yield "Embed_0/position_embeddings/embedding", (positions, width)
    yield from _norm("Embed_0/embeddings_ln", width)
    for layer in range(layers):
        attention, feed_forward = f"TransformerLayer_{layer}/Attention_0", f"TransformerLayer_{layer}/Mlp_0"
        for name in ("query", "key", "value"):
            yield f"{attention}/self_attention/{name}/kernel", (width, *split)
            yield f"{attention}/self_attention/{name}/bias", split
        yield f"{attention}/self_attention/out/kernel", (*split, width)
        yield f"{attention}/self_attention/out/bias", (width,)
        yield from _norm(f"{attention}/attention_output_ln", width)
        yield from _layer(f"{feed_forward}/intermediate_output", (width, mlp))
        yield from _layer(f"{feed_forward}/layer_output", (mlp, width))
        yield from _norm(f"{feed_forward}/layer_output_ln", width)
    yield from _layer("MlmLayer_0/mlm_dense", (width, width))
    yield from _norm("MlmLayer_0/mlm_ln", width)
    yield "MlmLayer_0/mlm_bias/bias", (words,)


def tokenizer(
    *,
    filters: int = 128,
    blocks: int = 2,
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
    codes: int = 1024,
    code_dim: int = 256,
) -> Shapes:
    """The VQGAN with average pooling: encoder, codebook, decoder."""
    widths = [filters * multiplier for multiplier in channel_multipliers]
    last = widths[-1]
    down = [width for width in widths for _ in range(blocks)] + [last] * blocks
    up = [last] * blocks + [width for width in reversed(widths) for _ in range(blocks)]
    yield "encoder/Conv_0/kernel", (3, 3, 3, filters)
    yield from _residual_blocks("encoder", [filters, *down])
    yield from _norm("encoder/GroupNorm_0", last)
    yield from _layer("encoder/Conv_1", (1, 1, last, code_dim))
    yield "quantizer/codebook", (codes, code_dim)
    yield from _layer("decoder/Conv_0", (3, 3, code_dim, last))
    yield from _decoder_levels(up, blocks)
    yield from _norm("decoder/GroupNorm_0", filters)
    yield from _layer(f"decoder/Conv_{len(widths)}", (3, 3, widths[0], 3))


def discriminator(*, widths: tuple[int, ...] = (64, 128, 256, 512, 512, 512, 512)) -> Shapes:
    """The discriminator. ``widths``: channels at each resolution, from the image's down to 4 px."""
    last = widths[-1]
    yield from _layer("Conv_0", (3, 3, 3, widths[0]))
    for block, (before, after) in enumerate(pairwise(widths)):
        yield from _layer(f"ResBlock_{block}/Conv_0", (3, 3, before, before))
        yield f"ResBlock_{block}/Conv_1/kernel", (1, 1, before, after)
        yield from _layer(f"ResBlock_{block}/Conv_2", (3, 3, before, after))
    yield from _layer("Conv_1", (3, 3, last, last))
    yield from _layer("Dense_0", (16 * last, last))
    yield from _layer("Dense_1", (last, 1))


MODELS: dict[str, Callable[[], Shapes]] = {
    "transformer256": transformer,
    "transformer512": lambda: transformer(positions=1025),
    "tokenizer256": tokenizer,
    "discriminator256": discriminator,
}


def array_of(seed: int, model: str, path: str, shape: Shape) -> np.ndarray:
    """The float32 array of a path: normal numbers whose scale keeps signals of a model near 1."""
    key = (seed * 1000003 + zlib.crc32(f"{model}/{path}".encode())) % 2**32
    normal = np.random.RandomState(key).standard_normal(shape).astype(np.float32)
    scaled: np.ndarray = np.float32(_scale(model, path, shape)) * normal
    return np.float32(1) + scaled if path.endswith("/scale") else scaled


def _scale(model: str, path: str, shape: Shape) -> float:
    kind = path.rpartition("/")[2]
    if kind == "embedding":
        return 2.4 / math.sqrt(shape[1]) * (1.0 if "word" in path else 0.5)
    if kind == "kernel":
        inputs = shape[0] if any(name in path for name in ("query", "key", "value")) else math.prod(shape[:-1])
        return (1.5 if model.startswith("disc") else 1.0) / math.sqrt(inputs)
    return {"scale": 0.1, "bias": 0.1, "codebook": 0.6}[kind]


def write(seed: int, model: str, out: Path) -> str:
    """Writes a model's checkpoint, array by array, and returns its sha256."""
    shapes = MODELS[model]()
    return write_tree(out, shapes, lambda path, shape: array_of(seed, model, path, shape))


def write_tree(out: Path, shapes: Shapes, make: Callable[[str, Shape], np.ndarray]) -> str:
    """Writes {"params": the nested tree of ``shapes``} with the arrays that ``make`` gives, and returns its sha256."""
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for part in _packed({"params": _nested(shapes)}, "", make):
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _nested(shapes: Shapes) -> dict[str, object]:
    tree: dict[str, object] = {}
    for path, shape in shapes:
        *owners, name = path.split("/")
        node = tree
        for owner in owners:
            node = node.setdefault(owner, {})  # type: ignore[assignment]  # a tree of dicts and arrays
        node[name] = shape
    return tree


def _packed(tree: dict[str, object], prefix: str, make: Callable[[str, Shape], np.ndarray]) -> Iterator[bytes]:
    """The bytes of a tree whose leaves are shapes, one array in memory at a time."""
    packer = msgpack.Packer()
    yield packer.pack_map_header(len(tree))
    for name, node in tree.items():
        yield packer.pack(name)
        path = f"{prefix}/{name}"
        if isinstance(node, dict):
            yield from _packed(node, path, make)
        else:
            array = make(path.removeprefix("/params/"), node)  # type: ignore[arg-type]  # a tree of dicts and arrays
            payload = msgpack.packb((array.shape, array.dtype.name, array.tobytes("C")))
            yield packer.pack(msgpack.ExtType(_ARRAY, payload))


def _layer(path: str, kernel: Shape) -> Shapes:
    yield f"{path}/kernel", kernel
    yield f"{path}/bias", kernel[-1:]


def _norm(path: str, width: int) -> Shapes:
    yield f"{path}/scale", (width,)
    yield f"{path}/bias", (width,)


def _residual_blocks(part: str, widths: list[int], first: int = 0) -> Shapes:
    """Blocks between two of ``widths`` each, numbered from ``first``."""
    for number, (before, after) in enumerate(pairwise(widths), start=first):
        path = f"{part}/ResBlock_{number}"
        yield from _norm(f"{path}/GroupNorm_0", before)
        yield f"{path}/Conv_0/kernel", (3, 3, before, after)
        yield from _norm(f"{path}/GroupNorm_1", after)
        yield f"{path}/Conv_1/kernel", (3, 3, after, after)
        if before != after:  # the released shortcut acts on the block's output
            yield f"{path}/Conv_2/kernel", (1, 1, after, after)


def _decoder_levels(widths: list[int], blocks: int) -> Shapes:
    """The middle blocks, then levels with a convolution after each upsampling."""
    before = [widths[0], *widths]
    yield from _residual_blocks("decoder", before[: blocks + 1])
    for level, start in enumerate(range(blocks, len(widths), blocks), start=1):
        yield from _residual_blocks("decoder", before[start : start + blocks + 1], start)
        if start + blocks < len(widths):
            width = widths[start + blocks - 1]
            yield from _layer(f"decoder/Conv_{level}", (3, 3, width, width))

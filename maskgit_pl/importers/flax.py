"""Reads flax's msgpack files as numpy arrays, without flax or jax.

``flax.serialization.to_bytes`` writes one msgpack map of maps whose leaves are arrays in extension types. Files are
untrusted: nothing in them is executed, and memory stays within a small multiple of the file's size. Used by
``released``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from maskgit_pl.importers.checkpoints import check_format

__all__ = ["Array", "read_flax"]

Array: TypeAlias = npt.NDArray[Any]

_ARRAY, _SCALAR = 1, 3  # flax's extension types; 2 is a complex number
_CHUNKED = "__msgpack_chunked_array__"  # key of a map that stands for an array above 2^30 bytes
_NUMBERS = ("float16", "float32", "float64", "bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _NUMBERS} | {"bfloat16": np.dtype("<u2")}
# Far above the released transformer: 393 arrays, 5 levels deep, names below 30 letters.
_MAX_NODES, _MAX_DEPTH, _MAX_ENTRIES, _MAX_TEXT, _MAX_DIMENSIONS = 50_000, 16, 256, 512, 32
_ERROR_LENGTH = 300
_TOO_DEEP = f"maps must be nested at most {_MAX_DEPTH} deep"


def read_flax(path: Path) -> dict[str, Array]:
    """Reads a file that ``flax.serialization.to_bytes`` wrote.

    Args:
        path: Path of the file.

    Returns:
        Arrays by their path in the tree, such as ``params/Embed_0/word_embeddings/embedding``. bfloat16 becomes
        float32; numbers and texts become arrays without dimensions; None and empty maps are dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another format, is cut off or damaged, or claims more than it holds; or if the package
            msgpack is not installed.

    Source: flax, serialization.py.
    """
    check_format(path, "a msgpack file of flax (as released, about 200 or 700 MB)", "msgpack")
    try:
        import msgpack
    except ImportError as error:
        raise ValueError(f'checkpoint {path} requires msgpack; run pip install "maskgit_pl[import-jax]"') from error
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            return dict(_flatten(_parse(stream, size), "", 0))
    except msgpack.OutOfData as error:
        text = f"the file of {size:,} bytes is cut off"
        raise ValueError(f"checkpoint {path}: {text}; download it again") from error
    except (ValueError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        text = _TOO_DEEP if isinstance(error, msgpack.StackError | RecursionError) else " ".join(str(error).split())
        text = f"not a tree of arrays as flax writes it ({text[:_ERROR_LENGTH] or type(error).__name__})"
        raise ValueError(f"checkpoint {path}: {text}; download it again") from error


def _parse(stream: BinaryIO, size: int) -> Any:
    """Reads the tree array by array, so that the bytes of the file are in memory only once."""
    import msgpack

    seen = 0

    def count(nodes: int) -> None:
        nonlocal seen
        seen += nodes
        if seen > _MAX_NODES:
            raise ValueError(f"it must have at most {_MAX_NODES:,} entries")

    def as_map(pairs: list[tuple[str, Any]]) -> Any:
        count(1 + len(pairs))
        content: dict[str, Any] = {}
        for key, value in pairs:
            # Paths are joined with slashes, and printed.
            if key in content or not key.isprintable() or not key or "/" in key:
                raise ValueError(f"names must be unique, printable and without '/', got {key!r}")
            content[key] = value
        return _join_chunks(content) if _CHUNKED in content else content

    def as_array(code: int, data: bytes) -> Array:
        count(1)
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"extension types must be {_ARRAY} or {_SCALAR} (real numbers), got {code}")
        return _read_array(data)

    # The limits hold while msgpack parses, before it allocates what a hostile file claims.
    unpacker = msgpack.Unpacker(
        stream,
        object_pairs_hook=as_map,
        ext_hook=as_array,
        max_buffer_size=size,
        max_map_len=_MAX_ENTRIES,
        max_str_len=_MAX_TEXT,
        max_array_len=0,  # flax writes lists as maps
        max_bin_len=0,  # and bytes only inside extensions
        max_ext_len=size,
    )
    tree = unpacker.unpack()
    if unpacker.tell() != size:
        raise ValueError(f"the file must end with its tree, got {size - unpacker.tell():,} more bytes")
    return tree


def _flatten(value: Any, name: str, depth: int) -> Iterator[tuple[str, Array]]:
    """Yields the leaves with their paths."""
    if depth > _MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flatten(child, f"{name}/{key}" if name else key, depth + 1)
    elif isinstance(value, np.ndarray | bool | int | float | str):
        yield name, np.asarray(value)
    elif value is not None:
        raise ValueError(f"{name} must be an array, a number or a text, got {type(value).__name__}")


def _read_array(data: bytes) -> Array:
    """Returns the array or numpy's scalar in an extension, which is msgpack's (shape, dtype, bytes)."""
    import msgpack

    limits = {"max_array_len": _MAX_DIMENSIONS, "max_str_len": _MAX_TEXT, "max_map_len": 0, "max_ext_len": 0}
    match msgpack.unpackb(data, **limits):
        case [list(shape), str(dtype), bytes(content)] if all(type(size) is int and size >= 0 for size in shape):
            pass
        case _:
            raise ValueError(
                "an array must hold its shape of integers >= 0, its dtype and its bytes, got something else"
            )
    if dtype not in _DTYPES:
        raise ValueError(f"dtypes must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    # Compared before anything is allocated: the shape may claim more than the file holds.
    length = math.prod(shape) * _DTYPES[dtype].itemsize
    if length != len(content):
        raise ValueError(f"an array {dtype} {tuple(shape)} must have {length:,} bytes, got {len(content):,}")
    array: Array = np.ndarray(tuple(shape), _DTYPES[dtype], bytearray(content))
    # bfloat16 is the upper half of float32.
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


def _join_chunks(content: dict[str, Any]) -> Array:
    """Returns the array that a map of chunks stands for. A tuple is a map in flax: {"0": ..., "1": ...}."""
    try:
        shape, chunks = (
            [part[str(number)] for number in range(len(part))] for part in (content["shape"], content["chunks"])
        )
        array: Array = np.concatenate(chunks).reshape(shape)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("an array in chunks must hold its shape and pieces of one dimension that make it") from error
    return array

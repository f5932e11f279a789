"""Reads flax's msgpack files as numpy arrays, without flax or jax.

``flax.serialization.to_bytes`` writes one msgpack map of maps whose leaves are arrays in extension types. Files are
untrusted: nothing in them is executed, and memory stays within a small multiple of the file's size. Used by
``released``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from maskgit_pl.importers.files import check_flax_file

__all__ = ["Array", "read_flax"]

Array: TypeAlias = npt.NDArray[Any]

_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's extension types
_CHUNKED = "__msgpack_chunked_array__"  # key of a map that stands for an array above 2^30 bytes
_PLAIN = (
    "float16",
    "float32",
    "float64",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "bool",
)
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _PLAIN} | {"bfloat16": np.dtype("<u2")}  # see _float32
_BYTES_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}  # msgpack's bin 8, 16, 32: bytes that hold the length
# Far above the released transformer: 393 arrays, 5 levels deep, names below 30 letters.
_MAX_NODES, _MAX_DEPTH, _MAX_ENTRIES, _MAX_TEXT, _MAX_DIMENSIONS = 50_000, 16, 256, 512, 32
_ERROR_LENGTH = 300
_TOO_DEEP = f"maps must be nested at most {_MAX_DEPTH} deep"
_HEADER = 4 + 5 * _MAX_DIMENSIONS * 2 + _MAX_TEXT  # bytes before an array's data, at most


def read_flax(path: Path) -> dict[str, Array]:
    """Reads a file that ``flax.serialization.to_bytes`` wrote.

    Args:
        path: Path of the file.

    Returns:
        Read-only arrays by their path in the tree, such as ``params/Embed_0/word_embeddings/embedding``. bfloat16
        becomes float32; numbers and texts become arrays without dimensions; None and empty maps are dropped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another format, is cut off or damaged, or claims more than it holds; or if the package
            msgpack is not installed.

    Source: flax, serialization.py.
    """
    check_flax_file(path)
    try:
        import msgpack
    except ImportError as error:
        raise ValueError(f'checkpoint {path} requires msgpack; run pip install "maskgit_pl[import-jax]"') from error
    try:
        with path.open("rb") as stream:
            return dict(_flatten(_parse(stream, path.stat().st_size), "", 0))
    except (ValueError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"checkpoint {path}: {_reason(error, path.stat().st_size)}; download it again") from error
    except MemoryError as error:
        raise ValueError(f"checkpoint {path}: out of memory while reading it") from error


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
        return _join_chunks(_check_unique(pairs))

    def as_array(code: int, data: bytes) -> Array:
        count(1)
        return _read_extension(code, data)

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


def _reason(error: Exception, size: int) -> str:
    import msgpack

    if isinstance(error, msgpack.OutOfData):
        return f"the file of {size:,} bytes is cut off"
    if isinstance(error, msgpack.StackError | RecursionError):
        return _TOO_DEEP
    text = " ".join(str(error).split()) or type(error).__name__
    return f"not a tree of arrays as flax writes it ({text[:_ERROR_LENGTH]})"


def _check_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a map, whose names must be unique, printable and without slashes, since paths are joined with them."""
    content = dict(pairs)
    for key in content:
        if not isinstance(key, str) or not key.isprintable() or not key or "/" in key:
            raise ValueError(f"names must be printable and without '/', got {key!r}")
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"names must be unique, got {twice!r} twice")
    return content


def _flatten(value: Any, name: str, depth: int) -> Iterator[tuple[str, Array]]:
    """Yields the leaves with their paths."""
    if depth > _MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _flatten(child, f"{name}/{key}" if name else key, depth + 1)
    elif isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, bool | int | float | str):
        yield name, _read_only(np.asarray(value))
    elif value is not None:
        raise ValueError(f"{name} must be an array, a number or a text, got {type(value).__name__}")


def _read_extension(code: int, data: bytes) -> Array:
    """Returns the array in an extension; numpy's scalars have the same form."""
    if code == _COMPLEX:
        raise ValueError("numbers must be real, got complex ones")
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"extension types must be {_ARRAY} or {_SCALAR}, got {code}")
    shape, dtype, offset = _array_header(data)
    # Compared before anything is allocated: the shape may claim more than the file holds.
    length = math.prod(shape) * _DTYPES[dtype].itemsize
    if offset + length != len(data):
        raise ValueError(f"an array {dtype} {shape} must have {length:,} bytes, got {len(data) - offset:,}")
    # frombuffer refuses an empty buffer.
    array = np.frombuffer(data, _DTYPES[dtype], math.prod(shape), offset) if length else np.empty(0, _DTYPES[dtype])
    return _read_only((_float32(array) if dtype == "bfloat16" else array).reshape(shape))


def _array_header(data: bytes) -> tuple[tuple[int, ...], str, int]:
    """Returns shape, dtype and the offset of the data of an array, which is msgpack's (shape, dtype, bytes)."""
    import msgpack

    # Only the first bytes are parsed; the data is used in place, without a copy.
    header = msgpack.Unpacker(
        max_buffer_size=_HEADER, max_array_len=_MAX_DIMENSIONS, max_str_len=_MAX_TEXT, max_map_len=0, max_ext_len=0
    )
    header.feed(data[:_HEADER])
    try:
        fields, shape, dtype = header.read_array_header(), header.unpack(), header.unpack()
    except msgpack.OutOfData as error:
        raise ValueError("an array must hold its shape, dtype and bytes, got less") from error
    offset = header.tell()
    width = _BYTES_LENGTHS.get(data[offset]) if offset < len(data) else None
    if fields != 3 or not isinstance(shape, list) or not isinstance(dtype, str) or width is None:
        raise ValueError("an array must hold its shape, dtype and bytes, got something else")
    _check_shape(shape)
    if dtype not in _DTYPES:
        raise ValueError(f"dtypes must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    start = offset + 1 + width
    if int.from_bytes(data[offset + 1 : start], "big") != len(data) - start:
        raise ValueError("an array must hold as many bytes as it claims, got another number")
    return tuple(shape), dtype, start


def _check_shape(shape: list[Any]) -> None:
    if any(type(size) is not int or not 0 <= size < 1 << 40 for size in shape):
        raise ValueError(f"a shape must be integers >= 0, got {shape}")


def _float32(bits: Array) -> Array:
    """Converts bfloat16, which is the upper half of float32."""
    wide: Array = (bits.astype(np.uint32) << 16).view(np.float32)
    return wide


def _join_chunks(content: dict[str, Any]) -> dict[str, Any] | Array:
    """Returns the array that a map of chunks stands for, and other maps unchanged."""
    if _CHUNKED not in content:
        return content
    shape, chunks = (_list_from_tuple(content.get(name)) for name in ("shape", "chunks"))
    if any(not isinstance(chunk, np.ndarray) or chunk.ndim != 1 for chunk in chunks) or not chunks:
        raise ValueError("an array in chunks must hold arrays of one dimension, got something else")
    _check_shape(shape)
    array = np.concatenate(chunks)
    if math.prod(shape) != array.size:
        raise ValueError(f"chunks of {tuple(shape)} must hold {math.prod(shape):,} numbers, got {array.size:,}")
    return _read_only(array.reshape(shape))


def _list_from_tuple(content: Any) -> list[Any]:
    """Returns the values of {"0": ..., "1": ...}, flax's form of a tuple."""
    if not isinstance(content, Mapping) or set(content) != {str(number) for number in range(len(content))}:
        raise ValueError("an array in chunks must number its shape and chunks from 0, got something else")
    return [content[str(number)] for number in range(len(content))]


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array

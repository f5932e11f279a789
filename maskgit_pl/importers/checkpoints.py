"""Reads checkpoints that other projects released, as tensors by name: of torch, of safetensors, and flax's msgpack.

Files are untrusted, and none is executed: ``weights.load_pickle`` reads those of torch, no tensor may describe more
than its file holds, and flax's files are read without flax or jax, in a small multiple of their size. Used by all
importers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from maskgit_pl.networks.weights import check_held, check_tensor, load_pickle, read_tensors
from maskgit_pl.text import list_some, printable, shorten

Array: TypeAlias = npt.NDArray[Any]

_DIFFUSERS = tuple(f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "fp16.safetensors", "bin"))
_FORMATS = {  # how files begin; the first that matches counts, and msgpack is the least distinctive
    "safetensors": rb"(?s:.{4})\x00{4}\{",  # the length of the header, below 2^32
    "pickle": rb"\x80[\x02-\x05]",
    "zip": rb"PK\x03\x04",
    "msgpack": rb"[\x80-\x8f\xde\xdf]",
}
_WEIGHTS = ("model_state_dict", "state_dict", "ema", "model")  # entries; as in LlamaGen, its average before "model"
_HEAD = 24  # bytes of a file that tell its format, or what else it is

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts that torch adds to names

_ARRAY, _SCALAR = 1, 3  # flax's extension types; 2 is a complex number
_NUMBERS = ("float16", "float32", "float64", "bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))
# Far above the released transformer: 393 arrays, names below 30 letters.
_MAX_NODES, _MAX_ENTRIES, _MAX_TEXT, _MAX_DIMENSIONS = 50_000, 256, 512, 32
_ERROR_LENGTH = 300


def find_weights(path: Path) -> Path:
    """Returns the file of weights that a path names.

    Args:
        path: A file, a folder in which diffusers saved a VQModel, or one of a pipeline with its ``vqvae``;
            any other path is returned as it is.
    """
    names = [path / folder / name for folder in ("", "vqvae") for name in _DIFFUSERS]
    return next((name for name in names if name.is_file()), path)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Reads the state dict of a checkpoint of torch.

    Args:
        file: A file of torch.save or safetensors. Its state dict is the first of the entries ``_WEIGHTS`` that it has;
            a file without such an entry is a state dict itself.

    Returns:
        The state dict without the prefixes of wrappers, with values of any type.
    """
    kind = _check_format(file, "a file of torch.save or of safetensors", "zip", "pickle", "safetensors")
    with name_file(file):
        content = read_tensors(file) if kind == "safetensors" else load_pickle(file, f"checkpoint {file}")
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {file} must hold a state dict, got {type(content).__name__}")
    entries = (content.get(name) for name in _WEIGHTS)
    with name_file(file):
        return remove_wrappers(next((entry for entry in entries if isinstance(entry, Mapping) and entry), content))


def remove_wrappers(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a state dict by the names of the network itself, without those of DDP, FSDP and ``torch.compile``."""
    unwrapped: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"tensors must have names, got {shorten(name)}, which is no text; name a file of weights")
        inner = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        while inner.startswith("module."):  # DistributedDataParallel's; elsewhere it may be the network's
            inner = inner.removeprefix("module.")
        unwrapped[inner] = value
    return unwrapped


def select_tensors(contents: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Tensor]:
    """Returns the tensors of a network.

    Args:
        contents: State dict.
        others: Names of entries that are not part of the network; a name that ends in a dot is a beginning.
    """
    # Only these are left out: an unknown tensor means another network.
    beginnings = tuple(name for name in others if name.endswith("."))
    tensors = {
        name: value for name, value in contents.items() if name not in others and not name.startswith(beginnings)
    }
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"entry {printable(name)} must be a tensor, got {type(value).__name__}")
    return tensors


def check_weights(tensors: Mapping[str, Tensor], size: int) -> None:
    """Checks that tensors hold finite floating point numbers, and not more of them than a file of ``size`` bytes."""
    check_held(tensors, size)  # before all of a tensor is read
    for name, tensor in tensors.items():
        check_tensor(name, tensor)


@contextmanager
def name_file(file: Path) -> Iterator[None]:
    """Adds the name of the file to each ValueError that has none."""
    try:
        yield
    except ValueError as error:
        text, name = str(error), f"checkpoint {file}"
        raise ValueError(text if text.startswith(name) else f"{name}: {text}") from error


def name_some(names: Iterable[str]) -> str:
    """Lists the first three names of a file, without control characters, and the number of the others."""
    return list_some([printable(name) for name in names])


def _check_format(path: Path, description: str, *accepted: str) -> str:
    """Returns the format of a file, by its first bytes.

    Args:
        path: Path of the file.
        description: The accepted files, for the error.
        accepted: Names of the accepted formats.
    """
    rule = f"checkpoint {path} must be {description}"
    if path.is_dir():
        raise ValueError(f"{rule}, got a folder; name the file itself")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; download it, or name another")
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    kind = next((name for name, beginning in _FORMATS.items() if re.match(beginning, head)), "another format")
    if kind not in accepted:
        raise ValueError(
            f"{rule}, got {kind} that begins with {head!r}; unpack it, or download it again (for a pointer of Git "
            "LFS: `git lfs pull`)"
        )
    return kind


def read_flax(path: Path) -> dict[str, Array]:
    """Reads a file that ``flax.serialization.to_bytes`` wrote: one msgpack map of maps, with arrays in extension types.

    Args:
        path: Path of the file.

    Returns:
        Arrays by their path in the tree, such as ``params/Embed_0/word_embeddings/embedding``. Numbers become
        arrays without dimensions; None and empty maps are dropped.

    Source: flax, serialization.py.
    """
    _check_format(path, "a msgpack file of flax (as released, about 200 or 700 MB)", "msgpack")
    try:
        import msgpack
    except ImportError as error:
        raise ValueError(f'checkpoint {path} requires msgpack; run pip install "maskgit_pl[import-jax]"') from error
    seen = 0

    def count(nodes: int) -> None:
        nonlocal seen
        seen += nodes
        if seen > _MAX_NODES:
            raise ValueError(f"it must have at most {_MAX_NODES:,} entries")

    def as_map(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        count(1 + len(pairs))
        return dict(pairs)

    def as_array(code: int, data: bytes) -> Array:
        count(1)
        return _read_array(code, data, msgpack.unpackb)

    # The limits hold while msgpack parses, before it allocates what a hostile file claims. The file is read array by
    # array, so that its bytes are in memory only once. flax writes lists as maps, and bytes only inside extensions.
    size = path.stat().st_size
    limits = {"max_map_len": _MAX_ENTRIES, "max_str_len": _MAX_TEXT, "max_array_len": 0, "max_bin_len": 0}
    limits |= {"max_ext_len": size, "max_buffer_size": size}
    try:
        with path.open("rb") as stream:
            unpacker = msgpack.Unpacker(stream, object_pairs_hook=as_map, ext_hook=as_array, **limits)
            arrays = dict(_flatten(unpacker.unpack(), ""))
        if unpacker.tell() != size:
            raise ValueError(f"{size - unpacker.tell():,} more bytes after the tree")
        return arrays
    except (ValueError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        text = " ".join(str(error).split())[:_ERROR_LENGTH] or type(error).__name__
        raise ValueError(
            f"checkpoint {path}: cut off, or not a tree of arrays as flax writes it ({text}); download it again"
        ) from error


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Array]]:
    """Yields the leaves with their paths. msgpack parses maps of at most 1024 levels."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not key.isprintable() or not key or "/" in key:  # paths are joined with slashes, and printed
                raise ValueError(f"names must be printable and without '/', got {key!r}")
            yield from _flatten(child, f"{name}/{key}" if name else key)
    elif isinstance(value, np.ndarray | bool | int | float):
        yield name, np.asarray(value)
    elif value is not None:
        raise ValueError(f"{name} must be an array or a number, got {type(value).__name__}")


def _read_array(code: int, data: bytes, unpack: Callable[..., Any]) -> Array:
    """Returns the array or numpy's scalar in an extension, which ``unpack`` splits into (shape, dtype, bytes)."""
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"extension types must be {_ARRAY} or {_SCALAR} (real numbers), got {code}")
    limits = {"max_array_len": _MAX_DIMENSIONS, "max_str_len": _MAX_TEXT, "max_map_len": 0, "max_ext_len": 0}
    match unpack(data, **limits):
        case [list(shape), str(dtype), bytes(content)] if all(type(size) is int and size >= 0 for size in shape):
            pass
        case _:
            raise ValueError("an array must hold its shape of integers >= 0, its dtype and its bytes")
    if dtype not in _NUMBERS:
        raise ValueError(f"dtypes must be one of {', '.join(_NUMBERS)}, got {dtype!r}")
    # Compared before anything is allocated: the shape may claim more than the file holds.
    kind = np.dtype(dtype).newbyteorder("<")
    length = math.prod(shape) * kind.itemsize
    if length != len(content):
        raise ValueError(f"an array {dtype} {tuple(shape)} must have {length:,} bytes, got {len(content):,}")
    return np.ndarray(tuple(shape), kind, bytearray(content))

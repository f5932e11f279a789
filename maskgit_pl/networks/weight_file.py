"""Weights from files: what a file claims is checked before it is read, and what it holds before a network takes it.

Pretrained folders, feature networks, classifiers and importers read weights with these functions. Nothing in a file is
executed, and nothing is built or expanded that the file does not hold.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn

from maskgit_pl.checks import shorten
from maskgit_pl.files import size_text

__all__ = [
    "TensorInfo",
    "check_archive",
    "check_fit",
    "check_held",
    "check_tensor",
    "load_weight_file",
    "load_weights",
    "open_tensors",
    "read_tensor_header",
    "read_tensors",
    "read_weights",
    "tensors_digest",
]

_MAX_HEADER_BYTES = 8_000_000  # some 60,000 tensors; safetensors itself takes 100 MB, which need 1 GB to parse
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEADER_FLOATS = ("F16", "BF16", "F32", "F64")  # the same in the words of a safetensors header
_SHOWN = 3  # names in a message
_LONGEST = 300  # letters of what torch says: it names every tensor

_UNREADABLE = (  # what the loaders raise on a file that is damaged or hostile
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
)


class TensorInfo(NamedTuple):
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: In the words of the format, e.g. ``F32``.
        shape: Of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


def open_tensors(file: Path) -> safe_open:
    """Opens a safetensors file whose header is of a reasonable size.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the header has more than 8 MB, or does not fit the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights {file}: no such file")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if _MAX_HEADER_BYTES < length <= file.stat().st_size:
        raise ValueError(
            f"weights {file}: the header must have at most {size_text(_MAX_HEADER_BYTES)}, got {size_text(length)}"
        )
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        text = " ".join(str(error).split())[:_LONGEST]
        raise ValueError(f"weights {file}: not safetensors, or not whole ({text}); copy or make it again") from error


def read_tensor_header(file: Path) -> dict[str, TensorInfo]:
    """Reads names, dtypes and shapes of a safetensors file, and no tensor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as ``open_tensors``.
    """
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
        return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as ``open_tensors``.
    """
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping


def check_fit(network: nn.Module, header: Mapping[str, TensorInfo], where: str) -> None:
    """Compares a network with the header of a file, before the file's tensors are read.

    Args:
        network: May be on the device ``meta``.
        header: As ``read_tensor_header`` gives it.
        where: Name of the file, for the message.

    Raises:
        ValueError: if names, shapes or kinds of numbers differ. The message names the first tensors that do.
    """
    own = network.state_dict()
    missing = [f"{name} is missing" for name in own if name not in header]
    unknown = [f"{shorten(name)} has no place in the network" for name in header if name not in own]
    other = [
        f"{name} must have shape {tuple(tensor.shape)}, got {header[name].shape}"
        for name, tensor in own.items()
        if name in header and header[name].shape != tuple(tensor.shape)
    ]
    found = [*other, *missing, *unknown]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{where}: they do not fit the network's sizes: {'; '.join(found[:_SHOWN])}{more}")
    for name, info in header.items():
        if own[name].is_floating_point() != (info.dtype in _HEADER_FLOATS):
            raise ValueError(f"{where}: tensor {_kind_rule(name, own[name])}, got {info.dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Checks that a tensor of weights holds finite floating point numbers.

    ``aminmax`` reads a tensor once and allocates nothing: 0.1 s for 500 MB, where ``isfinite().all()`` takes 2 s.

    Raises:
        ValueError: if it does not. The message names the tensor.
    """
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"tensor {_kind_rule(name, tensor.new_empty(0, dtype=torch.float32))}, got {tensor.dtype}")
    extremes = [float(value) for value in torch.aminmax(tensor.detach())] if tensor.numel() else []
    bad = next((value for value in extremes if not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(
            f"tensor {shorten(name)} must hold finite numbers, got {bad}; the file is damaged, or the training that "
            "wrote it diverged: take another one"
        )


def check_held(tensors: Mapping[str, Tensor], size: int) -> None:
    """Checks that tensors are no larger than the file that they come from.

    A pickle may describe a tensor as a view that repeats a few numbers, or name one storage many times: it would take
    its full size as soon as it is copied.

    Args:
        tensors: By name.
        size: Bytes of the file.

    Raises:
        ValueError: if a tensor is larger than its storage, is not an ordinary tensor, or all of them are larger than
            the file.
    """
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"tensor {shorten(name)} must be an ordinary tensor, got {tensor.layout} {tensor.dtype}")
        needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if needed > held:
            raise ValueError(
                f"tensor {shorten(name)} must be held by the file, got one of {size_text(needed)} that repeats "
                f"{size_text(held)}"
            )
        total += needed
    if total > size:
        raise ValueError(
            f"tensors must be held by the file, got {size_text(total)} of them in a file of {size_text(size)}; "
            "several share their numbers"
        )


def check_archive(stream: IO[bytes], size: int) -> None:
    """Checks that a zip archive, as ``torch.save`` writes it, unpacks to no more than its own size.

    Args:
        stream: The file. Anything else than a zip archive passes.
        size: Bytes of the file.

    Raises:
        ValueError: if an entry is compressed, or the entries are larger than the file.
    """
    if not zipfile.is_zipfile(stream):
        return
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(f"the zip archive is damaged ({error})") from error
    compressed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if compressed:
        packed = max(compressed, key=lambda entry: entry.file_size)
        raise ValueError(
            f"entries of the archive must not be compressed, got {shorten(packed.filename)} of "
            f"{size_text(packed.file_size)} in {size_text(packed.compress_size)}"
        )
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(f"entries of the archive must fit its {size_text(size)}, got {size_text(total)}")


def read_weights(path: Path, *, thing: str, sha256: str = "") -> Mapping[str, Tensor]:
    """Reads a ``.safetensors`` file, or one that ``torch.load(weights_only=True)`` reads.

    Args:
        path: The file.
        thing: The owner of the weights, for errors, e.g. ``"feature network 'timm'"``.
        sha256: First digits of the file's own; none are asked for if empty.

    Returns:
        Tensors by name.

    Raises:
        ValueError: if the file is missing, another one than the digits say, holds anything but tensors, or describes
            tensors that it does not hold.
    """
    if not path.is_file():
        raise ValueError(f"{thing} weights: an existing file is needed, got {path}")
    content = path.read_bytes()  # once: what is checked is what is read
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(sha256):
        raise ValueError(
            f"{thing} weights: a file whose sha256 begins with {sha256} is needed, got {path} with {found[:16]}...; "
            "it was not loaded: download it again"
        )
    try:
        state = _parse(content, is_safetensors=path.suffix == ".safetensors")
    except _UNREADABLE as error:
        raise ValueError(f"{thing} weights: {path} is no file of tensors alone: {_first_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{thing} weights: tensors by name are needed, got {path} with something else")
    try:
        check_held(state, len(content))
    except ValueError as error:
        raise ValueError(f"{thing} weights {path}: {error}") from error
    return state


def load_weight_file(network: nn.Module, path: Path, *, thing: str, sha256: str = "") -> None:
    """Gives a network the weights of a file.

    Args:
        network: Of the sizes of the weights.
        path: As ``read_weights`` takes it; ``thing`` and ``sha256`` too.
        thing: The owner of the weights, for errors.
        sha256: First digits of the file's own.

    Raises:
        ValueError: as ``read_weights`` and ``load_weights``.
    """
    load_weights(network, read_weights(path, thing=thing, sha256=sha256), f"{thing} {path}")


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: Path | str, *, assign: bool = False) -> None:
    """Gives a network weights that a file holds.

    Args:
        network: Of the sizes of the weights.
        weights: Its state dict.
        where: The file or folder that they come from, for the error.
        assign: Whether the network takes these very tensors instead of their values.

    Raises:
        ValueError: if a tensor is not of the kind of the network's, holds a number that is not finite, or names or
            shapes differ.
    """
    own = network.state_dict()
    for name, tensor in weights.items():
        if name not in own:  # torch names it below
            continue
        try:
            if own[name].is_floating_point():
                check_tensor(name, tensor)
            elif tensor.is_floating_point():
                raise ValueError(f"tensor {_kind_rule(name, own[name])}, got {tensor.dtype}")
        except ValueError as error:
            raise ValueError(f"weights {where}: {error}") from error
    try:
        network.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        raise ValueError(f"weights {where}: they do not fit the network's sizes: {shown}") from error


def tensors_digest(named: Iterable[tuple[str, Tensor]], *, prefix: str = "") -> str:
    """Returns the sha256, in hex, of tensors as they are: their names, types, shapes and bytes, in the order given.

    Args:
        named: Names and tensors, on any device.
        prefix: What else decides the digest.
    """
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parse(content: bytes, *, is_safetensors: bool) -> object:
    if is_safetensors:
        if int.from_bytes(content[:8], "little") > _MAX_HEADER_BYTES:
            raise ValueError(f"the header must have at most {size_text(_MAX_HEADER_BYTES)}")
        return safetensors.load(content)
    check_archive(io.BytesIO(content), len(content))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _kind_rule(name: str, own: Tensor) -> str:
    rule = "floating point (float16, bfloat16, float32, float64)" if own.is_floating_point() else "integers"
    return f"{shorten(name)} must be {rule}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

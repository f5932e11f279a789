"""Weights from untrusted files: the header is checked before tensors are read, and tensors before a network takes them.

Pretrained folders, feature networks, classifiers and importers read weights with these functions. No file is executed,
and no memory is allocated for tensors that a file claims but does not hold. ``skeletons`` creates networks with shapes,
but without memory and values: to compare names, to count, or to be filled with weights.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskgit_pl.checks import shorten
from maskgit_pl.files import TooLargeDirectoryError, open_zip, size_text

__all__ = [
    "TensorInfo",
    "ZeroWeights",
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
    "skeletons",
    "tensors_digest",
]

_MAX_HEADER_BYTES = 8_000_000  # about 60,000 tensors; safetensors accepts 100 MB, which take 1 GB to parse
_MAX_ENTRIES = 10**6  # of the zip archive of torch.save; a tensor is one
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEADER_FLOATS = ("F16", "BF16", "F32", "F64")  # the same, as a safetensors header spells them
_SHOWN = 3  # names in a message
_LONGEST = 300  # letters of torch's own message, which names every tensor
_Network = TypeVar("_Network", bound=nn.Module)
_UNREADABLE = (  # errors of the loaders on a file that is damaged or hostile
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


def open_tensors(file: Path) -> safe_open:
    """Opens a safetensors file whose header is of a reasonable size.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the header is larger than 8 MB, or the file is not safetensors or is cut off.
    """
    if not file.is_file():
        raise FileNotFoundError(f"weights {file}: no such file")
    # The first 8 bytes are the length of the header. Checked here, since parsing a header of 100 MB takes 1 GB.
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
        raise ValueError(
            f"weights {file} must be a complete safetensors file, got an error: {text}; copy it again"
        ) from error


def read_tensor_header(file: Path) -> dict[str, TensorInfo]:
    """Reads the names, dtypes and shapes of a safetensors file, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see ``open_tensors``.
    """
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
        return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see ``open_tensors``.
    """
    with open_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping


class TensorInfo(NamedTuple):
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: Type as the format spells it, such as ``F32``.
        shape: Shape of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]


def read_weights(path: Path, *, thing: str, sha256: str = "") -> Mapping[str, Tensor]:
    """Reads a ``.safetensors`` file, or one that ``torch.load(weights_only=True)`` reads.

    Args:
        path: The file.
        thing: Owner of the weights, for errors, such as ``"feature network 'timm'"``.
        sha256: First digits of the expected sha256; empty accepts any file.

    Returns:
        Tensors by name.

    Raises:
        ValueError: if the file is missing, its sha256 differs, or it holds anything but tensors, or tensors larger
            than itself.
    """
    if not path.is_file():
        raise ValueError(f"{thing} weights must be an existing file, got {path}")
    content = path.read_bytes()  # read once, so that the bytes that are hashed are those that are parsed
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(sha256):
        raise ValueError(
            f"{thing} weights must be a file whose sha256 begins with {sha256}, got {path} with {found[:16]}...; "
            "it was not loaded: download it again"
        )
    try:
        state = _parse(content, is_safetensors=path.suffix == ".safetensors")
    except _UNREADABLE as error:
        raise ValueError(
            f"{thing} weights: {path} must hold tensors only, got an error: {_first_line(error)}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{thing} weights: {path} must hold a mapping of names to tensors")
    try:
        check_held(state, len(content))
    except ValueError as error:
        raise ValueError(f"{thing} weights {path}: {error}") from error
    return state


def load_weight_file(create: Callable[[], _Network], path: Path, *, thing: str, sha256: str = "") -> _Network:
    """Returns a network with the weights of a file, which are compared with it before it takes memory.

    Args:
        create: Builds the network with the sizes of the weights.
        path: See ``read_weights``.
        thing: See ``read_weights``.
        sha256: See ``read_weights``.

    Raises:
        ValueError: see ``read_weights``, ``check_fit`` and ``load_weights``.
    """
    weights, where = read_weights(path, thing=thing, sha256=sha256), f"{thing} {path}"
    header = {
        name: TensorInfo("F32" if tensor.is_floating_point() else str(tensor.dtype), tuple(tensor.shape))
        for name, tensor in weights.items()
    }
    with skeletons():
        check_fit(create(), header, f"weights {where}")
    network = create()
    load_weights(network, weights, where)
    return network


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: Path | str, *, assign: bool = False) -> None:
    """Loads weights that come from a file into a network, after checking them.

    Args:
        network: Network with the sizes of the weights.
        weights: State dict of the network.
        where: File or folder of the weights, for the error.
        assign: True to use these tensors themselves; False to copy their values.

    Raises:
        ValueError: if names, shapes or kinds of numbers differ, or a number is non-finite.
    """
    # load_state_dict would cast integers and accept nan without a word.
    own = network.state_dict()
    for name, tensor in weights.items():
        if name not in own:  # load_state_dict reports it
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
        raise ValueError(f"weights {where} do not fit the network's sizes: {shown}") from error


def check_fit(network: nn.Module, header: Mapping[str, TensorInfo], where: str) -> None:
    """Checks that a file has exactly the tensors of a network, before the file's tensors are read.

    Args:
        network: Network, on any device, also ``meta``.
        header: Result of ``read_tensor_header``.
        where: Name of the file, for the message.

    Raises:
        ValueError: if names, shapes or kinds of numbers differ. The message names the first of these tensors.
    """
    own = network.state_dict()
    missing = [f"{name} is missing" for name in own if name not in header]
    unknown = [f"{shorten(name)} is not in the network" for name in header if name not in own]
    other = [
        f"{name} must have shape {tuple(tensor.shape)}, got {header[name].shape}"
        for name, tensor in own.items()
        if name in header and header[name].shape != tuple(tensor.shape)
    ]
    # Wrong shapes come first: they usually explain the others.
    found = [*other, *missing, *unknown]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(f"{where} do not fit the network's sizes: {'; '.join(found[:_SHOWN])}{more}")
    for name, info in header.items():
        if own[name].is_floating_point() != (info.dtype in _HEADER_FLOATS):
            raise ValueError(f"{where}: tensor {_kind_rule(name, own[name])}, got {info.dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Checks that a tensor of weights holds finite floating point numbers.

    Raises:
        ValueError: if it does not. The message names the tensor.
    """
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"tensor {_kind_rule(name, tensor.new_empty(0, dtype=torch.float32))}, got {tensor.dtype}")
    # aminmax reads a tensor once and allocates nothing: 0.1 s for 500 MB; isfinite().all() takes 2 s.
    extremes = [float(value) for value in torch.aminmax(tensor.detach())] if tensor.numel() else []
    bad = next((value for value in extremes if not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(
            f"tensor {shorten(name)} must hold finite numbers, got {bad}; the file is damaged, or the training that "
            "wrote it diverged: use another file"
        )


def check_held(tensors: Mapping[str, Tensor], size: int) -> None:
    """Checks that tensors are not larger than the file that they come from.

    A pickle can describe a tensor as a view that repeats a few numbers, or use one storage many times. Such a tensor
    takes its full size when it is copied.

    Args:
        tensors: Tensors by name.
        size: Size of the file in bytes.

    Raises:
        ValueError: if a tensor is larger than its storage or is not dense, or all of them together are larger than the
            file.
    """
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"tensor {shorten(name)} must be a dense CPU tensor, got {tensor.layout} {tensor.dtype}")
        # A copy takes the bytes of all elements; the file holds those of the storage.
        needed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if needed > held:
            raise ValueError(
                f"tensor {shorten(name)} must be stored in full, got {size_text(needed)} made of {size_text(held)} "
                "that repeat"
            )
        total += needed
    if total > size:
        raise ValueError(
            f"tensors must be stored in full, got {size_text(total)} of them in a file of {size_text(size)}; several "
            "share their storage"
        )


def check_archive(stream: IO[bytes], size: int) -> None:
    """Checks that a zip archive of ``torch.save`` does not unpack to more than its own size.

    Args:
        stream: The file. A file of another format passes.
        size: Size of the file in bytes.

    Raises:
        ValueError: if an entry is compressed, or the entries are too many or larger than the file.
    """
    if not zipfile.is_zipfile(stream):
        return
    stream.seek(0)
    try:
        with open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
            entries = archive.infolist()
    except TooLargeDirectoryError as error:
        raise ValueError(f"the zip archive must have {error}") from error
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


def tensors_digest(named: Iterable[tuple[str, Tensor]], *, prefix: str = "") -> str:
    """Returns the sha256, in hex, of tensors: their names, types, shapes and bytes, in the given order.

    Args:
        named: Names and tensors, on any device.
        prefix: Text that is hashed first.
    """
    digest = hashlib.sha256(prefix.encode())
    # The names and shapes are hashed too: equal bytes may be cut into tensors in different ways.
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def skeletons() -> Iterator[None]:
    """Creates the networks of a ``with`` block on the meta device, and draws no initial weights for them."""
    with torch.device("meta"), ZeroWeights():
        yield


class ZeroWeights(TorchFunctionMode):
    """Fills weights with zeros instead of random numbers, which take half a minute for a large network.

    For draws on the meta device, torch would also import its compiler, in twice its own time.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],  # the interface of torch
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls ``func``, but replaces methods of tensors and functions of ``torch.nn.init`` that draw."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


def _parse(content: bytes, *, is_safetensors: bool) -> object:
    """Returns the content of a file."""
    if is_safetensors:
        if int.from_bytes(content[:8], "little") > _MAX_HEADER_BYTES:
            raise ValueError(f"the header must have at most {size_text(_MAX_HEADER_BYTES)}")
        return safetensors.load(content)
    check_archive(io.BytesIO(content), len(content))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _kind_rule(name: str, own: Tensor) -> str:
    """Returns the rule that a file's tensor breaks if its kind of numbers is not the network's."""
    rule = "floating point (float16, bfloat16, float32, float64)" if own.is_floating_point() else "integers"
    return f"{shorten(name)} must be {rule}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

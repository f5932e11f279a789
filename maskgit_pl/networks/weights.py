"""Weights from untrusted files: tensors are checked before a network takes them, and networks before they take memory.

Pretrained folders, feature networks, classifiers and importers read weights with these functions. No file is
executed, and no memory is allocated for tensors that a file claims but does not hold. ``skeletons`` creates
networks with shapes, but without memory and values: to compare names, to count, or to be filled with weights.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskgit_pl.files import TooLargeDirectoryError, open_zip, sha256_of
from maskgit_pl.text import list_some, printable, shorten, size_text

_MAX_HEADER_BYTES = 8_000_000  # about 60,000 tensors; safetensors accepts 100 MB, which take 1 GB to parse
_MAX_ENTRIES = 10**6  # of the zip archive of torch.save; a tensor is one
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Classes that training programs store beside weights: numpy's are learning rates and scores, the types are
# those in containers of omegaconf.
_RECORDS = ("pytorch_lightning.", "lightning.", "argparse.Namespace", "omegaconf.", "numpy.")
_TYPES = {"typing.Any", "collections.defaultdict"}
_TYPES |= {f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")}
_MAPPING = ".AttributeDict"  # end of the name of Lightning's class of hyper-parameters
_WAY_OUT = (
    "on a machine that trusts the file, load it with the program that wrote it and save only the weights: "
    'torch.save(checkpoint["..."], "weights.pt") with the name of its weights, such as state_dict or model'
)
_LONGEST = 300  # letters of a message of a loader
_Network = TypeVar("_Network", bound=nn.Module)


def open_tensors(file: Path) -> safe_open:
    """Opens a safetensors file whose header is of a reasonable size."""
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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file; see ``open_tensors`` for the errors."""
    with open_tensors(file) as opened:
        try:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
        except SafetensorError as error:  # a type of numbers that torch lacks
            raise ValueError(f"weights {file} cannot be read: {error}") from error


def read_weights(path: Path, *, thing: str, sha256: str = "") -> dict[str, Tensor]:
    """Reads a ``.safetensors`` file, or one of ``torch.save`` that holds tensors only.

    Args:
        path: The file.
        thing: Owner of the weights, for errors, such as ``"feature network 'timm'"``.
        sha256: First digits of the expected sha256; empty accepts any file.

    Returns:
        Tensors by name, contiguous in memory of their own: the place and the strides of a weight change how
        products round.
    """
    if not path.is_file():
        raise ValueError(f"{thing} weights must be an existing file, got {path}")
    if sha256 and not (digest := sha256_of(path)).startswith(sha256):
        raise ValueError(
            f"{thing} weights must be a file whose sha256 begins with {sha256}, got {path} with {digest[:16]}...; "
            "it was not loaded: download it again"
        )
    if path.suffix == ".safetensors":
        return {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    where = f"{thing} weights {path}"
    state = load_pickle(path, where)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{where} must hold tensors only, got something else than a mapping of names to tensors")
    try:
        check_held(state, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def load_pickle(file: Path, name: str) -> Any:
    """Reads a file of ``torch.save`` with torch's loader for tensors, which runs no code of the file.

    Checkpoints also hold records of training programs: Lightning before 1.7 keyed its callbacks' states by their
    classes, LlamaGen stores its arguments, and the optimizer of Halton-MaskGIT has a learning rate of numpy. An empty
    stand-in takes the place of each such class, which is never imported. Files from before torch 1.6, which are no zip
    archives, must hold tensors only.

    Args:
        file: The file.
        name: The file's name in error messages.

    Returns:
        The content. ``check_held`` must pass before a tensor of it is copied.
    """
    try:
        is_archive = zipfile.is_zipfile(file)
        if is_archive:
            _check_archive(file)  # before anything is unpacked
        classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) if is_archive else []
        other = next((each for each in classes if not each.startswith(_RECORDS) and each not in _TYPES), None)
        # The loader fills mappings of a few classes only.
        stand_ins = [
            (OrderedDict if each.endswith(_MAPPING) else type(each.rpartition(".")[2], (_Record,), {}), each)
            for each in classes
        ]
        if other is None:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # torch's type lacks the pairs
                return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:  # its own text advises to trust the file
        raise ValueError(f"{name} is damaged, or holds a Python object; {_WAY_OUT}") from error
    except Exception as error:  # the loader raises many types, depending on where a file is damaged
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} cannot be read ({text}); download it again, or save it with torch.save") from error
    raise ValueError(f"{name} must hold tensors only, got also {printable(other)}, a Python object; {_WAY_OUT}")


class _Record:
    """A stand-in for an object of a training program: it accepts any arguments and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        return


def _check_archive(file: Path) -> None:
    """Checks that a zip archive of ``torch.save`` does not unpack to more than its own size."""
    try:
        with file.open("rb") as stream, open_zip(stream, max_entries=_MAX_ENTRIES) as archive:
            entries = archive.infolist()
    except TooLargeDirectoryError as error:
        raise ValueError(f"the zip archive must have {error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ValueError(f"the zip archive is damaged ({error})") from error
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise ValueError(f"entries of the archive must not be compressed, got {shorten(packed.filename)}")
    size, total = file.stat().st_size, sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(f"entries of the archive must fit its {size_text(size)}, got {size_text(total)}")


def load_network(create: Callable[[], _Network], weights: Mapping[str, Tensor], where: Path | str) -> _Network:
    """Creates a network with weights that come from a file.

    1. Create the network without memory, which is also faster than drawing initial weights.
    2. Compare the names and shapes of the weights with it, and check their numbers.
    3. Assign the tensors. A network with tensors outside of its state dict is created again, with memory.

    Args:
        create: Creates the network with the sizes of the weights.
        weights: State dict of the network; floating point numbers of any precision.
        where: File of the weights, for errors; see ``load_weights``.
    """
    # 1.
    with skeletons():
        network = create()
    # 2. and 3.
    load_weights(network, weights, where, assign=True)
    if any(tensor.is_meta for tensor in chain(network.parameters(), network.buffers())):
        network = create()
        network.load_state_dict(weights)
    return network


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], where: Path | str, *, assign: bool = False) -> None:
    """Loads weights that come from a file into a network, after checking them.

    Args:
        network: Network with the sizes of the weights.
        weights: State dict of the network.
        where: File or folder of the weights, for the error.
        assign: True to use these tensors themselves, in the network's dtypes; False to copy their values.
    """
    expected = network.state_dict()
    try:
        check_shapes(weights, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        for name, tensor in weights.items():
            if expected[name].is_floating_point():  # a large float64 number is infinite in float32
                check_tensor(name, tensor.to(expected[name].dtype) if tensor.dtype in _FLOATS else tensor)
            elif tensor.dtype in _FLOATS:  # load_state_dict would cast it without a word
                raise ValueError(f"tensor {shorten(name)} must be integers, got {tensor.dtype}")
    except ValueError as error:
        raise ValueError(f"weights {where}: {error}") from error
    network.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in weights.items()}, assign=assign)


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that tensors have exactly these names and shapes."""
    faults = [
        f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    # Wrong shapes come first: they usually explain the others.
    faults += [f"{name} is missing" for name in shapes if name not in tensors]
    faults += [f"{shorten(name)} is not in the network" for name in tensors if name not in shapes]
    if faults:
        raise ValueError(f"tensors do not fit the network's sizes: {list_some(faults, separator='; ')}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Checks that a tensor of weights holds finite floating point numbers."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"tensor {shorten(name)} must be floating point (float16, bfloat16, float32, float64), got {tensor.dtype}"
        )
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

    A pickle can describe a tensor as a view that repeats a few numbers, or use one storage many times. Such a
    tensor takes its full size when it is copied.

    Args:
        tensors: Tensors by name.
        size: Size of the file in bytes.
    """
    total = 0
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
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

"""Reads checkpoints in torch that other projects released, as tensors by name. Used by all importers.

Files are untrusted, and none is executed: torch's loader for tensors reads them, known records of training programs are
passed over without their classes, and no tensor may describe more than its file holds.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import shorten
from maskgit_pl.errors import printable
from maskgit_pl.networks.weights import check_archive, check_held, check_tensor, read_tensors

__all__ = [
    "check_format",
    "check_weights",
    "find_weights",
    "name_file",
    "name_some",
    "read_checkpoint",
    "remove_wrappers",
    "select_tensors",
]

_DIFFUSERS = tuple(f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "fp16.safetensors", "bin"))
# Format -> its name for people, and how its files begin. The first bytes of msgpack are the least distinctive.
_FORMATS = {
    "lfs": ("a Git LFS pointer; fetch the weights with `git lfs pull`", rb"version https://git-lfs"),
    "html": ("a web page; the download went wrong", rb"\s*<"),
    "pickle": ("a Python pickle", rb"\x80[\x02-\x05]"),
    "zip": ("a zip archive, as torch.save and numpy.savez write them", rb"PK\x03\x04"),
    "gzip": ("a gzip archive; unpack it first", rb"\x1f\x8b"),
    "tar": ("a tar archive; unpack it first", rb"(?s:.{257})ustar"),
    "safetensors": ("a safetensors file", rb"(?s:.{4})\x00{4}\{"),  # the length of the header, below 2^32
    "msgpack": ("", rb"[\x80-\x8f\xde\xdf]"),
}
_HEAD = 512  # bytes; a pointer of Git LFS is shorter

# Classes that training programs store beside weights; numpy's are learning rates and scores.
_RECORDS = ("pytorch_lightning.", "lightning.", "argparse.Namespace", "omegaconf.", "numpy.")
# Types that the containers of omegaconf hold; the loader names built-in ones without their module.
_TYPES = ("typing.Any", "collections.defaultdict")
_BUILT_IN_TYPES = ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")
_MAPPING = ".AttributeDict"  # end of the name of Lightning's class of hyper-parameters
_MAX_RECORDS = 100  # each class is found by another try, so that very many of them would take hours
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts that torch adds to names


def find_weights(path: Path) -> Path:
    """Returns the file of weights that a path names.

    Args:
        path: A file, a folder in which diffusers saved a VQModel, or one of a pipeline with its ``vqvae``; any other
            path is returned as it is.
    """
    names = [path / folder / name for folder in ("", "vqvae") for name in _DIFFUSERS]
    return next((name for name in names if name.is_file()), path)


def check_format(path: Path, description: str, *accepted: str) -> str:
    """Returns the format of a file, by its first bytes.

    Args:
        path: Path of the file.
        description: The accepted files, for the error.
        accepted: Names of the accepted formats.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, an empty file, or of another format.
    """
    rule = f"checkpoint {path} must be {description}"
    if path.is_dir():
        raise ValueError(f"{rule}, got a folder; name the file itself")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; download it, or name another")
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        raise ValueError(f"{rule}, got an empty file; download it again")
    found = ((name, text) for name, (text, beginning) in _FORMATS.items() if re.match(beginning, head))
    kind, text = next(found, ("", ""))
    if kind not in accepted:
        raise ValueError(f"{rule}, got {text or f'one that begins with {head[:8]!r}'}")
    return kind


def read_checkpoint(file: Path, *, entries: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the state dict of a checkpoint.

    Args:
        file: A file of torch.save or safetensors.
        entries: Names of the entries that may hold the state dict; the first that does is read. A file without such an
            entry is a state dict itself.

    Returns:
        The state dict without the prefixes of wrappers, with values of any type, and the names of the other entries.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another format, damaged, or holds a Python object, a name that is no text, or a sparse
            or nested tensor.
    """
    kind = check_format(file, "a file of torch.save or of safetensors", "zip", "pickle", "safetensors")
    if kind == "zip" and not zipfile.is_zipfile(file):  # the directory of a zip is at its end
        raise ValueError(f"checkpoint {file}: the file is cut off; download it again")
    try:
        if kind == "zip":
            with file.open("rb") as stream:
                check_archive(stream, file.stat().st_size)
        content: Any = read_tensors(file) if kind == "safetensors" else _load_tensors(file, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(file, str(error), entries)) from error
    except Exception as error:  # the loaders raise many types, depending on where a file is damaged
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"checkpoint {file}: cannot be read ({text}); download it again") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {file} must hold a state dict, got {type(content).__name__}")
    chosen = next((name for name in entries if isinstance(content.get(name), Mapping) and content[name]), None)
    others = () if chosen is None else tuple(str(name) for name in content if name != chosen)
    with name_file(file):
        return remove_wrappers(content if chosen is None else content[chosen]), others


def remove_wrappers(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a state dict by the names of the network itself, without those of torch's wrappers.

    Args:
        state: State dict of a network, or of one in ``DistributedDataParallel``, ``torch.compile`` or FSDP.

    Raises:
        ValueError: if a name is no text, a tensor is there with and without a wrapper, or it is sparse or nested.
    """
    own: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(
                f"tensors must have names, got the name {shorten(name)}, which is no text; name a file of weights"
            )
        # A tensor of another layout has no shape or no memory to compare.
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            got = "a nested tensor" if value.is_nested else value.layout
            raise ValueError(f"tensor {shorten(name)} must be a dense CPU tensor, got {got}")
        inner = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        while inner.startswith("module."):  # DistributedDataParallel's; elsewhere it may be the network's
            inner = inner.removeprefix("module.")
        if inner in own:
            raise ValueError(f"tensor {printable(inner)} must be there once, got it twice, with and without a prefix")
        own[inner] = value
    return own


def select_tensors(
    contents: Mapping[str, Any], others: Sequence[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Returns the tensors of a network, and the names of known other ones with their counts.

    Args:
        contents: State dict.
        others: Names of entries that are not part of the network; a name that ends in a dot is a beginning.

    Raises:
        ValueError: if another entry is no tensor.
    """
    # Only known others are left out: an unknown tensor means another network.
    tensors: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    for name, value in contents.items():
        known = next(
            (other for other in others if name == other or (other[-1] == "." and name.startswith(other))), None
        )
        if known is not None:
            left_out[known] += 1
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            raise ValueError(f"entry {printable(name)} must be a tensor, got {type(value).__name__}")
    return tensors, tuple(f"{name}* ({count} tensors)" if name[-1] == "." else name for name, count in left_out.items())


def check_weights(tensors: Mapping[str, Tensor], size: int) -> None:
    """Checks that tensors hold finite floating point numbers, and not more of them than a file of ``size`` bytes.

    Raises:
        ValueError: see ``weights.check_held`` and ``weights.check_tensor``.
    """
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


def name_some(names: Iterable[str], *, limit: int = 3) -> str:
    """Lists the first names of a file, without control characters, and the number of the others."""
    shown = list(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(map(printable, shown[:limit])) + more


def _load_tensors(file: Path, *, mmap: bool) -> Any:
    """Reads a file with torch's loader for tensors, and with a stand-in for each known class of training programs.

    Lightning before 1.7 keyed its callbacks' states by their classes, LlamaGen stores its arguments, and the optimizer
    of Halton-MaskGIT has a learning rate of numpy. The classes are never imported.

    1. Load with the stand-ins so far.
    2. If the loader names a class of ``_RECORDS`` that has no stand-in, make one, and try again.
    """
    stand_ins: dict[str, type] = {}
    while True:
        # 1.
        try:
            pairs = [(kind, name) for name, kind in stand_ins.items()]
            with torch.serialization.safe_globals(pairs):  # type: ignore[arg-type]  # torch's type lacks the pairs
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            # 2.
            name = _find_unknown_class(str(error))
            if name is None or name in stand_ins or not _is_record(name) or len(stand_ins) >= _MAX_RECORDS:
                raise
            # The loader fills mappings of a few classes only.
            stand_ins[name] = OrderedDict if name.endswith(_MAPPING) else type(name.rpartition(".")[2], (_Record,), {})


class _Record:
    """A stand-in for an object of a training program: it accepts any arguments and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        return


def _find_unknown_class(text: str) -> str | None:
    """Returns the class that torch's loader for tensors names in its refusal, if there is one."""
    found = re.search(r"GLOBAL (\S+)", text)
    if found is None:
        return None
    return f"builtins.{found[1]}" if found[1] in _BUILT_IN_TYPES else found[1]


def _is_record(name: str) -> bool:
    """Returns True if a class of this name is passed over."""
    module, _, last = name.rpartition(".")
    return name.startswith(_RECORDS) or name in _TYPES or (module == "builtins" and last in _BUILT_IN_TYPES)


def _refusal(file: Path, text: str, entries: Sequence[str]) -> str:
    """Returns the message for a file that torch's loader refuses, with the way out."""
    found = _find_unknown_class(text)
    if found is None:
        return f"checkpoint {file}: damaged, or not a file of torch.save; download it again"
    return (
        f"checkpoint {file} must hold tensors only, got also {found}, a Python object; on a machine that trusts the "
        "file, load it with the program that wrote it and save only the weights: "
        f'torch.save(checkpoint["..."], "weights.pt") with the name of its weights, such as {" or ".join(entries)}'
    )

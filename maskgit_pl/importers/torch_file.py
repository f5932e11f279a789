"""Reads checkpoints that other training programs wrote with torch.save or safetensors. Used by the importers.

No file is executed: torch's loader for tensors reads it, and known records of training programs are skipped.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit_pl.checks import shorten
from maskgit_pl.importers.files import check_torch_file
from maskgit_pl.networks.weights import check_archive, read_tensors
from maskgit_pl.text import printable

__all__ = ["name_file", "name_some", "read_checkpoint", "remove_wrappers"]

# Classes that training programs store beside weights; numpy's are learning rates and scores.
_RECORDS = ("pytorch_lightning.", "lightning.", "argparse.Namespace", "omegaconf.", "numpy.")
# Types that the containers of omegaconf hold; the loader names built-in ones without their module.
_TYPES = ("typing.Any", "collections.defaultdict")
_BUILT_IN_TYPES = ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # parts that torch adds to names
_MAPPING = ".AttributeDict"  # end of the name of Lightning's class of hyper-parameters
_MAX_RECORDS = 100  # each class is found by another try, so that very many of them would take hours


def read_checkpoint(file: Path, *, entries: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads the state dict of a checkpoint.

    Args:
        file: A file of torch.save or safetensors.
        entries: Names of the entries that may hold the state dict; the first that does is read. A file without such an
            entry is a state dict itself.

    Returns:
        The state dict, with texts as names and values of any type, and the names of the other entries.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another format, damaged, or holds a Python object, a name that is no text, or a sparse
            or nested tensor.
    """
    kind = check_torch_file(file)
    try:
        if kind == "safetensors":
            return dict(read_tensors(file)), ()
        if kind == "zip":
            with file.open("rb") as stream:
                check_archive(stream, file.stat().st_size)
        content = _load_tensors(file, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(file, str(error), entries)) from error
    except Exception as error:  # the loaders raise many types, depending on where a file is damaged
        raise ValueError(f"checkpoint {file}: cannot be read ({_first_line(error)}); download it again") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {file} must hold a state dict, got {type(content).__name__}")
    for name in entries:
        if isinstance(content.get(name), Mapping) and content[name]:
            return _check_entries(file, content[name]), tuple(str(other) for other in content if other != name)
    return _check_entries(file, content), ()


def _check_entries(file: Path, state: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a state dict after a check that its names are texts, and its tensors are of the usual layout."""
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(
                f"checkpoint {file} must hold tensors by their names, got the name {shorten(name)}, which is no text; "
                "name a file of weights"
            )
        # A tensor of another layout has no shape or no memory to compare.
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            got = "a nested tensor" if value.is_nested else value.layout
            raise ValueError(f"checkpoint {file}: tensor {shorten(name)} must be a dense CPU tensor, got {got}")
    return dict(state)


def remove_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict by the names of the network itself, without those of torch's wrappers.

    Args:
        state: State dict of a network, or of one in ``DistributedDataParallel``, ``torch.compile`` or FSDP.

    Raises:
        ValueError: if a tensor is there with and without a wrapper.
    """
    own: dict[str, Any] = {}
    for name, value in state.items():
        inner = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        while inner.startswith("module."):  # DistributedDataParallel's; elsewhere it may be the network's
            inner = inner.removeprefix("module.")
        if inner in own:
            raise ValueError(f"tensor {inner} must be there once, got it twice, with and without a prefix")
        own[inner] = value
    return own


class _Record:
    """A stand-in for an object of a training program: it accepts any arguments and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        return


def _load_tensors(file: Path, *, mmap: bool) -> Any:
    """Reads a file with torch's loader for tensors, and with a stand-in for each known class of training programs.

    Lightning before 1.7 keyed its callbacks' states by their classes, LlamaGen stores its arguments, and the optimizer
    of Halton-MaskGIT has a learning rate of numpy. The classes are never imported.

    1. Load with the stand-ins so far.
    2. If the loader names a class of ``_RECORDS`` that has no stand-in, make one, and try again.
    """
    stand_ins: list[tuple[type, str]] = []
    while True:
        # 1.
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # torch's type lacks the pairs
                return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            # 2.
            name = _find_unknown_class(str(error))
            if name is None or not _is_record(name) or any(name == known for _, known in stand_ins):
                raise
            if len(stand_ins) >= _MAX_RECORDS:
                raise
            # The loader fills mappings of a few classes only.
            kind = OrderedDict if name.endswith(_MAPPING) else type(name.rpartition(".")[2], (_Record,), {})
            stand_ins.append((kind, name))


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
    """Returns the message for a file that torch's loader refuses, with the way out.

    Args:
        file: The file.
        text: Message of the loader.
        entries: Names of the entries that may hold the weights.
    """
    found = _find_unknown_class(text)
    if found is None:
        return f"checkpoint {file}: damaged, or not a file of torch.save; download it again"
    return (
        f"checkpoint {file} must hold tensors only, got also {found}, a Python object; on a machine that trusts the "
        "file, load it with the program that wrote it and save only the weights: "
        f'torch.save(checkpoint["..."], "weights.pt") with the name of its weights, such as {" or ".join(entries)}'
    )


@contextmanager
def name_file(file: Path) -> Iterator[None]:
    """Adds the name of the file to each ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error


def name_some(names: Iterable[str], *, limit: int = 3) -> str:
    """Lists the first names of a file, without control characters, and the number of the others."""
    shown = list(names)
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(map(printable, shown[:limit])) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""Weight files from elsewhere: their sha256 is checked before anything is read, and tensors alone are read."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

__all__ = ["load_weights", "read_weights"]

_LONGEST = 300  # of what torch says: it names every tensor


def read_weights(path: Path, *, thing: str, sha256: str = "") -> Mapping[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of one that ``torch.load(weights_only=True)`` reads.

    Args:
        path: The file.
        thing: What the weights are of, for errors, e.g. ``"feature network 'timm'"``.
        sha256: First digits of the file's own; none are asked for if empty.

    Raises:
        ValueError: The file is missing, another one than the digits say, or holds something else than tensors.
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
        state = (
            safetensors.load(content)
            if path.suffix == ".safetensors"
            else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{thing} weights: {path} is no file of tensors alone: {_first_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{thing} weights: tensors by name are needed, got {path} with something else")
    return state


def load_weights(network: nn.Module, path: Path, *, thing: str, sha256: str = "") -> None:
    """Gives a network the weights of a file; arguments and errors as of ``read_weights``.

    Raises:
        ValueError: Also where the weights do not fit the network.
    """
    state = read_weights(path, thing=thing, sha256=sha256)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:_LONGEST]
        raise ValueError(f"{thing} weights: {path} does not fit {type(network).__name__}: {text} ...") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

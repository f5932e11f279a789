"""The checkpoint folder: what Lightning wants to save as safetensors and JSON, complete or ignored.

    step-00001000/
      tensors-00000-of-00002.safetensors   each rank's part of the tensors that are sharded; rank 0's has the others too
      tensors-00001-of-00002.safetensors
      state.json                           plain values, with the names of tensors in their places
      COMPLETE.json                        written last: bytes and sha256 of each file

A folder is written under a temporary name beside its place and renamed when all of it is on disk. Nothing in it is
unpickled. One process and DDP write one tensor file, FSDP2 one a rank; any world size reads either.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from typing_extensions import override

from maskgit_pl.checks import check_integer, check_keys, shorten
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.files import read_json, replace_folder, sha256_of, size_text, write_tensors, write_text
from maskgit_pl.old_names import rename_tensor, rename_tensors
from maskgit_pl.training.checkpoint_state import StateFormatError, join_state, split_state
from maskgit_pl.training.checkpoint_tensors import FIRST_ROWS, SavedTensor, TensorPieces, own_pieces

__all__ = [
    "SETTINGS",
    "FolderCheckpointIO",
    "SavedTensor",
    "complete_checkpoints",
    "find_leftovers",
    "newest_checkpoint",
    "read_settings",
    "step_of",
]

_STATE, _MARKER = "state.json", "COMPLETE.json"
_VERSION = 2  # 1: one file ``tensors.safetensors``
SETTINGS = "maskgit_pl.settings"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_FORMAT = "maskgit_pl.checkpoint"
_FILE_NAME = re.compile(r"state\.json|tensors(-\d{5,}-of-\d{5,})?\.safetensors")
_MAX_STATE_BYTES = 16_000_000  # a stage of 1,000 tensors has 600 kB


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads what Lightning wants to checkpoint as a folder of tensors and plain values.

    With ranks, all of them call it together, and an error of one is raised on all.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the folder ``path``; what was there under that name is replaced only by a complete one.

        Raises:
            TypeError: if the checkpoint holds something that is neither a tensor nor a plain value; its key is named.
            OSError: if the disk is full or not writable; nothing is left behind.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.partial")
        tensors: dict[str, Tensor] = {}
        state = split_state(checkpoint, "", tensors)
        rank, _ = rank_and_world()
        pieces = own_pieces(tensors, rank)
        sizes = on_all_ranks(lambda: sum(rows.nbytes for rows, _ in pieces.values()))
        writers = [each for each, size in enumerate(sizes) if size]
        try:
            on_all_ranks(lambda: _make_room(temporary, sum(sizes)) if rank == 0 else None)
            written = on_all_ranks(
                lambda: _write_tensors(temporary, pieces, writers.index(rank), len(writers)) if rank in writers else {}
            )
            on_all_ranks(lambda: _complete(temporary, target, state, written) if rank == 0 else None)
        finally:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a complete folder, whole tensors on the CPU.

        Raises:
            ValueError: if the folder is incomplete or a file is not what was written.
        """
        return self.load_pieces(path, lambda _, saved: saved.read_all())

    def load_pieces(self, path: str | Path, read: Callable[[str, SavedTensor], Tensor]) -> dict[str, Any]:
        """Reads a complete folder, of each tensor what ``read`` takes of it.

        Args:
            path: The folder.
            read: Given the tensor's place in the checkpoint, such as ``/state_dict/layer.weight``, by its new name.

        Raises:
            ValueError: if the folder is incomplete or a file is not what was written.
        """
        folder = Path(path)
        rank, world_size = rank_and_world()
        files = _files(folder)
        on_all_ranks(lambda: _verify(folder, sorted(files)[rank::world_size], files))  # the ranks share the hashing
        with TensorPieces(folder, [name for name in sorted(files) if name != _STATE], rank) as pieces:
            return _state(folder, lambda key: read(rename_tensor(key), SavedTensor(key, pieces)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint; its marker goes first, so that half a checkpoint is never taken for a whole one."""
        (Path(path) / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the complete checkpoint with the highest step in a ``checkpoints`` folder, or None."""
    return max(complete_checkpoints(folder), default=None, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns all complete checkpoints of a ``checkpoints`` folder, the oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / _MARKER).is_file()]
    return sorted(found, key=step_of)


def find_leftovers(folder: Path) -> list[Path]:
    """Returns what lies half written or half removed in a ``checkpoints`` folder."""
    torn = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return [*folder.glob(".step-*"), *(path for path in torn if not (path / _MARKER).exists())]


def step_of(checkpoint: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Reads the settings of the run that a complete checkpoint carries; None if it has none.

    Raises:
        ValueError: if the file is not what was written.
    """
    _verify(folder, [_STATE], _files(folder))
    settings = _state(folder, lambda _: None).get(SETTINGS)
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"checkpoint {folder}: {SETTINGS} must be a mapping, got {shorten(settings)}")
    return settings


def _make_room(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        text = f"a checkpoint needs {size_text(needed)}, {size_text(free)} are free"
        raise OSError(errno.ENOSPC, text, str(folder.parent))
    folder.mkdir()


def _write_tensors(folder: Path, pieces: Mapping[str, tuple[Tensor, int]], number: int, count: int) -> dict[str, Any]:
    """Writes a tensor file. Returns what the marker says of it."""
    file = folder / f"tensors-{number:05d}-of-{count:05d}.safetensors"
    tensors = {key: rows.detach().cpu().contiguous().clone() for key, (rows, _) in pieces.items()}
    starts = {key: start for key, (_, start) in pieces.items() if start}
    write_tensors(file, tensors, metadata={FIRST_ROWS: json.dumps(starts)})
    return {file.name: _describe_file(file)}


def _complete(temporary: Path, target: Path, state: Any, written: Sequence[Mapping[str, Any]]) -> None:
    write_text(temporary / _STATE, json.dumps(state))
    files = {name: said for each in written for name, said in each.items()}
    files[_STATE] = _describe_file(temporary / _STATE)
    write_text(temporary / _MARKER, json.dumps({"format": _FORMAT, "version": _VERSION, "files": files}))
    replace_folder(temporary, target)


def _describe_file(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _files(folder: Path) -> dict[str, Any]:
    """Returns what the marker says of each file.

    Raises:
        ValueError: if there is no marker, or it is not one of a known version.
    """
    where = f"checkpoint {folder}: {_MARKER}"
    if not (folder / _MARKER).is_file():
        raise ValueError(f"checkpoint {folder}: incomplete, it has no {_MARKER}; give an older one or train again")
    try:
        marker = read_json(folder / _MARKER)
    except ValueError as error:
        raise ValueError(
            f"{where} is not what was written ({error}); take the folder away to resume from an older one"
        ) from error
    check_keys(where, marker, known=marker, required=("format", "version", "files"))
    if marker["format"] != _FORMAT:
        raise ValueError(f"{where}: format must be {_FORMAT!r}, got {shorten(marker['format'])}")
    check_integer(f"{where}: version", marker["version"], "[1, inf)")
    if marker["version"] > _VERSION:
        raise ValueError(
            f"{where}: version must be at most {_VERSION}, got {shorten(marker['version'])}; "
            "a newer maskgit_pl wrote it: install that one"
        )
    files = marker["files"]
    if not isinstance(files, dict) or _STATE not in files:
        raise ValueError(f"{where}: files must be a mapping with {_STATE}, got {shorten(files)}")
    for name, said in files.items():
        _check_file(name, said, where)
    return files


def _check_file(name: str, said: Any, where: str) -> None:
    """Refuses a file of a marker that is elsewhere, or described by something else than its size and hash."""
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{where}: files must be {_STATE} and tensors*.safetensors, got {shorten(name)}")
    if not isinstance(said, dict):
        raise ValueError(f"{where}: {name} must be a mapping, got {shorten(said)}")
    check_keys(f"{where}: {name}", said, known=said, required=("bytes", "sha256"))
    check_integer(f"{where}: {name}.bytes", said["bytes"], "[0, inf)")


def _state(folder: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """Returns the plain values of a checkpoint, with what ``read`` gives in place of each tensor.

    Raises:
        ValueError: if the file is not JSON, or of another form than ``split_state`` gives.
    """
    file = folder / _STATE
    try:
        state = join_state(read_json(file, max_bytes=_MAX_STATE_BYTES), read)
    except StateFormatError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {file} must hold a mapping, got {shorten(state)}")
    _rename(state, f"checkpoint {folder}")
    for name in ("epoch", "global_step"):
        check_integer(f"checkpoint {file}: {name}", state.get(name, 0), "[0, 1e15]")
    return state


def _rename(state: dict[str, Any], origin: str) -> None:
    """Gives tensors that a checkpoint of version 0.1.0 has under old names, and their optimiser state, the new ones."""
    weights = state.get("state_dict")
    if isinstance(weights, dict):
        state["state_dict"] = rename_tensors({str(name): tensor for name, tensor in weights.items()}, origin)
    optimizers = state.get("optimizer_states")
    for optimizer in optimizers if isinstance(optimizers, list) else ():
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        for group in groups if isinstance(groups, list) else ():
            if isinstance(group, dict) and isinstance(group.get("param_names"), list):
                group["param_names"] = [rename_tensor(str(name)) for name in group["param_names"]]


def _verify(folder: Path, names: Sequence[str], files: Mapping[str, Any]) -> None:
    for name in names:
        file, expected = folder / name, files[name]
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            raise ValueError(
                f"checkpoint {folder}: {name} is not what was written; remove the folder to resume from an older one"
            )

"""The checkpoint folder: Lightning's checkpoint as safetensors and JSON, written atomically, without pickle.

    step-00001000/
      tensors-00000-of-00002.safetensors   rank 0: its rows of sharded tensors, and all other tensors
      tensors-00001-of-00002.safetensors   rank 1: its rows of sharded tensors
      state.json                           plain values, with names in place of tensors
      COMPLETE.json                        the marker, written last: size and sha256 of each file

A single process and DDP write one tensor file; FSDP2 writes one per rank. Any number of ranks reads either.

JSON has no tuples, no numeric keys and no non-finite numbers, so in ``state.json`` a mapping with one key gives the
type of each value: ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"items": [[key, value], ...]}``,
``{"tensor": name}``, ``{"float": "nan"}``.

Protocol of a save, on all ranks together; an error of one rank is raised on all of them:

1. Each rank splits the checkpoint into plain values and tensors, and selects the tensors that it writes.
2. Rank 0 checks the free disk space and makes a temporary folder beside the final one.
3. Each rank with tensors writes one file and computes its sha256.
4. Rank 0 writes ``state.json``, then the marker, and renames the temporary folder.
5. Rank 0 removes the temporary folder if a step has failed.

Protocol of a load: the ranks verify the sizes and hashes together, then each rank reads the rows that it needs. A
folder without a marker is ignored; it is removed when the run resumes.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from typing_extensions import override

from maskgit_pl.checks import check_integer, check_keys, shorten
from maskgit_pl.data.folders import replace_folder
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.files import parse_json, read_json, sha256_of, size_text, write_tensors, write_text
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

SETTINGS = "maskgit_pl.settings"

_STATE, _MARKER = "state.json", "COMPLETE.json"
_FORMAT = "maskgit_pl.checkpoint"
_VERSION = 2
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"state\.json|tensors-\d{5,}-of-\d{5,}\.safetensors")
_MAX_STATE_BYTES = 16_000_000  # state.json of a stage with 1,000 tensors has 600 kB
_MAX_DEPTH = 32  # nesting depth; Lightning's checkpoints have 10
_NOT_FINITE = ("nan", "inf", "-inf")


class FolderCheckpointIO(CheckpointIO):
    """A Lightning checkpoint plugin that writes and reads a folder of tensor files and plain values.

    All ranks must call its methods together. An error of one rank is raised on all of them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the folder ``path`` by the protocol of the module; an existing folder is replaced only at the end.

        Raises:
            TypeError: if the checkpoint holds a value that is neither a tensor nor plain. The message names its key.
            ValueError: if ``load_checkpoint`` would refuse the plain values: they are too large, nested too deep, or
                have a key that is not finite. The message names the part.
            OSError: if the disk is full or not writable. No partial folder is left.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.partial")
        # 1. Split the checkpoint, and select the tensors of this rank.
        tensors: dict[str, Tensor] = {}
        state = _split_state(checkpoint, "", tensors)
        rank, _ = rank_and_world()
        pieces = own_pieces(tensors, rank)
        sizes = on_all_ranks(lambda: sum(rows.nbytes for rows, _ in pieces.values()))
        writers = [each for each, size in enumerate(sizes) if size]
        try:
            # 2. Check the disk space and make the temporary folder.
            on_all_ranks(lambda: _make_temporary_folder(temporary, sum(sizes)) if rank == 0 else None)
            # 3. Write the tensor files.
            written = on_all_ranks(
                lambda: _write_tensors(temporary, pieces, writers.index(rank), len(writers)) if rank in writers else {}
            )
            # 4. Write the plain values and the marker, and rename the folder.
            on_all_ranks(lambda: _finish(temporary, target, state, written) if rank == 0 else None)
        finally:
            # 5. After step 4 the temporary folder no longer exists.
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a complete folder, with whole tensors on the CPU.

        Raises:
            ValueError: if the folder is incomplete or a file has changed.
        """
        return self.load_pieces(path, lambda _, saved: saved.read_all())

    def load_pieces(self, path: str | Path, read: Callable[[str, SavedTensor], Tensor]) -> dict[str, Any]:
        """Reads a complete folder, with the part of each tensor that ``read`` selects.

        Args:
            path: The folder.
            read: Function of a tensor's key, such as ``/state_dict/layer.weight``, and of the saved tensor.

        Raises:
            ValueError: if the folder is incomplete or a file has changed.
        """
        folder = Path(path)
        rank, world_size = rank_and_world()
        files = on_all_ranks(lambda: _read_marker(folder))[rank]  # a rank may see an older state of a shared folder
        # Each rank hashes a part of the files.
        on_all_ranks(lambda: _verify(folder, sorted(files)[rank::world_size], files))
        with TensorPieces(folder, [name for name in sorted(files) if name != _STATE], rank) as pieces:
            return _read_state(folder, lambda key: read(key, SavedTensor(key, pieces)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint. The marker goes first, so that a partly deleted checkpoint is never used."""
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
    """Returns the incomplete checkpoints in a ``checkpoints`` folder, which a kill has left."""
    torn = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return [*folder.glob(".step-*"), *(path for path in torn if not (path / _MARKER).exists())]


def step_of(checkpoint: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings of the run from a complete checkpoint.

    Raises:
        ValueError: if the file has changed or has no settings.
    """
    _verify(folder, [_STATE], _read_marker(folder))
    settings = _read_state(folder, lambda _: None).get(SETTINGS)
    if not isinstance(settings, dict):
        raise ValueError(f"checkpoint {folder}: {SETTINGS} must be a mapping, got {shorten(settings)}")
    return settings


def _split_state(value: Any, key: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Returns a value as plain JSON, and adds its tensors to ``tensors``, named by their keys.

    Args:
        value: Tensors and plain values in mappings, lists and tuples.
        key: Key of ``value`` in the checkpoint, such as ``/state_dict``.
        tensors: Mapping to which the tensors are added.
        depth: Nesting depth of ``value``.

    Raises:
        TypeError: if a value is neither a tensor nor plain. The message names its key.
        ValueError: if ``_join_state`` would refuse it: values that are nested too deep, a key that is not finite, or
            two tensors with one key.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"checkpoint {shorten(key)}: values must be nested at most {_MAX_DEPTH} deep; save flat mappings or tensors"
        )
    if isinstance(value, Tensor):
        if key in tensors:
            raise ValueError(f"checkpoint {key}: keys must be unique as text, got two tensors; rename one of the keys")
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_key(k, key), _split_state(v, f"{key}/{k}", tensors, depth + 1)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_split_state(item, f"{key}/{i}", tensors, depth + 1) for i, item in enumerate(value)]}
    # JSON has no non-finite numbers.
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return _plain(value, key)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint {key or '/'}: tensors and plain values only, got {type(value).__name__}")


def _key(value: Any, key: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"checkpoint {key or '/'}: keys of a mapping must be finite, got {value}; use text as the key")
    return _plain(value, key)


def _make_temporary_folder(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        text = f"a checkpoint needs {size_text(needed)}, {size_text(free)} are free"
        raise OSError(errno.ENOSPC, text, str(folder.parent))
    folder.mkdir()


def _write_tensors(folder: Path, pieces: Mapping[str, tuple[Tensor, int]], number: int, count: int) -> dict[str, Any]:
    """Writes a tensor file, and returns its entry for the marker."""
    file = folder / f"tensors-{number:05d}-of-{count:05d}.safetensors"
    tensors = {key: rows.detach().cpu().contiguous().clone() for key, (rows, _) in pieces.items()}
    # Pieces that begin at row 0 need no entry.
    starts = {key: start for key, (_, start) in pieces.items() if start}
    write_tensors(file, tensors, metadata={FIRST_ROWS: json.dumps(starts)})
    return {file.name: _describe_file(file)}


def _finish(temporary: Path, target: Path, state: Any, written: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(state)
    _check_readable(text, state, target)
    write_text(temporary / _STATE, text)
    files = {name: entry for each in written for name, entry in each.items()}
    files[_STATE] = _describe_file(temporary / _STATE)
    write_text(temporary / _MARKER, json.dumps({"format": _FORMAT, "version": _VERSION, "files": files}))
    replace_folder(temporary, target)


def _check_readable(text: str, state: Any, target: Path) -> None:
    """Checks that the plain values can be read again, before older checkpoints are removed for this one.

    Raises:
        ValueError: if they cannot. The message names the part that is to blame.
    """
    if len(text) > _MAX_STATE_BYTES:
        where, part = max(_parts(state), key=lambda each: len(each[1]))
        raise ValueError(
            f"checkpoint {target}: values that are not tensors must have at most {size_text(_MAX_STATE_BYTES)}, got "
            f"{size_text(len(text))}, of which {where} has {size_text(len(part))}; save long lists as tensors, or in "
            "files of their own"
        )
    try:
        _join(parse_json(text, _STATE), target / _STATE, lambda _: None)
    except ValueError as error:
        blamed = next((f" because of {where}" for where, part in _parts(state) if not _is_json(part)), "")
        raise ValueError(
            f"checkpoint {target} could not be loaded again{blamed}: {error}; save it in another form"
        ) from error


def _parts(state: Any) -> Iterator[tuple[str, str]]:
    """Yields the key and the JSON of each entry of the checkpoint, and of each callback instead of all of them."""
    for key, value in state["items"]:
        callbacks = value.get("items") if key == "callbacks" and isinstance(value, dict) else None
        for name, each in callbacks or ():
            yield f"{key}/{name}", json.dumps({"items": [[key, {"items": [[name, each]]}]]})
        if not callbacks:
            yield str(key), json.dumps({"items": [[key, value]]})


def _is_json(text: str) -> bool:
    try:
        parse_json(text, _STATE)
    except ValueError:
        return False
    return True


def _describe_file(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _read_marker(folder: Path) -> dict[str, Any]:
    """Returns the entry of each file in the marker.

    Raises:
        ValueError: if there is no marker, or it is invalid or of another version.
    """
    where = f"checkpoint {folder}: {_MARKER}"
    if not (folder / _MARKER).is_file():
        raise ValueError(f"checkpoint {folder} is incomplete: it has no {_MARKER}; use an older one or train again")
    try:
        marker = read_json(folder / _MARKER)
    except ValueError as error:
        raise ValueError(
            f"{where} has changed since it was written ({error}); remove the folder to resume from an older one"
        ) from error
    check_keys(where, marker, known=marker, required=("format", "version", "files"))
    if marker["format"] != _FORMAT:
        raise ValueError(f"{where}: format must be {_FORMAT!r}, got {shorten(marker['format'])}")
    if marker["version"] != _VERSION:
        raise ValueError(
            f"{where}: version must be {_VERSION}, got {shorten(marker['version'])}; start a new run with --run"
        )
    files = marker["files"]
    if not isinstance(files, dict) or _STATE not in files:
        raise ValueError(f"{where}: files must be a mapping with {_STATE}, got {shorten(files)}")
    for name, entry in files.items():
        _check_file(name, entry, where)
    return files


def _check_file(name: str, entry: Any, where: str) -> None:
    """Checks an entry of a marker: the name of a file in the folder, its size and its hash."""
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{where}: files must be {_STATE} and tensors*.safetensors, got {shorten(name)}")
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {name} must be a mapping, got {shorten(entry)}")
    check_keys(f"{where}: {name}", entry, known=entry, required=("bytes", "sha256"))
    check_integer(f"{where}: {name}.bytes", entry["bytes"], "[0, inf)")


def _verify(folder: Path, names: Sequence[str], files: Mapping[str, Any]) -> None:
    for name in names:
        file, expected = folder / name, files[name]
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            raise ValueError(
                f"checkpoint {folder}: {name} has changed since it was written; remove the folder to resume from an "
                "older one"
            )


def _read_state(folder: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """Returns the values of a checkpoint, with the result of ``read`` in place of each tensor.

    Raises:
        ValueError: if the file is not JSON, or not in the format of ``_split_state``.
    """
    file = folder / _STATE
    return _join(read_json(file, max_bytes=_MAX_STATE_BYTES), file, read)


def _join(content: dict[str, Any], file: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """Returns the values of a parsed ``state.json`` after the checks of every load."""
    try:
        state = _join_state(content, read)
    except _StateFormatError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {file} must hold a mapping, got {shorten(state)}")
    for name in ("epoch", "global_step"):
        check_integer(f"checkpoint {file}: {name}", state.get(name, 0), "[0, 1e15]")
    return state


class _StateFormatError(ValueError):
    """Values that are not in the format of ``_split_state``."""


def _join_state(node: Any, read: Callable[[str], Any], depth: int = 0) -> Any:
    """Inverts ``_split_state``: ``read`` returns the tensor of a name.

    Raises:
        _StateFormatError: if ``node`` is not in the format of ``_split_state``.
    """
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise _StateFormatError("a list must be inside a mapping that gives its type")
        return node
    # The file may be hostile: limit the recursion, and accept only the five known forms.
    if depth > _MAX_DEPTH:
        raise _StateFormatError(f"values must be nested at most {_MAX_DEPTH} deep")
    kind, content = next(iter(node.items()), ("", None))
    if len(node) != 1 or kind not in ("tensor", "float", "items", "list", "tuple"):
        kinds = "tensor, float, items, list, tuple"
        raise _StateFormatError(f"a mapping must have one of the keys {kinds}, got {shorten(list(node))}")
    if kind in ("tensor", "float"):
        if not isinstance(content, str) or (kind == "float" and content not in _NOT_FINITE):
            raise _StateFormatError(f"a {kind} must be a string, got {shorten(content)}")
        return read(content) if kind == "tensor" else float(content)
    if not isinstance(content, list):
        raise _StateFormatError(f"{kind} must be a list, got {shorten(content)}")
    if kind == "items":
        return _join_items(content, read, depth)
    made: Iterator[Any] = (_join_state(item, read, depth + 1) for item in content)
    return list(made) if kind == "list" else tuple(made)


def _join_items(content: list[Any], read: Callable[[str], Any], depth: int) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], list | dict):
            raise _StateFormatError(f"items must be pairs of a key and a value, got {shorten(pair)}")
        if pair[0] in made:
            raise _StateFormatError(f"keys of a mapping must be unique, got {shorten(pair[0])} twice")
        made[pair[0]] = _join_state(pair[1], read, depth + 1)
    return made

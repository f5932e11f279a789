"""The checkpoint folder: what Lightning wants to save as safetensors and JSON, complete or ignored.

    step-00001000/
      tensors-00000-of-00002.safetensors   each rank's part of the tensors that are sharded; rank 0's has the others too
      tensors-00001-of-00002.safetensors
      state.json                           plain values, with the names of tensors in their places
      COMPLETE.json                        written last: bytes and sha256 of each file

A folder is written under a temporary name beside its place and renamed when all of it is on disk. Nothing in it is
unpickled. One process and DDP write one tensor file, FSDP2 one a rank; any world size reads either. Where a piece lies
in its tensor stands in the header of its file.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor

from maskgit_pl.checks import check_integer, check_keys, shorten
from maskgit_pl.distributed import on_all_ranks, rank_and_world
from maskgit_pl.files import parse_json, read_json, replace_folder, sha256_of, size_text, write_tensors, write_text
from maskgit_pl.networks.weight_file import open_tensors

__all__ = [
    "SETTINGS",
    "FolderCheckpointIO",
    "SavedTensor",
    "complete_checkpoints",
    "leftovers",
    "newest_complete",
    "rows_of",
    "settings_of",
    "step_of",
]

_STATE, _MARKER = "state.json", "COMPLETE.json"
_VERSION = 2  # 1: one file ``tensors.safetensors``
SETTINGS = "maskgit_pl.settings"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_FORMAT = "maskgit_pl.checkpoint"
_FILE_NAME = re.compile(r"state\.json|tensors(-\d{5,}-of-\d{5,})?\.safetensors")
_MAX_STATE_BYTES = 16_000_000  # a stage of 1,000 tensors has 600 kB
_MAX_DEPTH = 32  # of plain values inside one another; Lightning's have 10
_MAX_ROWS = 2**40
_NOT_FINITE = ("nan", "inf", "-inf")
_FIRST_ROWS = "first_rows"  # in the header of a tensor file: name -> the row at which its piece begins


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads what Lightning wants to checkpoint as a folder of tensors and plain values.

    With ranks, all of them call it together, and an error of one is raised on all.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the folder ``path``; what was there under that name is replaced only by a complete one.

        Raises:
            TypeError: The checkpoint holds something that is neither a tensor nor a plain value; its key is named.
            OSError: The disk is full or not writable; nothing is left behind.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.partial")
        tensors: dict[str, Tensor] = {}
        state = _split(checkpoint, "", tensors)
        rank, _ = rank_and_world()
        pieces = _own_pieces(tensors, rank)
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

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a complete folder, whole tensors on the CPU.

        Raises:
            ValueError: The folder is incomplete or a file is not what was written.
        """
        return self.load_pieces(path, lambda _, saved: saved.whole())

    def load_pieces(self, path: str | Path, read: Callable[[str, SavedTensor], Tensor]) -> dict[str, Any]:
        """Reads a complete folder, of each tensor what ``read`` takes of it.

        Args:
            path: The folder.
            read: Given the tensor's place in the checkpoint, such as ``/state_dict/layer.weight``.

        Raises:
            ValueError: The folder is incomplete or a file is not what was written.
        """
        folder = Path(path)
        rank, world_size = rank_and_world()
        files = _files(folder)
        on_all_ranks(lambda: _verify(folder, sorted(files)[rank::world_size], files))  # the ranks share the hashing
        with _Pieces(folder, [name for name in sorted(files) if name != _STATE], rank) as pieces:
            return _state(folder, lambda key: read(key, SavedTensor(key, pieces)))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint; its marker goes first, so that half a checkpoint is never taken for a whole one."""
        (Path(path) / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in a ``checkpoints`` folder, or None."""
    return max(complete_checkpoints(folder), default=None, key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a ``checkpoints`` folder, the oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / _MARKER).is_file()]
    return sorted(found, key=step_of)


def leftovers(folder: Path) -> list[Path]:
    """What lies half written or half removed in a ``checkpoints`` folder."""
    torn = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return [*folder.glob(".step-*"), *(path for path in torn if not (path / _MARKER).exists())]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that a complete checkpoint carries (see ``recipe.fixed_settings``); None if it has none.

    Raises:
        ValueError: The file is not what was written.
    """
    _verify(folder, [_STATE], _files(folder))
    settings = _state(folder, lambda _: None).get(SETTINGS)
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"checkpoint {folder}: {SETTINGS} must be a mapping, got {shorten(settings)}")
    return settings


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint, whole or in pieces, of which any rows can be read.

    Attributes:
        key: Its place in the checkpoint.
        pieces: Of all tensors.
    """

    key: str
    pieces: _Pieces

    @property
    def is_scalar(self) -> bool:
        """True if it has no dimensions.

        Raises:
            ValueError: if the files do not hold it.
        """
        first = next(self.pieces.of(self.key), None)
        if first is None:
            raise ValueError(self._not_whole)
        return not first.shape

    def whole(self) -> Tensor:
        """All of it, on the CPU."""
        if self.is_scalar:
            return next(self.pieces.of(self.key)).read(None)
        found = list(self.pieces.of(self.key))
        end = max(piece.end for piece in found)
        if end > sum(piece.shape[0] for piece in found):  # before memory for all rows is taken
            raise ValueError(self._not_whole)
        return self.rows(0, end)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of its first dimension, on the CPU.

        Raises:
            ValueError: The files do not hold all of them.
        """
        made: Tensor | None = None
        missing = stop - start
        for piece in self.pieces.of(self.key):
            first, last = max(start, piece.start), min(stop, piece.end)
            if first > last or (first == last and missing):
                continue
            rows = piece.read(slice(first - piece.start, last - piece.start))
            if last - first == stop - start:
                return rows
            made = rows.new_empty(stop - start, *piece.shape[1:]) if made is None else made
            made[first - start : last - start] = rows
            missing -= last - first
        if made is None or missing:
            raise ValueError(self._not_whole)
        return made

    @property
    def _not_whole(self) -> str:
        return f"checkpoint {self.pieces.folder}: {shorten(self.key)} is not whole; go on from an older one"


class _Piece(NamedTuple):
    """Rows of a tensor in an open file."""

    file: Any  # of safetensors
    key: str
    start: int
    shape: list[int]

    @property
    def end(self) -> int:
        return self.start + self.shape[0]

    def read(self, rows: slice | None) -> Tensor:
        made: Tensor = self.file.get_tensor(self.key) if rows is None else self.file.get_slice(self.key)[rows]
        return made


class _Pieces:
    """The tensor files of a checkpoint, opened when they are asked for, this rank's own first."""

    def __init__(self, folder: Path, names: Sequence[str], rank: int) -> None:
        self.folder = folder
        self._names = [*names[rank : rank + 1], *names[:rank], *names[rank + 1 :]]
        self._open: dict[str, tuple[Any, set[str], dict[str, int]]] = {}
        self._files = ExitStack()

    def __enter__(self) -> _Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def of(self, key: str) -> Iterator[_Piece]:
        for name in self._names:
            if name not in self._open:
                file = self._files.enter_context(open_tensors(self.folder / name))
                self._open[name] = file, set(file.keys()), _first_rows(file.metadata(), self.folder / name)
            file, keys, starts = self._open[name]
            if key in keys:
                yield _Piece(file, key, starts.get(key, 0), file.get_slice(key).get_shape())


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """First row and end of this rank's rows of a tensor that is sharded along its first dimension."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert chunk.sizes[1:] == tensor.shape[1:]
    return chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]


def _own_pieces(tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, int]]:
    """What this rank writes, with the row where it begins: its rows of sharded tensors; rank 0 the others too."""
    pieces: dict[str, tuple[Tensor, int]] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            pieces[key] = tensor.to_local(), rows_of(tensor)[0]
        elif rank == 0:
            pieces[key] = tensor, 0
    return pieces


def _make_room(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        text = f"a checkpoint needs {size_text(needed)}, {size_text(free)} are free"
        raise OSError(errno.ENOSPC, text, str(folder.parent))
    folder.mkdir()


def _write_tensors(folder: Path, pieces: Mapping[str, tuple[Tensor, int]], number: int, count: int) -> dict[str, Any]:
    """Writes a tensor file; what the marker says of it."""
    file = folder / f"tensors-{number:05d}-of-{count:05d}.safetensors"
    tensors = {key: rows.detach().cpu().contiguous().clone() for key, (rows, _) in pieces.items()}
    starts = {key: start for key, (_, start) in pieces.items() if start}
    write_tensors(file, tensors, metadata={_FIRST_ROWS: json.dumps(starts)})
    return {file.name: _described(file)}


def _complete(temporary: Path, target: Path, state: Any, written: Sequence[Mapping[str, Any]]) -> None:
    write_text(temporary / _STATE, json.dumps(state))
    files = {name: said for each in written for name, said in each.items()}
    files[_STATE] = _described(temporary / _STATE)
    write_text(temporary / _MARKER, json.dumps({"format": _FORMAT, "version": _VERSION, "files": files}))
    replace_folder(temporary, target)


def _described(file: Path) -> dict[str, Any]:
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
            f"{where} is not what was written ({error}); take the folder away to go on from an older one"
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
        ValueError: if the file is not JSON, or of another form than ``_split`` gives.
    """
    file = folder / _STATE
    try:
        state = _join(read_json(file, max_bytes=_MAX_STATE_BYTES), read)
    except _FormError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {file} must hold a mapping, got {shorten(state)}")
    for name in ("epoch", "global_step"):
        check_integer(f"checkpoint {file}: {name}", state.get(name, 0), "[0, 1e15]")
    return state


def _first_rows(metadata: Mapping[str, str] | None, file: Path) -> dict[str, int]:
    """Returns the row at which each tensor's piece begins, as the header of a tensor file says it."""
    where = f"checkpoint {file}: {_FIRST_ROWS}"
    starts = parse_json((metadata or {}).get(_FIRST_ROWS, "{}"), where)
    return {
        name: check_integer(f"{where} of {shorten(name)}", row, f"[0, {_MAX_ROWS}]") for name, row in starts.items()
    }


def _verify(folder: Path, names: Sequence[str], files: Mapping[str, Any]) -> None:
    for name in names:
        file, expected = folder / name, files[name]
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"] or sha256_of(file) != expected["sha256"]:
            raise ValueError(
                f"checkpoint {folder}: {name} is not what was written; remove the folder to go on from an older one"
            )


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON in which tensors are names; ``tensors`` takes them. Undone by ``_join``."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_plain(k, key), _split(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_split(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no word for it
        return {"float": str(value)}
    return _plain(value, key)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint {key or '/'}: tensors and plain values only, got {type(value).__name__}")


class _FormError(ValueError):
    """Values that ``_split`` does not give."""


def _join(node: Any, read: Callable[[str], Any], depth: int = 0) -> Any:
    """Undoes ``_split``."""
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise _FormError("a list must stand in a mapping that says what it is")
        return node
    if depth > _MAX_DEPTH:
        raise _FormError(f"values must be nested at most {_MAX_DEPTH} deep")
    kind, content = next(iter(node.items()), ("", None))
    if len(node) != 1 or kind not in ("tensor", "float", "items", "list", "tuple"):
        kinds = "tensor, float, items, list, tuple"
        raise _FormError(f"a mapping must have one of the keys {kinds}, got {shorten(list(node))}")
    if kind in ("tensor", "float"):
        if not isinstance(content, str) or (kind == "float" and content not in _NOT_FINITE):
            raise _FormError(f"a {kind} must be a string, got {shorten(content)}")
        return read(content) if kind == "tensor" else float(content)
    if not isinstance(content, list):
        raise _FormError(f"{kind} must be a list, got {shorten(content)}")
    if kind == "items":
        return _joined_items(content, read, depth)
    made: Iterator[Any] = (_join(item, read, depth + 1) for item in content)
    return list(made) if kind == "list" else tuple(made)


def _joined_items(content: list[Any], read: Callable[[str], Any], depth: int) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], list | dict):
            raise _FormError(f"items must be pairs of a key and a value, got {shorten(pair)}")
        if pair[0] in made:
            raise _FormError(f"a key must stand once in a mapping, got {shorten(pair[0])} again")
        made[pair[0]] = _join(pair[1], read, depth + 1)
    return made

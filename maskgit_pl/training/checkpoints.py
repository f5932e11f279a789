"""The checkpoints of a run: their folder, and the callback that saves, removes and handles failed writes of them.

A folder holds Lightning's checkpoint as safetensors and JSON, written atomically, without pickle:

    step-00001000/
      tensors-00000-of-00002.safetensors   rank 0: its rows of sharded tensors, and all other tensors
      tensors-00001-of-00002.safetensors   rank 1: its rows of sharded tensors
      state.json                           plain values, with names in place of tensors
      COMPLETE.json                        the marker, written last: size and sha256 of each file

A single process and DDP write one tensor file; FSDP2 writes one per rank. The header of a tensor file has the
first row of each piece, so that any number of ranks reads a checkpoint of any other number.

JSON has no tuples and no numeric keys, so in ``state.json`` a mapping with one key stands for what is neither
a number, a text nor a list: ``{"tuple": [...]}``, ``{"items": [[key, value], ...]}``, ``{"tensor": name}``.

Protocol of a save, on all ranks together; an error of one rank is raised on all of them:

1. Each rank splits the checkpoint into plain values and tensors, and copies the tensors that it writes to the CPU.
   The other steps need only this copy: ``Checkpoints`` runs them in a thread, while the training continues.
2. Rank 0 checks the free disk space and makes a temporary folder beside the final one.
3. Each rank with tensors writes one file and computes its sha256.
4. Rank 0 writes ``state.json``, then the marker, and renames the temporary folder.
5. Rank 0 removes the temporary folder if a step has failed.

Protocol of a load: the ranks verify the sizes and hashes together, then each rank reads the rows that it
needs. A folder without a marker is ignored; it is removed when the run resumes.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from maskgit_pl.distributed import new_group, on_all_ranks, rank_and_world
from maskgit_pl.errors import CannotWriteError
from maskgit_pl.files import sha256_of, write_tensors, write_text
from maskgit_pl.folders import replace_folder
from maskgit_pl.networks.weights import load_weights, open_tensors
from maskgit_pl.text import size_text

log = logging.getLogger(__name__)

Write: TypeAlias = "Callable[[ProcessGroup | None], None]"
"""Writes a copied checkpoint, with the collectives of a process group; None is the default group."""

SETTINGS = "maskgit_pl.settings"

_STATE, _MARKER = "state.json", "COMPLETE.json"
_VERSION = 3
_FIRST_ROWS = "first_rows"  # key in the header of a tensor file: tensor name -> first row of the piece, if not 0
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class FolderCheckpointIO(CheckpointIO):
    """A Lightning plugin that writes and reads checkpoint folders. All ranks must call it together."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the folder ``path`` by the protocol of the module; an existing folder is replaced only at the end.

        Args:
            checkpoint: Tensors and plain values.
            path: The folder.
            storage_options: Function that is called with the write of the copied checkpoint (``Write``), which it may
                start in a thread; None writes at once.
        """
        # 1. Split the checkpoint, and copy the tensors of this rank.
        tensors: dict[str, Tensor] = {}
        state = _split_state(checkpoint, "", tensors)
        pieces = _copy_own_pieces(tensors)
        write = partial(_write_folder, Path(path), state, pieces)
        if storage_options is None:
            write(None)
        else:
            storage_options(write)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a complete folder, with whole tensors on the CPU."""
        return self.load_pieces(path, lambda _, saved: saved.read_all())

    def load_pieces(self, path: str | Path, read: Callable[[str, SavedTensor], Tensor]) -> dict[str, Any]:
        """Reads a complete folder, with the part of each tensor that ``read`` selects.

        Args:
            path: The folder.
            read: Function of a tensor's key, such as ``/state_dict/layer.weight``, and of the saved tensor.
        """
        folder = Path(path)
        rank, world_size = rank_and_world()
        files = on_all_ranks(lambda: _read_marker(folder))[rank]  # a rank may see an older state of a shared folder
        # Each rank hashes a part of the files.
        on_all_ranks(lambda: _verify(folder, sorted(files)[rank::world_size], files))
        pieces: dict[str, list[tuple[int, Any]]] = {}
        with ExitStack() as opened:
            for name in files.keys() - {_STATE}:
                file = opened.enter_context(open_tensors(folder / name))
                first_rows = json.loads(file.metadata()[_FIRST_ROWS])
                for key in file.keys():  # noqa: SIM118  # an open file is no mapping
                    pieces.setdefault(key, []).append((first_rows.get(key, 0), file))
            return _read_state(folder, lambda key: read(key, SavedTensor(key, sorted(pieces[key], key=itemgetter(0)))))

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
    complete = [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / _MARKER).is_file()]
    return sorted(complete, key=step_of)


def find_leftovers(folder: Path) -> list[Path]:
    """Returns the incomplete checkpoints in a ``checkpoints`` folder, which a kill has left."""
    torn = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return [*folder.glob(".step-*"), *(path for path in torn if not (path / _MARKER).exists())]


def step_of(checkpoint: Path) -> int:
    """Returns the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings of the run from a complete checkpoint; none if it was saved without settings."""
    _verify(folder, [_STATE], _read_marker(folder))
    settings: dict[str, Any] = _read_state(folder, lambda _: None).get(SETTINGS, {})
    return settings


def load_module(module: torch.nn.Module, checkpoint: Path, *, strict: bool = True) -> None:
    """Loads the weights of a complete checkpoint, which any number of ranks wrote; optimizer states are not read.

    Args:
        module: The module, with the sizes of the checkpoint.
        checkpoint: Folder of the checkpoint.
        strict: False ignores missing and additional weights.
    """

    def only_weights(key: str, saved: SavedTensor) -> Tensor:
        return saved.read_all() if key.startswith("/state_dict/") else torch.empty(0)

    weights = FolderCheckpointIO().load_pieces(checkpoint, only_weights)["state_dict"]
    if strict:
        load_weights(module, weights, checkpoint)
    else:
        module.load_state_dict(weights, strict=False)


def _split_state(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Returns a value as plain JSON; adds its tensors to ``tensors`` by keys such as ``/state_dict/weight``."""
    if isinstance(value, Tensor):
        assert key not in tensors, f"checkpoint {key}: two tensors with this key"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_plain(k, key), _split_state(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_split_state(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    return _plain(value, key)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint {key or '/'}: tensors and plain values only, got {type(value).__name__}")


def _join_state(node: Any, read: Callable[[str], Any]) -> Any:
    """Inverts ``_split_state``: ``read`` returns the tensor of a name."""
    if isinstance(node, list):
        return [_join_state(item, read) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return read(content)
    if kind == "tuple":
        return tuple(_join_state(item, read) for item in content)
    return {key: _join_state(value, read) for key, value in content}


def _write_folder(
    target: Path, state: Any, pieces: Mapping[str, tuple[Tensor, int]], group: ProcessGroup | None
) -> None:
    """Runs the protocol from step 2 on, with the collectives of a process group; None is the default group."""
    temporary = target.with_name(f".{target.name}.partial")
    rank, _ = rank_and_world()
    sizes = on_all_ranks(lambda: sum(rows.nbytes for rows, _ in pieces.values()), group)
    writers = [writer for writer, size in enumerate(sizes) if size]
    try:
        # 2. Check the disk space and make the temporary folder.
        on_all_ranks(lambda: _make_temporary_folder(temporary, sum(sizes)) if rank == 0 else None, group)
        # 3. Write the tensor files.
        written = on_all_ranks(
            lambda: _write_tensors(temporary, pieces, writers.index(rank), len(writers)) if rank in writers else {},
            group,
        )
        # 4. Write the plain values and the marker, and rename the folder.
        on_all_ranks(lambda: _finish(temporary, target, state, written) if rank == 0 else None, group)
    finally:
        # 5. After step 4 the temporary folder no longer exists.
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _make_temporary_folder(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        text = f"a checkpoint needs {size_text(needed)}, {size_text(free)} are free"
        raise OSError(errno.ENOSPC, text, str(folder.parent))
    folder.mkdir()


def _copy_own_pieces(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Copies the tensors that this rank writes, each with its first row: its shards, and on rank 0 all others."""
    rank, _ = rank_and_world()
    pieces: dict[str, tuple[Tensor, int]] = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            pieces[key] = _copy(tensor.to_local()), local_rows(tensor)[0]
        elif rank == 0:
            pieces[key] = _copy(tensor), 0
    return pieces


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def local_rows(tensor: DTensor) -> tuple[int, int]:
    """Returns the range [start, stop) of this rank's rows of a tensor that is sharded along its first dimension."""
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert chunk.sizes[1:] == tensor.shape[1:]
    return chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]


def _write_tensors(folder: Path, pieces: Mapping[str, tuple[Tensor, int]], number: int, count: int) -> dict[str, Any]:
    """Writes a tensor file, and returns its entry for the marker."""
    file = folder / f"tensors-{number:05d}-of-{count:05d}.safetensors"
    tensors = {key: rows for key, (rows, _) in pieces.items()}
    starts = {key: start for key, (_, start) in pieces.items() if start}
    write_tensors(file, tensors, metadata={_FIRST_ROWS: json.dumps(starts)})
    return {file.name: _describe_file(file)}


def _finish(temporary: Path, target: Path, state: Any, written: Sequence[Mapping[str, Any]]) -> None:
    write_text(temporary / _STATE, json.dumps(state))
    files = {name: entry for entries in written for name, entry in entries.items()}
    files[_STATE] = _describe_file(temporary / _STATE)
    write_text(temporary / _MARKER, json.dumps({"version": _VERSION, "files": files}))
    replace_folder(temporary, target)


def _describe_file(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _read_marker(folder: Path) -> dict[str, Any]:
    """Returns size and sha256 of each file."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        version, files = marker["version"], dict(marker["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise _changed(folder, _MARKER) from error
    if version != _VERSION:
        raise ValueError(f"checkpoint {folder}: version must be {_VERSION}, got {version}; start a new run with --run")
    return files


def _verify(folder: Path, names: Sequence[str], files: Mapping[str, Any]) -> None:
    for name in names:
        if not (folder / name).is_file() or files.get(name) != _describe_file(folder / name):
            raise _changed(folder, name)


def _changed(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"checkpoint {folder}: {name} is missing or has changed since it was written; remove the folder to resume "
        "from an older one"
    )


def _read_state(folder: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    """Returns the values of a checkpoint, with the result of ``read`` in place of each tensor."""
    return cast("dict[str, Any]", _join_state(json.loads((folder / _STATE).read_bytes()), read))


class SavedTensor(NamedTuple):
    """A tensor of a checkpoint, whole or in pieces. Any of its rows can be read.

    Attributes:
        key: Key in the checkpoint, such as ``/state_dict/layer.weight``.
        pieces: First row of each piece, and the open safetensors file that holds it; in the order of their rows.
    """

    key: str
    pieces: Sequence[tuple[int, Any]]

    @property
    def is_scalar(self) -> bool:
        """A bool: the tensor has no dimensions."""
        _, file = self.pieces[0]
        return not file.get_slice(self.key).get_shape()

    def read_all(self) -> Tensor:
        """Reads the whole tensor to the CPU."""
        if self.is_scalar:
            _, file = self.pieces[0]
            scalar: Tensor = file.get_tensor(self.key)
            return scalar
        return self.read_rows(0, sum(file.get_slice(self.key).get_shape()[0] for _, file in self.pieces))

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Reads rows [start, stop) of the first dimension to the CPU."""
        parts: list[Tensor] = []
        for first, file in self.pieces:
            rows = file.get_slice(self.key)
            begin, end = max(start, first), min(stop, first + rows.get_shape()[0])
            if begin <= end:  # also no rows, which a rank may have
                parts.append(rows[begin - first : end - first])
        return torch.cat(parts) if len(parts) > 1 else parts[0]  # torch copies a single part, too


_MOST_FAILURES = 3


class Checkpoints(Checkpoint):
    """A callback that saves every ``every_n_steps`` steps and at the end of training, and keeps the newest checkpoints.

    A thread writes the copy of a step, while training continues. At most one write is in flight: the next save waits
    for it, and so does every end of the training.

    If a checkpoint cannot be written, older ones are kept and training continues; the third failure in a row ends it at
    the next save.

    Args:
        folder: The ``checkpoints`` folder of the run.
        every_n_steps: Steps (global batches) between checkpoints, >= 1.
        keep_last: Number of newest checkpoints to keep, >= 1.
        keep_every: Checkpoints of multiples of this step, >= 1, are never removed; None keeps only the newest.
        settings: Settings of the run as plain values, saved with each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_steps: int,
        keep_last: int = 2,
        keep_every: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if keep_every is not None and keep_every % every_n_steps:
            raise ValueError(
                f"keep_every must be a multiple of checkpoint_every ({every_n_steps}), got {keep_every}; other steps "
                "have no checkpoint to keep"
            )
        super().__init__()
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.settings = settings
        self.resumes_from: Path | None = None
        self._tried_step = -1  # last step with an attempt to save
        self._failures = 0  # failed attempts in a row
        self._failure = ""  # text of the last one
        self._error: Exception | None = None  # an error of a write that is no fault of the disk
        self._thread: threading.Thread | None = None
        self._group: ProcessGroup | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the process group of the thread, and checks that all ranks resume from the same checkpoint.

        On a shared file system, one machine may see an older state of the folder.
        """
        self._group = new_group()
        names = on_all_ranks(lambda: self.resumes_from and self.resumes_from.name)
        if len(set(names)) > 1:
            listed = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(names))
            raise ValueError(
                f"{self.folder} must have the same newest checkpoint on all ranks, got {listed}; check that it is the "
                "same folder on every machine, and repeat the command"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives restored optimizer states the strides of their parameters, and removes incomplete checkpoints."""
        for optimizer in trainer.optimizers:
            _match_strides(optimizer)
        self._tried_step = trainer.global_step
        if trainer.is_global_zero and self.folder.is_dir():
            for leftover in find_leftovers(self.folder):
                shutil.rmtree(leftover, ignore_errors=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Converts the micro-batch counts of the checkpoint to the gradient accumulation of this run.

        Lightning ends a step when the number of micro-batches of the epoch is a multiple of the accumulation.
        With the counts of another accumulation, steps would end within a global batch.
        """
        accumulation = getattr(pl_module, "accumulation", trainer.accumulate_grad_batches)  # stage 1 has its own
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        total, current = progress["total"], progress["current"]  # of the whole run, and of the current epoch
        # Micro-batches per step when the checkpoint was written; 0 before the first step.
        before = total["ready"] // max(1, checkpoint["global_step"])
        for counts in (total, current) if before else ():
            added = counts["ready"] // before * accumulation - counts["ready"]
            # All counts (ready, started, completed ...) move by the same number of micro-batches.
            counts |= {name: count + added for name, count in counts.items()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Waits for the write in flight, after the watchdog has noted the save, and before the next copy is made."""
        self._wait()
        if self.settings is not None:
            checkpoint[SETTINGS] = self.settings

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, last=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._join()  # its error would hide the exception

    def save(self, trainer: Trainer, *, last: bool = False) -> None:
        """Saves the current step unless it was tried before; must be called on every rank.

        Args:
            trainer: The Trainer, in the middle of a fit.
            last: True at the end of a run: waits for the write. A failed step is tried again, and another failure ends
                the run.
        """
        if last:
            self._wait()
        step = trainer.global_step
        # Also called after micro-batches that end no step.
        if step <= self._tried_step and not (last and self._failures):
            return
        self._tried_step = step
        trainer.save_checkpoint(
            self.folder / f"step-{step:08d}", storage_options=partial(self._start, step, is_last=last)
        )
        if last:
            self._wait()
            if self._failures:
                raise self._cannot_write("it was the last one")

    def _start(self, step: int, write: Write, *, is_last: bool) -> None:
        # A daemon: a process that ends without on_exception does not wait for other ranks.
        self._thread = threading.Thread(
            target=self._write, args=(step, write), kwargs={"is_last": is_last}, name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(self, step: int, write: Write, *, is_last: bool) -> None:
        """Writes a checkpoint and removes older ones; runs in the thread."""
        rank, _ = rank_and_world()
        try:
            write(self._group)
            self._failures = 0
            if rank == 0:
                self._prune()
        except OSError as error:
            # on_all_ranks raises the same error everywhere, so all ranks count alike.
            self._failures += 1
            self._failure = f"checkpoint of step {step} cannot be written: {error}; older ones are kept"
            if rank == 0 and not is_last and self._failures < _MOST_FAILURES:
                following = (step // self.every_n_steps + 1) * self.every_n_steps
                log.warning(
                    "%s; training continues, next attempt at step %d (failure %d of %d)",
                    self._failure, following, self._failures, _MOST_FAILURES,
                )  # fmt: skip
        except Exception as error:  # raised in the main thread
            self._error = error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _wait(self) -> None:
        """Waits for the write in flight, and raises the error that ends the run, if there is one."""
        self._join()
        if self._error is not None:
            raise self._error
        if self._failures >= _MOST_FAILURES:
            raise self._cannot_write(f"{self._failures} failures in a row")

    def _cannot_write(self, why: str) -> CannotWriteError:
        return CannotWriteError(f"{self._failure}; {why}: free space in {self.folder} and repeat the command to resume")

    def _prune(self) -> None:
        # Only rank 0 prunes, after all ranks have written the new checkpoint.
        try:
            for old in complete_checkpoints(self.folder)[: -self.keep_last]:
                if self.keep_every is None or step_of(old) % self.keep_every:
                    FolderCheckpointIO().remove_checkpoint(old)
        except OSError as error:
            log.warning("old checkpoints of %s cannot be removed: %s", self.folder, error)


@torch.no_grad()
def _match_strides(optimizer: Optimizer) -> None:
    """Gives moments the strides of their parameters, since a fused AdamW step pairs values by memory offset."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def full_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a module on the CPU; of a sharded module, all of it on rank 0, empty on other ranks."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}

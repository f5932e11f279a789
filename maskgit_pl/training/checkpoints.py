"""Checkpoints that a crash cannot spoil: folders of safetensors and JSON, complete or ignored.

``runs/RUN/STAGE/checkpoints/step-00001000/`` holds ``tensors.safetensors``, ``state.json`` and, last, ``COMPLETE.json``
with sizes and hashes. A folder is written under a temporary name beside its place and renamed when all of it is on
disk. Nothing in it is unpickled. One layout serves one process, DDP and FSDP2.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

__all__ = ["Checkpoints", "FolderCheckpointIO", "full_state", "newest_complete", "settings_of"]

_TENSORS, _STATE, _MARKER = "tensors.safetensors", "state.json", "COMPLETE.json"
_SETTINGS = "maskgit_pl.settings"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads what Lightning wants to checkpoint as a folder of tensors and plain values."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the folder ``path``; what was there under that name is replaced only by a complete one.

        Raises:
            TypeError: The checkpoint holds something that is neither a tensor nor a plain value; its key is named.
            OSError: The disk is full or not writable; nothing is left behind.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            _write(temporary, checkpoint)
            if target.exists():
                self.remove_checkpoint(target)
            temporary.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a complete folder, tensors on the CPU.

        Raises:
            ValueError: The folder is incomplete or a file is not what was written.
        """
        folder = Path(path)
        _verify(folder)
        tensors = load_file(folder / _TENSORS)
        state: dict[str, Any] = _join(json.loads((folder / _STATE).read_text()), tensors)
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint; its marker goes first, so that half a checkpoint is never taken for a whole one."""
        (Path(path) / _MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in a ``checkpoints`` folder, or None."""
    return max(_complete(folder), default=None, key=lambda path: int(path.name.removeprefix("step-")))


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / _MARKER).is_file()]


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that a complete checkpoint carries (see ``recipe.fixed_settings``); None if it has none.

    Raises:
        ValueError: The file is not what was written.
    """
    _verify(folder, only=_STATE)
    settings = dict(json.loads((folder / _STATE).read_text())["items"]).get(_SETTINGS)
    made: dict[str, Any] | None = None if settings is None else _join(settings, {})
    return made


class Checkpoints(Checkpoint):
    """Saves every ``every_n_steps`` global batches and at the end of training, and keeps the newest few.

    Args:
        folder: The ``checkpoints`` folder of the run.
        every_n_steps: At least 1.
        keep_last: How many complete checkpoints stay, at least 1.
        settings: What a checkpoint says of the run that it belongs to: plain values.
    """

    def __init__(
        self, folder: Path, *, every_n_steps: int, keep_last: int = 2, settings: Mapping[str, Any] | None = None
    ) -> None:
        if every_n_steps < 1 or keep_last < 1:
            raise ValueError(
                f"checkpoints: every_n_steps and keep_last are at least 1, got {every_n_steps}, {keep_last}"
            )
        super().__init__()
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.settings = settings
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays restored optimiser states out as their parameters, and sweeps what a killed run left half written."""
        for optimizer in trainer.optimizers:
            _lay_out(optimizer)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".step-*.partial-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Counts the micro-batches that are done as those of this run, which may cut a step into more or fewer.

        Lightning ends a step when the micro-batches of the epoch are a multiple of the accumulation: with the counts of
        another accumulation, steps would end within a global batch.
        """
        accumulation = getattr(pl_module, "accumulation", trainer.accumulate_grad_batches)  # stage 1 has its own
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        total, current = progress["total"], progress["current"]
        before = total["ready"] // max(1, checkpoint["global_step"])
        for counts in (total, current) if before else ():
            added = counts["ready"] // before * accumulation - counts["ready"]
            counts |= {name: count + added for name, count in counts.items()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.settings is not None:
            checkpoint[_SETTINGS] = self.settings

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step <= self._saved_step:
            return
        trainer.save_checkpoint(self.folder / f"step-{step:08d}")
        self._saved_step = step
        if trainer.is_global_zero:
            self._prune()

    def _prune(self) -> None:
        for old in sorted(_complete(self.folder))[: -self.keep_last]:
            FolderCheckpointIO().remove_checkpoint(old)


@torch.no_grad()
def _lay_out(optimizer: Optimizer) -> None:
    """A fused step pairs parameters and moments by their place in memory, whatever their strides are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _write(folder: Path, checkpoint: Mapping[str, Any]) -> None:
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    state = _split(checkpoint, "", tensors)
    save_file(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps(state))
    files = [folder / _TENSORS, folder / _STATE]
    written = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    for name in written:
        _sync(folder / name)
    (folder / _MARKER).write_text(json.dumps({"format": "maskgit_pl.checkpoint", "version": 1, "files": written}))
    _sync(folder / _MARKER)
    _sync(folder)


def _verify(folder: Path, *, only: str | None = None) -> None:
    if not (folder / _MARKER).is_file():
        raise ValueError(f"checkpoint {folder}: incomplete, it has no {_MARKER}; give an older one or train again")
    for name, expected in json.loads((folder / _MARKER).read_text())["files"].items():
        if only not in (None, name):
            continue
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise ValueError(
                f"checkpoint {folder}: {name} is not what was written; remove the folder to go on from an older one"
            )


def _split(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON in which tensors are names; ``tensors`` takes them. Undone by ``_join``."""
    if isinstance(value, Tensor):
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"items": [[_plain(k, key), _split(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_split(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    return _plain(value, key)


def _plain(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint {key or '/'}: tensors and plain values only, got {type(value).__name__}")


def _join(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _join(item, tensors) for key, item in content}
    made: Iterator[Any] = (_join(item, tensors) for item in content)
    return list(made) if kind == "list" else tuple(made)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a module on the CPU, assembled where it is sharded (empty on other ranks then)."""
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}

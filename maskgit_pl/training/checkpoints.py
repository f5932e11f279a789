"""The callback that saves the checkpoints of a run, removes old ones, and handles failed writes.

``CheckpointedModule`` is the base of the modules of both stages, which are built from a checkpoint again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from maskgit_pl.checks import build_dataclass
from maskgit_pl.distributed import on_all_ranks
from maskgit_pl.errors import CannotWriteError
from maskgit_pl.training.checkpoint_files import (
    SETTINGS,
    FolderCheckpointIO,
    complete_checkpoints,
    find_leftovers,
    step_of,
)

__all__ = ["CheckpointedModule", "Checkpoints", "full_state"]

log = logging.getLogger(__name__)

_CONFIG = "maskgit_pl.config"  # key of the module's configuration in a checkpoint
_MOST_FAILURES = 3


class Checkpoints(Checkpoint):
    """A callback that saves every ``every_n_steps`` steps and at the end of training, and keeps the newest checkpoints.

    If a checkpoint cannot be written, older ones are kept and training continues; the third failure in a row ends it.

    Args:
        folder: The ``checkpoints`` folder of the run.
        every_n_steps: Steps (global batches) between checkpoints, >= 1.
        keep_last: Number of newest checkpoints to keep, >= 1.
        keep_every: Checkpoints of multiples of this step, >= 1, are never removed; None keeps only the newest.
        settings: Settings of the run as plain values, saved with each checkpoint.

    Raises:
        ValueError: if ``keep_every`` is not a multiple of ``every_n_steps``.
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that all ranks resume from the same checkpoint.

        On a shared file system, one machine may see an older state of the folder.

        Raises:
            ValueError: if ranks would resume from different checkpoints. Raised on all ranks.
        """
        seen = on_all_ranks(lambda: self.resumes_from and self.resumes_from.name)
        if len(set(seen)) > 1:
            listed = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(seen))
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

        Lightning ends a step when the number of micro-batches of the epoch is a multiple of the accumulation. With the
        counts of another accumulation, steps would end within a global batch.
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
        if self.settings is not None:
            checkpoint[SETTINGS] = self.settings

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, last=True)

    def save(self, trainer: Trainer, *, last: bool = False) -> None:
        """Saves the current step unless it was tried before; must be called on every rank.

        Args:
            trainer: The Trainer, in the middle of a fit.
            last: True at the end of a run: a failed step is tried again, and another failure ends the run.

        Raises:
            CannotWriteError: if the checkpoint cannot be written, and it is the last one or the third failure in a row.
                Raised on all ranks.
        """
        step = trainer.global_step
        # Also called after micro-batches that end no step.
        if step <= self._tried_step and not (last and self._failures):
            return
        self._tried_step = step
        try:
            trainer.save_checkpoint(self.folder / f"step-{step:08d}")
        except OSError as error:
            # on_all_ranks raises the same error everywhere, so all ranks count alike.
            self._failures += 1
            self._report_failure(trainer, error, last=last)
            return
        self._failures = 0
        if trainer.is_global_zero:
            self._prune()

    def _report_failure(self, trainer: Trainer, error: OSError, *, last: bool) -> None:
        step, kept = trainer.global_step, self._complete()
        text = f"checkpoint of step {step} cannot be written: {error}; " + (
            f"{kept[-1].name} is kept" if kept else "there is no older one"
        )
        if last or self._failures >= _MOST_FAILURES:
            why = "it was the last one" if last else f"{self._failures} failures in a row"
            raise CannotWriteError(f"{text}; {why}: free space in {self.folder} and repeat the command to resume")
        if trainer.is_global_zero:
            following = (step // self.every_n_steps + 1) * self.every_n_steps
            log.warning(
                "%s; training continues, next attempt at step %d (failure %d of %d)",
                text, following, self._failures, _MOST_FAILURES,
            )  # fmt: skip

    def _complete(self) -> list[Path]:
        """Returns the complete checkpoints; an empty list if the folder cannot be read."""
        try:
            return complete_checkpoints(self.folder)
        except OSError as error:
            log.warning("%s cannot be listed: %s", self.folder, error)
            return []

    def _prune(self) -> None:
        # Only rank 0 prunes, after all ranks have written the new checkpoint.
        for old in self._complete()[: -self.keep_last]:
            if self.keep_every is not None and step_of(old) % self.keep_every == 0:
                continue
            try:
                FolderCheckpointIO().remove_checkpoint(old)
            except OSError as error:
                log.warning("checkpoint %s cannot be removed: %s", old, error)


class CheckpointedModule(LightningModule):
    """A LightningModule whose checkpoints hold its configuration, so that ``load_from_checkpoint`` builds it again.

    Attributes:
        config: Configuration, a dataclass of plain values: the only argument that the class needs.
        config_class: Its class.
    """

    config: Any
    config_class: ClassVar[type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration."""
        checkpoint[_CONFIG] = asdict(self.config)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Path | str) -> Self:  # type: ignore[override]  # a folder of our own
        """Builds the module of a checkpoint, on the CPU, with the weights and averages of its step.

        Args:
            checkpoint_path: Folder such as ``runs/RUN/transformer/checkpoints/step-00001000``.

        Raises:
            ValueError: if the folder is incomplete, a file has changed, or it belongs to a module of another class.
        """
        if Path(checkpoint_path).is_file():
            raise ValueError(
                f"checkpoint {checkpoint_path} must be a folder of the callback Checkpoints, got a file; build the "
                "module, and resume with Trainer.fit(ckpt_path=...)"
            )
        checkpoint = FolderCheckpointIO().load_checkpoint(checkpoint_path)
        if _CONFIG not in checkpoint:
            raise ValueError(
                f"checkpoint {checkpoint_path} must hold a configuration, which on_save_checkpoint of "
                "CheckpointedModule adds; build the module, and resume with Trainer.fit(ckpt_path=...)"
            )
        config: Any = build_dataclass(cls.config_class, checkpoint[_CONFIG], f"checkpoint {checkpoint_path}")
        module = cls(config)
        module.load_state_dict(checkpoint["state_dict"])
        return module


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

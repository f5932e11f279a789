"""Injects faults into a run: signals, non-finite losses, a full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Where = Literal["start", "step", "validation", "saving"]


@dataclass(frozen=True)
class Fault:
    """A fault, with its time and its rank.

    Args:
        what: A signal, a sleep of ten minutes, a fault of the step (loss, gradient, error), or one of the run's disk.
        step: Signals and sleep come after this step; losses, gradients and errors are those of this step (from 1).
        where: Time of a signal: before the first step, after a step, during the validation, or during the first
            save at or after the step.
        rank: Rank that is affected; None for all.
        times: Number of signals, or of steps that the other faults last.
        to: Receiver of a signal: the process or its group.
    """

    what: signal.Signals | Literal["nan loss", "nan gradient", "full disk", "read-only disk", "asleep"] | Exception
    step: int = 0
    where: Where = "step"
    rank: int | None = None
    times: int = 1
    to: Literal["process", "group"] = "process"


class Injection(Callback):
    """A callback that injects the faults of its rank.

    Args:
        faults: Faults of all ranks.
    """

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.waiting = [fault for fault in faults if isinstance(fault.what, signal.Signals)]
        self.poison = [fault for fault in faults if not isinstance(fault.what, signal.Signals)]
        self.disk = Disk()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Wraps the step or the backward pass, so that losses can be changed."""
        self._here(trainer, "start")
        self.poison = [fault for fault in self.poison if fault.rank in (None, trainer.global_rank)]
        if hasattr(module, "manual_backward") and not module.automatic_optimization:
            backward = module.manual_backward
            module.manual_backward = lambda loss, *rest: backward(self._hit(trainer, loss), *rest)
        else:
            step = module.training_step
            module.training_step = lambda *given: self._hit(trainer, step(*given))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if any(fault.what == "nan gradient" and self._falls(trainer, fault) for fault in self.poison):
            parameter = next(p for p in module.parameters() if p.grad is not None)
            local = getattr(parameter.grad, "_local_tensor", parameter.grad)
            local[(0,) * local.ndim] = torch.nan

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._here(trainer, "step")
        for fault in self.poison:
            if fault.what == "asleep" and trainer.global_step == fault.step:
                time.sleep(600)
            if "disk" in str(fault.what) and trainer.is_global_zero:
                _wait_for_write()
                folder = Path(trainer.default_root_dir)
                if trainer.global_step == fault.step:
                    self.disk.spoil(folder, "full" if fault.what == "full disk" else "read-only")
                elif trainer.global_step == fault.step + fault.times:
                    self.disk.mend(folder)

    def on_validation_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._here(trainer, "validation")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._here(trainer, "saving")

    def _hit(self, trainer: Trainer, loss: Tensor) -> Tensor:
        for fault in self.poison:
            if isinstance(fault.what, Exception) and self._falls(trainer, fault):
                raise fault.what
        hits = any(fault.what == "nan loss" and self._falls(trainer, fault) for fault in self.poison)
        return loss * torch.nan if hits else loss

    def _falls(self, trainer: Trainer, fault: Fault) -> bool:
        return fault.step <= trainer.global_step + 1 < fault.step + fault.times

    def _here(self, trainer: Trainer, where: Where) -> None:
        for fault in self.waiting:
            if fault.where != where or trainer.global_step < fault.step or trainer.sanity_checking:
                continue
            self.waiting = [other for other in self.waiting if other is not fault]
            if fault.rank in (None, trainer.global_rank):
                _wait_for_write()
                for _ in range(fault.times):
                    assert isinstance(fault.what, signal.Signals)
                    _send(fault.what, fault.to)
            return


def _wait_for_write() -> None:
    """Waits for the checkpoint that is being written, so that a fault between two saves hits neither."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def _send(number: signal.Signals, to: Literal["process", "group"]) -> None:
    if to == "process":
        os.kill(os.getpid(), number)
    else:  # from another session, like Slurm
        subprocess.run(["kill", f"-{number.value}", "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)


class Disk:
    """The file system of a run, made full or read-only."""

    def spoil(self, folder: Path, how: Literal["full", "read-only"]) -> None:
        """Fills the disk up to 20 kB, or makes the folder of checkpoints read-only."""
        if how == "read-only":
            place = folder / "checkpoints"
            subprocess.run(["mount", "--bind", place, place], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
            return
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "filled").write_bytes(bytes(max(0, free - 20_000)))

    def mend(self, folder: Path) -> None:
        """Restores the file system."""
        (folder / "filled").unlink(missing_ok=True)
        # It fails if the disk was full, not read-only.
        subprocess.run(["umount", "--quiet", folder / "checkpoints"], check=False)


def kill_in_saving(folder: Path, number: int) -> None:
    """Kills this process at its ``number``-th file operation in ``folder`` after the first save is complete.

    These operations are the removal of the older checkpoint and the next save.
    """
    begun, left = [False], [number]

    def look(event: str, given: tuple[Any, ...]) -> None:
        if not event.startswith(("open", "os.", "shutil.")) or not given or not isinstance(given[0], str | os.PathLike):
            return
        if begun[0] and str(folder) in os.fspath(given[0]):
            left[0] -= 1
            if left[0] == 0:
                thread = threading.current_thread().name
                sys.stderr.write(f"killed in {thread} at {event} {os.fspath(given[0])}\n")
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        begun[0] = begun[0] or (event == "os.rename" and Path(os.fspath(given[1])).parent == folder)

    sys.addaudithook(look)


def kill_in_writing(size: int) -> None:
    """Limits the file size in bytes, so that the kernel kills this process in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

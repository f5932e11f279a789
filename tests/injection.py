"""Faults that befall a run where a test says: signals, losses that are not finite, a disk that is full."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Where = Literal["start", "step", "validation", "saving"]


@dataclass(frozen=True)
class Fault:
    """What befalls which rank, when.

    Args:
        what: A signal to the process (to its group with ``to="group"``), ten minutes of sleep, what comes of the step
            (a loss, a gradient, an error), or of the run's disk.
        step: Behind this step for signals and sleep; of this step (1 is the first) for losses, gradients and errors.
        where: At which moment a signal comes: before the first step, behind a step, in the validation, or the saving of
            the checkpoint, that comes at the step or after it.
        rank: None for all.
        times: How often a signal is sent, or for how many steps the others last.
        to: Whom a signal goes to.
    """

    what: signal.Signals | Literal["nan loss", "nan gradient", "full disk", "read-only disk", "asleep"] | Exception
    step: int = 0
    where: Where = "step"
    rank: int | None = None
    times: int = 1
    to: Literal["process", "group"] = "process"


class Injection(Callback):
    """Brings faults upon the rank that it runs on.

    Args:
        faults: Of all ranks.
    """

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.waiting = [fault for fault in faults if isinstance(fault.what, signal.Signals)]
        self.poison = [fault for fault in faults if not isinstance(fault.what, signal.Signals)]
        self.disk = Disk()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Has losses and gradients pass by here."""
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
            local.view(-1)[0] = torch.nan

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._here(trainer, "step")
        for fault in self.poison:
            if fault.what == "asleep" and trainer.global_step == fault.step:
                time.sleep(600)
            if "disk" in str(fault.what) and trainer.is_global_zero:
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
                for _ in range(fault.times):
                    assert isinstance(fault.what, signal.Signals)
                    _send(fault.what, fault.to)
            return


def _send(number: signal.Signals, to: Literal["process", "group"]) -> None:
    if to == "process":
        os.kill(os.getpid(), number)
    else:  # from outside, as Slurm does
        subprocess.run(["kill", f"-{number.value}", "--", f"-{os.getpgrp()}"], check=True, start_new_session=True)


class Disk:
    """The file system that a run lies on, as nobody wants it."""

    def spoil(self, folder: Path, how: Literal["full", "read-only"]) -> None:
        """Leaves 20 kB, or no way to write checkpoints."""
        if how == "read-only":
            place = folder / "checkpoints"
            subprocess.run(["mount", "--bind", place, place], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
            return
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        (folder / "filled").write_bytes(bytes(max(0, free - 20_000)))

    def mend(self, folder: Path) -> None:
        """As before."""
        (folder / "filled").unlink(missing_ok=True)
        subprocess.run(["umount", "--quiet", folder / "checkpoints"], check=False)  # not there if it was full


def kill_in_saving(folder: Path, number: int) -> None:
    """Kills this process at the ``number``-th thing that it does to files below ``folder`` once a save is in place.

    What follows is the removal of the one before and the next save: all of it is the saving of checkpoints.
    """
    begun, left = [False], [number]

    def look(event: str, given: tuple[Any, ...]) -> None:
        if not event.startswith(("open", "os.", "shutil.")) or not given or not isinstance(given[0], str | os.PathLike):
            return
        if begun[0] and str(folder) in os.fspath(given[0]):
            left[0] -= 1
            if left[0] == 0:
                sys.stderr.write(f"killed at {event} {os.fspath(given[0])}\n")
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        begun[0] = begun[0] or (event == "os.rename" and Path(os.fspath(given[1])).parent == folder)

    sys.addaudithook(look)


def kill_in_writing(size: int) -> None:
    """Has the kernel kill this process in the middle of a write, when a file reaches a size in bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


Prepare = Callable[[], None]

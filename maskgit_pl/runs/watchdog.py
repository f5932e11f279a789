"""The end of a rank: a hang, an error that only one rank has, and the end of another rank.

Ranks wait for each other in collectives, so a rank never ends without the others:

1. The watchdog, a thread, checks once per second for a finished micro-batch, validation batch or checkpoint. After a
   time without progress that exceeds the limit, it writes the stacks of all threads and ends the process.
2. An error on which all ranks agree (a signal, non-finite losses) is raised on rank 0. The other ranks exit silently
   with the same exit code.
3. A rank with any other error prints it and exits with its exit code, without cleanup, which would wait for the other
   ranks. Their collectives then fail: with gloo immediately, with NCCL after its timeout, so that the launcher
   (``torchrun``, ``srun --wait``) or the watchdog ends them first.
4. If Lightning's own launcher has started the ranks of this machine, the first process exits with the code of a rank
   that has ended with an error, and the other ranks exit when the first process has ended.

With a single process, an error is only raised, so that a notebook keeps its kernel.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.errors import INTERNAL_ERROR, RunError, describe_error, exit_code_of

__all__ = ["Watchdog"]

_TICK_SECONDS = 1.0
_MEDIANS = 20  # limit of a training step, in median step times
_MIN_STEPS = 5  # steps before the median is used
# Set-up, validation, saving and export have no median. Their limit is this many times ``seconds``: 30 min by default.
_OTHER_PHASES = 18
_GRACE_SECONDS = 3.0  # from the stacks of one rank to its end, so that the other ranks write theirs, too
_REPORT_SECONDS = 30.0  # time limit for writing the stacks
_MOST_BYTES = 1 << 24  # of the stacks


class Watchdog(Callback):
    """A callback that ends the process if the run makes no progress, or if another rank has ended; see the module.

    The limit in training is max(``seconds``, 20 x the median step); with gradient accumulation, a step here is a
    micro-batch. The limit is 18 x ``seconds`` during set-up, validation, saving, export and cleanup, and in the first
    steps. Time in which the process is stopped (SIGSTOP) does not count.

    After a hang, each rank writes the stacks of all its threads to ``stacks.txt`` (``stacks-rank1.txt`` ...) in the
    folder of the stage, and to stderr.

    Args:
        folder: Folder of the stage.
        seconds: Shortest limit in seconds, > 0.
    """

    def __init__(self, folder: Path, *, seconds: float = 100.0) -> None:
        self.folder = folder
        self.seconds = seconds
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last_batch_end = time.monotonic()
        self._idle_ticks = 0  # not a clock, which would also run while the process is stopped
        self._phase = "set-up"
        self._children: list[subprocess.Popen[bytes]] = []  # the other ranks, if Lightning's launcher started them
        self._error: BaseException | None = None

    @property
    def limit(self) -> float:
        """The time limit without progress in the current phase, in seconds."""
        if self._phase == "training" and len(self._step_seconds) >= _MIN_STEPS:
            return max(self.seconds, _MEDIANS * statistics.median(self._step_seconds))
        return self.longest_limit

    @property
    def longest_limit(self) -> float:
        """The time limit in seconds of the phases without a median; ranks wait for each other up to this long."""
        return _OTHER_PHASES * self.seconds

    @contextmanager
    def watch(self, trainer: Trainer) -> Iterator[None]:
        """Watches the fit and the export inside the context, and exits as the module describes if they fail."""
        is_done = threading.Event()
        thread = threading.Thread(target=self._run, args=(trainer, is_done), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._report(trainer, error)
            self._exit_unless_raised(trainer, error)
            raise
        finally:
            is_done.set()
            thread.join(_TICK_SECONDS)  # it holds the Trainer, whose memory is freed next

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._note_progress("set-up")
        self._adopt_children(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._phase == "training":
            self._step_seconds.append(now - self._last_batch_end)
        self._last_batch_end = now
        self._note_progress("training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("validation")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note_progress("validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._note_progress("saving")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("export")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._note_progress("cleanup")
        self._report(trainer, exception)  # before Lightning's cleanup, which may wait for the other ranks

    def _adopt_children(self, trainer: Trainer) -> None:
        """Takes over the ranks that Lightning's launcher has started from its observer, which ends with an empty list.

        The observer would kill this process as soon as another one has ended.
        """
        started = getattr(trainer.strategy.launcher, "procs", [])
        while started:
            self._children.append(started.pop(0))

    def _note_progress(self, phase: str) -> None:
        self._phase, self._idle_ticks = phase, 0

    def _run(self, trainer: Trainer, is_done: threading.Event) -> None:
        """Checks for progress and for ended processes once per tick; runs in the watchdog thread."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        parent = os.getppid()
        while not is_done.wait(_TICK_SECONDS):
            self._idle_ticks += 1
            self._adopt_children(trainer)
            if self._idle_ticks * _TICK_SECONDS > self.limit:
                self._exit_after_hang(trainer)
            if self._error is not None:  # the main thread exits
                continue
            if is_child and os.getppid() != parent:
                os._exit(INTERNAL_ERROR)
            for rank, child in enumerate(self._children, start=trainer.global_rank + 1):
                if code := child.poll():  # None while it runs
                    self._kill_children()
                    _write(f"maskgit train: rank {rank} (process {child.pid}) ended with {code}\n")
                    os._exit(code if code > 0 else INTERNAL_ERROR)

    def _exit_after_hang(self, trainer: Trainer) -> None:
        # A write to a pipe that no process reads, or to a file system that does not answer, blocks.
        limit = threading.Timer(_REPORT_SECONDS, os._exit, (INTERNAL_ERROR,))
        limit.daemon = True
        limit.start()
        rank = trainer.global_rank
        path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
        memory = os.memfd_create("stacks")
        faulthandler.dump_traceback(memory)
        stacks = os.pread(memory, _MOST_BYTES, 0).decode()
        with suppress(OSError):  # a full disk must not keep the process alive
            path.write_text(stacks)
        _write(
            f"hang, rank {rank}: {self._phase}: no progress for {self.limit:.0f} s after step {trainer.global_step} "
            f"(limit: {_MEDIANS} x the median step, at least {self.seconds:.0f} s); stacks: {path}\n{stacks}"
        )
        time.sleep(_GRACE_SECONDS)
        self._kill_children()
        os._exit(INTERNAL_ERROR)

    def _report(self, trainer: Trainer, error: BaseException) -> None:
        """Prints an error that only this rank has, once."""
        if error is self._error:
            return
        is_of_collective = trainer.world_size > 1 and _is_of_collective(error)
        if is_of_collective and self._children:
            time.sleep(2 * _TICK_SECONDS)  # the watchdog exits with the code of the rank that has ended
        self._error = error
        if is_of_collective:
            where, text = f"rank {trainer.global_rank}, step {trainer.global_step}", " ".join(str(error).split())
            reason = "another rank has ended, or the network is down; the first error in the logs is the cause"
            _write(f"maskgit train: {where}: {reason} ({text})\n")
        elif trainer.world_size > 1 and isinstance(error, Exception) and not _is_shared(error):
            _write(describe_error(error, "maskgit train"))

    def _exit_unless_raised(self, trainer: Trainer, error: BaseException) -> None:
        """Exits after an error, unless this rank raises it."""
        if _is_shared(error):
            if not trainer.is_global_zero:
                sys.exit(exit_code_of(error))
            return
        self._kill_children()
        if trainer.world_size > 1 and isinstance(error, Exception):
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(exit_code_of(error))

    def _kill_children(self) -> None:
        for child in self._children:
            child.kill()


def _is_shared(error: BaseException) -> bool:
    """Returns True if all ranks raise the error together."""
    return isinstance(error, RunError) and error.on_all_ranks


def _is_of_collective(error: BaseException) -> bool:
    """Returns True if a collective has failed: gloo raises RuntimeError with its own source file in the text."""
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def _write(text: str) -> None:
    """Writes to stderr without Python's stream, whose lock the main thread may hold."""
    with suppress(OSError):  # a full disk must not keep the process alive
        os.write(2, text.encode())

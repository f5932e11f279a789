"""The watchdog of a run: ends a run that hangs, and names the rank that it waits for.

Each rank runs two threads beside its training loop:

1. The progress thread checks once per second for a finished micro-batch, validation batch or checkpoint. After a time
   without progress that exceeds the limit, it writes the stacks of all threads and ends the process.
2. The heartbeat thread (only with several ranks) calls ``Peers.beat`` once per second. It ends the process when another
   rank is gone or has announced an error.

The main thread announces an error that only this rank has (``on_exception``). Each of the three follows the same steps
to end the process:

a. announce the reason to the other ranks, so that they exit with the same code;
b. write the reason, and after a hang the stacks, to stderr and to the folder of the stage;
c. wait until the other ranks have read the announcement, since it is in the store that rank 0 holds;
d. exit without cleanup, which would wait for the collective that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.distributed import rank_and_world
from maskgit_pl.errors import INTERNAL_ERROR, PeerError, RunError, exit_code_of
from maskgit_pl.runs.heartbeat import Ending, Peers

__all__ = ["Watchdog"]

log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_MEDIANS = 20  # limit of a training step, in median step times
_MIN_STEPS = 5  # steps before the median is used
# Set-up, validation and saving have no median. Their limit is this many times ``seconds``: 30 min with the default.
_OTHER_PHASES = 18
_DELIVERY_SECONDS = 3.0  # time for the other ranks to read the reason and to write their stacks
_REPORT_SECONDS = 30.0  # time limit for writing the reason and the stacks
_POLLS = 20  # polls of the child processes within a tick


class Watchdog(Callback):
    """A callback that ends the process with exit code 70 if a run makes no progress.

    The limit in training is max(``seconds``, 20 x the median step); with gradient accumulation, a step here is a
    micro-batch. The limit is 18 x ``seconds`` during set-up, validation, saving and export, and in the first steps.
    Time in which the process is stopped (SIGSTOP) does not count.

    Before the process ends, each rank that still runs writes the stacks of all its threads to ``stacks.txt``
    (``stacks-rank1.txt`` ...) in the folder of the stage, and to stderr.

    If the process of another rank has ended, or fails with an error that only that rank has, this process also ends
    within seconds.

    Args:
        folder: Folder of the stage.
        seconds: Shortest limit in seconds, > 0.

    Raises:
        ValueError: if ``seconds`` is not positive.
    """

    def __init__(self, folder: Path, *, seconds: float = 100.0) -> None:
        if not seconds > 0:
            raise ValueError(f"hang_seconds must be > 0, got {seconds}")
        self.folder = folder
        self.seconds = seconds
        self._step_seconds: deque[float] = deque(maxlen=50)
        self._last_batch_end = time.monotonic()
        self._idle_ticks = 0  # not a clock, which would also run while the process is stopped
        self._phase = "set-up"
        self._step = 0
        self._outlives_fit = False
        self._is_done = threading.Event()
        self._peers: Peers | None = None
        self._peers_ending: Ending | None = None

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._note_progress("set-up", trainer)
        threading.Thread(target=self._watch_progress, args=(trainer,), name="watchdog", daemon=True).start()
        rank, world_size = rank_and_world()
        if world_size > 1:
            self._peers = Peers(rank, world_size)
            threading.Thread(
                target=self._watch_peers, args=(trainer, self._peers), name="heartbeat", daemon=True
            ).start()

    @contextmanager
    def watch_past_fit(self, trainer: Trainer) -> Iterator[None]:
        """Keeps the watchdog active until the context ends: after the fit, all ranks export the result together."""
        self._outlives_fit = True
        try:
            yield
        except BaseException as error:
            if not self._is_done.is_set():
                self._stop_with_error(trainer, error)
            raise
        self._stop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._phase == "training":
            self._step_seconds.append(now - self._last_batch_end)
        self._last_batch_end = now
        self._note_progress("training", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("validation", trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note_progress("validation", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._note_progress("saving", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_progress("the end", trainer)
        if not self._outlives_fit:
            self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Announces an error that only this rank has to the other ranks.

        Raises:
            PeerError: if the error is a consequence of one that another rank has announced.
        """
        self._stop_with_error(trainer, exception)

    def _stop(self) -> None:
        self._is_done.set()
        if self._peers is not None:
            self._peers.leave()

    def _stop_with_error(self, trainer: Trainer, exception: BaseException) -> None:
        agreed = exception.on_all_ranks if isinstance(exception, RunError) else not isinstance(exception, Exception)
        if agreed:  # all ranks raise it together
            self._stop()
        else:
            self._report_error(trainer, exception)
        self._is_done.set()

    def _report_error(self, trainer: Trainer, exception: BaseException) -> None:
        """Announces an error of this rank, or raises the error of the rank that caused it."""
        # A collective raises RuntimeError when another rank is gone, so the cause may be elsewhere.
        is_of_collective = isinstance(exception, RuntimeError) and not isinstance(exception, RunError)
        ending = None
        if self._peers is not None and is_of_collective:
            ending = self._peers_ending or self._peers.read_ending()
        if ending is not None:
            self._is_done.set()
            raise PeerError(ending.code, ending.text) from exception
        where = f"rank {trainer.global_rank}, step {trainer.global_step}"
        # The heartbeat thread continues during this wait, so that no other rank considers this one lost.
        lost = self._describe_lost(trainer) if is_of_collective else ""
        if lost:
            log.error("%s: %s", where, lost)
        elif self._peers is not None:
            text = " ".join(f"{where}: {type(exception).__name__}: {exception}".split())
            self._is_done.set()  # before the announcement, which our own heartbeat thread would act on
            self._peers.announce(Ending(exit_code_of(exception), "rank", text))
            time.sleep(_DELIVERY_SECONDS)

    def _note_progress(self, phase: str, trainer: Trainer) -> None:
        self._phase, self._step, self._idle_ticks = phase, trainer.global_step, 0

    def _watch_progress(self, trainer: Trainer) -> None:
        """Checks for progress once per tick; runs in the progress thread."""
        while not self._is_done.wait(_TICK_SECONDS):
            self._idle_ticks += 1
            if self._is_over_limit():
                # This takes seconds, so the limit is checked again before the process ends.
                ending = self._describe_hang(trainer)
                if self._is_over_limit() and not self._is_done.is_set():
                    self._end_process(trainer, ending)

    def _is_over_limit(self) -> bool:
        return self._idle_ticks * _TICK_SECONDS > self.limit

    def _watch_peers(self, trainer: Trainer, peers: Peers) -> None:
        """Sends a heartbeat once per tick; runs in the heartbeat thread."""
        while not self._is_done.wait(_TICK_SECONDS):
            self._peers_ending = peers.beat()
            if self._peers_ending is not None and not self._is_done.is_set():
                self._end_process(trainer, self._peers_ending)

    def _describe_hang(self, trainer: Trainer) -> Ending:
        text = (
            f"{self._phase}: no progress for {self.limit:.0f} s after step {self._step} "
            f"(limit: {_MEDIANS} x the median step, at least {self.seconds:.0f} s)"
        )
        lost = self._describe_lost(trainer)
        return Ending(INTERNAL_ERROR, "hang", f"{text}; {lost}" if lost else text)

    def _end_process(self, trainer: Trainer, ending: Ending) -> None:
        """Reports the reason locally and to the other ranks, and ends the process: steps a to d of the module."""
        # In a thread, since a write to stderr can block: a full disk, or a pipe that no process reads.
        reporting = threading.Thread(target=self._report_ending, args=(trainer, ending), name="report", daemon=True)
        reporting.start()  # a, b
        reporting.join(_REPORT_SECONDS)
        time.sleep(_DELIVERY_SECONDS)  # c
        os._exit(ending.code)  # d

    def _report_ending(self, trainer: Trainer, ending: Ending) -> None:
        rank = trainer.global_rank
        # Rank 0 prints a reason that another rank has announced; each rank prints a reason that it found itself.
        prints = rank == 0 or self._peers is None or self._peers.read_ending() is None
        if self._peers is not None:
            self._peers.announce(ending)
        # Without logging, whose lock the main thread may hold.
        if ending.reason == "hang":
            path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
            stacks = _format_stacks()
            with contextlib.suppress(OSError):  # a full disk must not keep the process alive
                path.write_text(stacks)
            sys.stderr.write(f"hang, rank {rank}: {ending.text}; stacks: {path}\n{stacks}")
        elif prints:
            sys.stderr.write(f"all ranks exit: {ending.text}\n")
        sys.stderr.flush()

    def _describe_lost(self, trainer: Trainer) -> str:
        """Returns a text that names the ranks known to have ended or to be silent; empty if there are none."""
        children = getattr(trainer.strategy.launcher, "procs", [])  # only with Lightning's own launcher
        for _ in range(_POLLS if children else 0):
            ended = [(rank, child) for rank, child in enumerate(children, start=1) if child.poll() is not None]
            if ended:
                return ", ".join(
                    f"rank {rank} (process {child.pid}) ended with {child.returncode}" for rank, child in ended
                )
            # The kernel closes the connections of a process shortly before the process counts as ended.
            time.sleep(_TICK_SECONDS / _POLLS)
        return "" if self._peers is None else self._peers.describe_silent()


def _format_stacks() -> str:
    """Returns the stacks of all threads as text.

    ``faulthandler`` is not used: it writes to a stream that may block, and it stops all threads.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"Thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}\n"
        for number, frame in sys._current_frames().items()
    )

"""Ends a run that hangs, and names the rank that it waits for.

Two threads run beside the training loop of each rank:

1. The progress thread looks once a second whether a micro-batch, a validation batch or a checkpoint has been finished.
   When none has for longer than the limit, it writes the stacks of all threads and ends the process.
2. The heartbeat thread, with several ranks, calls ``Peers.beat`` once a second and ends the process when another rank
   is gone or has announced an error.

The main thread announces an error of this rank alone (``on_exception``). Whoever ends the process follows one order:

a. announce to the other ranks why they end, so that they end with the same exit code;
b. write the reason, and after a hang the stacks, to stderr and to the folder of the stage;
c. wait until the other ranks have read the announcement: rank 0 keeps the store in which it stands;
d. exit without cleaning up, which would wait for the collective that hangs.
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
_MEDIANS = 20  # a step may take so many times the median step
_MIN_STEPS = 5  # before the median counts
_OTHER_PHASES = 18  # set-up, validation and saving have no median: so many times the shortest limit, half an hour
_DELIVERY_SECONDS = 3.0  # after which the other ranks have read why they end, and written their stacks
_REPORT_SECONDS = 30.0  # that writing the reason and the stacks may take
_POLLS = 20  # of child processes, within a tick


class Watchdog(Callback):
    """Ends the process with exit code 70 when nothing makes progress for max(``seconds``, 20 x the median step).

    The stacks of all threads are written first, to ``stacks.txt`` (``stacks-rank1.txt`` ...) in the folder of the stage
    and to stderr, on all ranks that still can. Time in which the process itself is stopped does not count.

    When another rank's process has ended, or ends with an error of its own, this one ends within seconds, too.

    Args:
        folder: Folder of the stage.
        seconds: The shortest limit, positive.

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
        self._idle_ticks = 0  # ticks, not a clock: none passes while the process is stopped
        self._phase = "set-up"
        self._step = 0
        self._outlives_fit = False
        self._is_done = threading.Event()
        self._peers: Peers | None = None
        self._peers_ending: Ending | None = None

    @property
    def limit(self) -> float:
        """Seconds without progress after which the run ends, in its present phase."""
        if self._phase == "training" and len(self._step_seconds) >= _MIN_STEPS:
            return max(self.seconds, _MEDIANS * statistics.median(self._step_seconds))
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
        """Keeps watching until the block ends instead of until the fit ends: all ranks export its result together."""
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
        """Announces an error of this rank alone to the other ranks.

        Raises:
            PeerError: if the error follows from one that another rank has announced.
        """
        self._stop_with_error(trainer, exception)

    def _stop(self) -> None:
        self._is_done.set()
        if self._peers is not None:
            self._peers.leave()

    def _stop_with_error(self, trainer: Trainer, exception: BaseException) -> None:
        agreed = exception.on_all_ranks if isinstance(exception, RunError) else not isinstance(exception, Exception)
        if agreed:  # the other ranks raise it, too
            self._stop()
        else:
            self._report_error(trainer, exception)
        self._is_done.set()

    def _report_error(self, trainer: Trainer, exception: BaseException) -> None:
        """Announces an error of this rank, or finds the other rank that has caused it."""
        # A collective raises RuntimeError when another rank is gone.
        is_of_collective = isinstance(exception, RuntimeError) and not isinstance(exception, RunError)
        ending = None
        if self._peers is not None and is_of_collective:
            ending = self._peers_ending or self._peers.read_ending()
        if ending is not None:
            self._is_done.set()
            raise PeerError(ending.code, ending.text) from exception
        where = f"rank {trainer.global_rank}, step {trainer.global_step}"
        # The heartbeat thread runs on while this waits, so that no rank takes this one for lost.
        lost = self._describe_lost(trainer) if is_of_collective else ""
        if lost:
            log.error("%s: %s", where, lost)
        elif self._peers is not None:
            text = " ".join(f"{where}: {type(exception).__name__}: {exception}".split())
            self._is_done.set()  # before the announcement, which the heartbeat thread would read
            self._peers.announce(Ending(exit_code_of(exception), "rank", text))
            time.sleep(_DELIVERY_SECONDS)

    def _note_progress(self, phase: str, trainer: Trainer) -> None:
        self._phase, self._step, self._idle_ticks = phase, trainer.global_step, 0

    def _watch_progress(self, trainer: Trainer) -> None:
        """Runs in the progress thread."""
        while not self._is_done.wait(_TICK_SECONDS):
            self._idle_ticks += 1
            if self._is_over_limit():
                ending = self._describe_hang(trainer)  # takes seconds, in which progress may come
                if self._is_over_limit() and not self._is_done.is_set():
                    self._end_process(trainer, ending)

    def _is_over_limit(self) -> bool:
        return self._idle_ticks * _TICK_SECONDS > self.limit

    def _watch_peers(self, trainer: Trainer, peers: Peers) -> None:
        """Runs in the heartbeat thread."""
        while not self._is_done.wait(_TICK_SECONDS):
            self._peers_ending = peers.beat()
            if self._peers_ending is not None and not self._is_done.is_set():
                self._end_process(trainer, self._peers_ending)

    def _describe_hang(self, trainer: Trainer) -> Ending:
        text = (
            f"{self._phase}: nothing has gone on for {self.limit:.0f} s after step {self._step} "
            f"(the limit: {_MEDIANS} x the median step, at least {self.seconds:.0f} s)"
        )
        lost = self._describe_lost(trainer)
        return Ending(INTERNAL_ERROR, "hang", f"{text}; {lost}" if lost else text)

    def _end_process(self, trainer: Trainer, ending: Ending) -> None:
        """Reports the reason here and to the other ranks, and ends the process: steps a to d of the module."""
        # In a thread: stderr may lie on a full disk, or lead to a process that is gone or does not read.
        reporting = threading.Thread(target=self._report_ending, args=(trainer, ending), name="report", daemon=True)
        reporting.start()  # a, b
        reporting.join(_REPORT_SECONDS)
        time.sleep(_DELIVERY_SECONDS)  # c
        os._exit(ending.code)  # d

    def _report_ending(self, trainer: Trainer, ending: Ending) -> None:
        rank = trainer.global_rank
        # What another rank has announced is printed once, by rank 0; what this rank found out itself, by this rank.
        prints = rank == 0 or self._peers is None or self._peers.read_ending() is None
        if self._peers is not None:
            self._peers.announce(ending)
        # Not through logging: the main thread may hold its lock.
        if ending.reason == "hang":
            path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
            stacks = _format_stacks()
            with contextlib.suppress(OSError):  # a full disk must not keep the process alive
                path.write_text(stacks)
            sys.stderr.write(f"hang, rank {rank}: {ending.text}; stacks: {path}\n{stacks}")
        elif prints:
            sys.stderr.write(f"all ranks end, since one has: {ending.text}\n")
        sys.stderr.flush()

    def _describe_lost(self, trainer: Trainer) -> str:
        """Returns which other ranks have ended or are silent, as far as is known; empty if none is."""
        children = getattr(trainer.strategy.launcher, "procs", [])  # of Lightning's own launcher, on this machine
        for _ in range(_POLLS if children else 0):
            ended = [(rank, child) for rank, child in enumerate(children, start=1) if child.poll() is not None]
            if ended:
                return ", ".join(
                    f"rank {rank} (process {child.pid}) ended with {child.returncode}" for rank, child in ended
                )
            time.sleep(_TICK_SECONDS / _POLLS)  # connections of a process are closed a moment before it has ended
        return "" if self._peers is None else self._peers.describe_silent()


def _format_stacks() -> str:
    """Returns the stack of each thread.

    faulthandler would write to a stream that may not be read any more, and stop all threads meanwhile.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"Thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}\n"
        for number, frame in sys._current_frames().items()
    )

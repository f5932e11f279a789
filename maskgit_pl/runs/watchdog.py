"""Ends a run that hangs, and says which rank it waits for.

A thread beside the training loop looks once a second whether micro-batches go on. Another hears of the other ranks (see
``peers``): where one is gone or has an error of its own, all end, with its exit code.
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

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.errors import INTERNAL_ERROR, PeerError, RunError, exit_code_of
from maskgit_pl.runs.heartbeat import Ending, Peers

__all__ = ["Watchdog"]

log = logging.getLogger(__name__)

_TICK = 1.0  # seconds
_FACTOR = 20  # times the median step
_FEW = 5  # steps before a median counts
_SLOW = 18  # what has no median (set-up, validation, saving) may take so many times the shortest limit: half an hour
_HEARD = 3.0  # seconds after which the others have heard why all end, and written their stacks
_LAST_WORDS = 30.0  # seconds that they may take
_POLLS = 20  # of processes that may just have ended, within a tick


class Watchdog(Callback):
    """Ends the process with exit code 70 when nothing goes on for max(``seconds``, 20 x the median step).

    First the stacks of all threads are written to ``stacks.txt`` (``stacks-rank1.txt`` ...) in the run's folder and to
    the log, on all ranks that still can. Time in which the process itself is stopped does not count.

    When another rank's process has ended, or ends with an error that is its alone, this one ends within some seconds.

    Args:
        folder: Of the stage.
        seconds: The shortest limit, positive.
    """

    def __init__(self, folder: Path, *, seconds: float = 100.0) -> None:
        if not seconds > 0:
            raise ValueError(f"hang_seconds: a positive number is needed, got {seconds}")
        self.folder = folder
        self.seconds = seconds
        self._durations: deque[float] = deque(maxlen=50)
        self._last = time.monotonic()
        self._ticks = 0  # since something went on
        self._phase = "set-up"
        self._step = 0
        self._stays = False
        self._done = threading.Event()
        self._peers: Peers | None = None
        self._heard: Ending | None = None

    @property
    def limit(self) -> float:
        """Seconds without progress that end the run now."""
        if self._phase == "training" and len(self._durations) >= _FEW:
            return max(self.seconds, _FACTOR * statistics.median(self._durations))
        return _SLOW * self.seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._progress("set-up", trainer)
        threading.Thread(target=self._watch, args=(trainer,), name="watchdog", daemon=True).start()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._peers = Peers(dist.get_rank(), dist.get_world_size())
            threading.Thread(target=self._listen, args=(trainer, self._peers), name="peers", daemon=True).start()

    @contextmanager
    def staying(self, trainer: Trainer) -> Iterator[None]:
        """Inside, the watch goes on when the fit has ended: over what all ranks do with its result."""
        self._stays = True
        try:
            yield
        except BaseException as error:
            if not self._done.is_set():
                self._part(trainer, error)
            raise
        self._leave()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._phase == "training":
            self._durations.append(now - self._last)
        self._last = now
        self._progress("training", trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress("validation", trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._progress("validation", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._progress("saving", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._progress("the end", trainer)
        if not self._stays:
            self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the other ranks of an error that is this one's alone.

        Raises:
            PeerError: It comes of an error that another rank has told of.
        """
        self._part(trainer, exception)

    def _leave(self) -> None:
        self._done.set()
        if self._peers is not None:
            self._peers.leave()

    def _part(self, trainer: Trainer, exception: BaseException) -> None:
        agreed = exception.on_all_ranks if isinstance(exception, RunError) else not isinstance(exception, Exception)
        if agreed:
            self._leave()
        else:
            self._explain(trainer, exception)
        self._done.set()

    def _explain(self, trainer: Trainer, exception: BaseException) -> None:
        lost = isinstance(exception, RuntimeError) and not isinstance(exception, RunError)  # as of a collective
        told = (self._heard or self._peers.told()) if self._peers is not None and lost else None
        if told is not None:
            self._done.set()
            raise PeerError(told.code, told.text) from exception
        where = f"rank {trainer.global_rank}, step {trainer.global_step}"
        gone = self._who_is_gone(trainer) if lost else ""  # beats go on meanwhile, so that none takes this one for gone
        if gone:
            log.error("%s: %s", where, gone)
        elif self._peers is not None:
            text = " ".join(f"{where}: {type(exception).__name__}: {exception}".split())
            self._done.set()  # it is no news to this rank
            self._peers.tell(Ending(exit_code_of(exception), "rank", text))
            time.sleep(_HEARD)

    def _progress(self, phase: str, trainer: Trainer) -> None:
        self._phase, self._step, self._ticks = phase, trainer.global_step, 0

    def _watch(self, trainer: Trainer) -> None:
        while not self._done.wait(_TICK):
            self._ticks += 1
            if self._ticks * _TICK > self.limit:
                ending = self._hang(trainer)
                if self._ticks * _TICK > self.limit and not self._done.is_set():  # nor has it gone on meanwhile
                    self._end(trainer, ending)

    def _listen(self, trainer: Trainer, peers: Peers) -> None:
        while not self._done.wait(_TICK):
            self._heard = peers.beat()
            if self._heard is not None and not self._done.is_set():
                self._end(trainer, self._heard)

    def _hang(self, trainer: Trainer) -> Ending:
        text = (
            f"{self._phase}: nothing has gone on for {self.limit:.0f} s after step {self._step} "
            f"(the limit: {_FACTOR} x the median step, at least {self.seconds:.0f} s)"
        )
        gone = self._who_is_gone(trainer)
        return Ending(INTERNAL_ERROR, "hang", f"{text}; {gone}" if gone else text)

    def _end(self, trainer: Trainer, ending: Ending) -> None:
        """Says why, here and to the other ranks, and leaves."""
        # stderr may lie on a full disk, or lead to a process that is gone or reads no more.
        saying = threading.Thread(target=self._say, args=(trainer, ending), name="last words", daemon=True)
        saying.start()
        saying.join(_LAST_WORDS)
        time.sleep(_HEARD)
        os._exit(ending.code)

    def _say(self, trainer: Trainer, ending: Ending) -> None:
        rank = trainer.global_rank
        speaks = rank == 0 or self._peers is None or self._peers.told() is None
        if self._peers is not None:
            self._peers.tell(ending)
        # Not through logging, whose lock the main thread may hold.
        if ending.why == "hang":
            path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
            stacks = _stacks()
            with contextlib.suppress(OSError):  # a full disk must not keep the hang alive
                path.write_text(stacks)
            sys.stderr.write(f"hang, rank {rank}: {ending.text}; stacks: {path}\n{stacks}")
        elif speaks:
            sys.stderr.write(f"all ranks end, since one has: {ending.text}\n")
        sys.stderr.flush()

    def _who_is_gone(self, trainer: Trainer) -> str:
        """Which other ranks no longer live, as far as can be told; empty if none is missed."""
        children = getattr(trainer.strategy.launcher, "procs", [])  # of Lightning's own launcher, on this machine
        for _ in range(_POLLS if children else 0):
            ended = [(rank, child) for rank, child in enumerate(children, start=1) if child.poll() is not None]
            if ended:
                return ", ".join(
                    f"rank {rank} (process {child.pid}) ended with {child.returncode}" for rank, child in ended
                )
            time.sleep(_TICK / _POLLS)  # its connections are closed a moment before it has ended
        return "" if self._peers is None else self._peers.silent()


def _stacks() -> str:
    """Where each thread is. faulthandler would write to what may be read no more, and hold all threads meanwhile."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"Thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}\n"
        for number, frame in sys._current_frames().items()
    )

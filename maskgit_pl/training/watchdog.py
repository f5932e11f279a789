"""Ends a run that hangs, and says which rank it waits for.

A thread beside the training loop looks once a second whether micro-batches go on. With ranks it also leaves a beat in
the store through which they found each other: a rank that is killed or stopped beats no more, and can be named.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from maskgit_pl.errors import INTERNAL_ERROR, RunError

__all__ = ["Watchdog"]

log = logging.getLogger(__name__)

_TICK = 1.0  # seconds
_FACTOR = 20  # times the median step
_FEW = 5  # steps before a median counts
_SLOW = 18  # what has no median (set-up, validation, saving) may take so many times the shortest limit: half an hour
_SILENCE = 3.5  # seconds in which a rank that lives beats at least twice
_POLLS = 20  # of processes that may just have ended, within a tick
_TOLD = "maskgit_pl/told"


class Watchdog(Callback):
    """Ends the process with exit code 70 when nothing goes on for max(``seconds``, 20 x the median step).

    First the stacks of all threads are written to ``stacks.txt`` (``stacks-rank1.txt`` ...) in the run's folder and to
    the log, on all ranks that still can. Time in which the process itself is stopped does not count.

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
        self._done = threading.Event()
        self._peers: _Peers | None = None

    @property
    def limit(self) -> float:
        """Seconds without progress that end the run now."""
        if self._phase == "training" and len(self._durations) >= _FEW:
            return max(self.seconds, _FACTOR * statistics.median(self._durations))
        return _SLOW * self.seconds

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._peers = _Peers(dist.get_rank(), dist.get_world_size())
        self._progress("set-up", trainer)
        threading.Thread(target=self._watch, args=(trainer,), name="watchdog", daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if self._phase == "training":
            self._durations.append(now - self._last)
        self._last = now
        self._progress("training", trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._progress("validation", trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._progress("saving", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, RuntimeError) and not isinstance(exception, RunError):
            gone = self._who_is_gone(trainer)  # beats go on meanwhile, so that no rank takes this one for gone
            if gone:
                log.error("rank %d, step %d: %s", trainer.global_rank, trainer.global_step, gone)
        self._done.set()

    def _progress(self, phase: str, trainer: Trainer) -> None:
        self._phase, self._step, self._ticks = phase, trainer.global_step, 0

    def _watch(self, trainer: Trainer) -> None:
        while not self._done.wait(_TICK):
            self._ticks += 1
            told = None if self._peers is None else self._peers.beat()
            if told is not None or self._ticks * _TICK > self.limit:
                self._end(trainer, told)

    def _end(self, trainer: Trainer, told: str | None) -> None:
        """Says what is known, here and to the other ranks, and leaves.

        Args:
            trainer: That hangs.
            told: What another rank has found out before.
        """
        if told is None:
            told = (
                f"{self._phase}: nothing has gone on for {self.limit:.0f} s after step {self._step} "
                f"(the limit: {_FACTOR} x the median step, at least {self.seconds:.0f} s)"
            )
            gone = self._who_is_gone(trainer)
            told += f"; {gone}" if gone else ""
            if self._peers is not None:
                self._peers.tell(told)
        rank = trainer.global_rank
        path = self.folder / ("stacks.txt" if rank == 0 else f"stacks-rank{rank}.txt")
        with contextlib.suppress(OSError), path.open("w") as file:  # a full disk must not keep the hang alive
            faulthandler.dump_traceback(file)
        # Not through logging, whose lock the main thread may hold.
        sys.stderr.write(f"hang, rank {rank}: {told}; stacks: {path}\n")
        faulthandler.dump_traceback()
        sys.stderr.flush()
        time.sleep(3 * _TICK)  # the others read what was told, and write their stacks
        os._exit(INTERNAL_ERROR)

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


class _Peers:
    """What ranks tell each other beside the training, through the store through which they found each other.

    Args:
        rank: This rank.
        world_size: Of the run.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the one of the process group may be waiting for something.
        connect = dist.TCPStore  # type: ignore[attr-defined]  # torch does not list it
        self._store = connect(address, port, is_master=False, timeout=timedelta(seconds=10))
        self._rank = rank
        self._keys = [f"maskgit_pl/beat/{each}" for each in range(world_size)]
        self._count = 0
        self._lost = False
        self._name = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._lock = threading.Lock()
        self.beat()

    def beat(self) -> str | None:
        """Shows that this rank lives; what another has told all of them."""
        self._count += 1
        try:
            with self._lock:
                self._store.set(self._keys[self._rank], f"{self._name} {self._count}")
                return self._store.get(_TOLD).decode() if self._store.check([_TOLD]) else None
        except RuntimeError:
            self._lost = True
            return None

    def tell(self, text: str) -> None:
        """Tells all ranks."""
        with contextlib.suppress(RuntimeError), self._lock:
            self._store.set(_TOLD, text)

    def silent(self) -> str:
        """Which ranks do not beat."""
        if self._lost:
            return "rank 0, which keeps the store, no longer answers"
        before = self._beats()
        time.sleep(_SILENCE)
        after = self._beats()
        if self._lost:
            return "rank 0, which keeps the store, no longer answers"
        silent = [
            new.rpartition(" ")[0]
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if old == new and rank != self._rank
        ]
        return f"{', '.join(silent)}: not heard of for {_SILENCE} s" if silent else ""

    def _beats(self) -> list[str]:
        """The last beat of each rank; of one that has not begun yet, its number."""
        try:
            with self._lock:
                begun = [self._store.check([key]) for key in self._keys]
                return [
                    self._store.get(key).decode() if there else f"rank {rank} 0"
                    for rank, (key, there) in enumerate(zip(self._keys, begun, strict=True))
                ]
        except RuntimeError:
            self._lost = True
            return []

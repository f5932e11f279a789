"""Processes: the rank that a launcher gave this one, stop signals, worker processes, and progress bars. No torch.

Launcher: rank and world size that ``torchrun`` or ``srun`` set in the environment, for commands whose processes share
work without a process group (see ``distributed`` for those that have one) and commands that must not act as a rank.

Stop signals (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C): their handler sets a flag and does nothing else. A handler that saved
or talked to other ranks would do so in the middle of other work, and ranks that are not at the same place wait for each
other forever. ``training.stopping.StepCheck`` reads the flag after each step, on all ranks together. A second
Ctrl-C ends a command immediately, with exit code 130, or as soon as the main thread, which may be waiting for other
ranks, runs again. In a notebook, the second Ctrl-C raises KeyboardInterrupt. The files on disk are complete in either
case, as after a kill.

Workers: ``run_jobs`` runs a function over many shards, in this process or in several, with equal results.

Progress: bars on a terminal, log lines every 15 seconds elsewhere, for every command that works for longer than a few
seconds. Training runs use ``runs.callbacks``. The lines go to the log, not to the output of a command.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, Literal, NamedTuple, TypeVar

from tqdm import tqdm

from maskgit_pl.checks import check_integer
from maskgit_pl.errors import INTERRUPTED, DataWorkerError, is_user_error
from maskgit_pl.text import shorten

__all__ = ["Bars", "no_bars", "progress_bars"]

# torchrun under srun sets both. A batch script has SLURM_PROCID and SLURM_NTASKS, too, but is a single process.
_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
_VARIABLES = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_")

_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if hasattr(signal, name))  # Windows lacks some
_CTRL_C = b"\nfinishing this step and saving; press Ctrl-C again to quit immediately\n"
_CTRL_C_AGAIN = b"\nquit immediately; repeat the command to resume from the last checkpoint\n"

_SECONDS_BETWEEN_LINES = 15.0

_Shared = TypeVar("_Shared")
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Checks the variables of a launcher, from which Lightning and this package read ranks."""
    for name in (*sum(_RANKS, ()), *_LOCAL_RANKS):
        if not environment.get(name, "0").isdecimal():
            raise ValueError(
                f"the variable {name} of the environment must be an integer >= 0, got {shorten(environment[name])}; "
                "unset it, or start the command by srun or torchrun, which set it"
            )


def launcher_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns this process's rank and the number of processes; (0, 1) without a launcher."""
    variables = next((names for names in _RANKS if all(name in environment for name in names)), None)
    if variables is None:
        return 0, 1
    rank, world_size = (int(environment[name]) for name in variables)
    return rank, world_size


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank on its machine; 0 without a launcher."""
    return next((int(environment[name]) for name in _LOCAL_RANKS if name in environment), 0)


@contextmanager
def hide_launcher() -> Iterator[None]:
    """Hides the variables of a launcher inside the context; Lightning would treat this process as a rank."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
    # In place, since child processes and libraries read os.environ.
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


class _Flag:
    """The stop request of this process. Forked processes, such as data workers, ignore the signals."""

    process = -1  # ID of the process that catches the signals
    is_set = False
    presses = 0  # number of Ctrl-C presses
    may_raise = False


@contextmanager
def catch_stop_signals(*, until: Literal["return", "exit"] = "return") -> Iterator[None]:
    """Lets the stop signals set the flag inside the context.

    Enter it before slow imports, since a signal that arrives earlier kills the process. A nested context, and
    one in a thread other than the main thread, changes nothing.

    Args:
        until: End of the context. ``"return"``: the caller continues, as in a notebook; a second Ctrl-C
            raises KeyboardInterrupt, and the handlers are restored. ``"exit"``: the process exits; a second
            Ctrl-C ends it immediately, and after a first signal all further ones are ignored.
    """
    if _Flag.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Flag.process, _Flag.is_set, _Flag.presses, _Flag.may_raise = os.getpid(), False, 0, until == "return"
    before = {number: signal.signal(number, _set_flag) for number in SIGNALS}
    # A job script may start its tasks with these signals blocked; a pending one is delivered now.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        # A signal that arrives after the work is done must not change the exit code. At exit, the interpreter restores
        # the default action (kill) of signals with a Python handler; an ignored signal stays ignored.
        for number, handler in before.items():
            is_ignored = until == "exit" and (_Flag.is_set or number in blocked)
            signal.signal(number, signal.SIG_IGN if is_ignored else handler)
        if until == "return":
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _Flag.process, _Flag.is_set = -1, False


def is_requested() -> bool:
    """Returns True if this process has received a stop signal."""
    return _Flag.is_set


def ignore_job_signals(worker: int) -> None:
    """Keeps a data worker alive when the whole job receives SIGTERM, since the last step still needs its data.

    SIGTERM from the parent process ends the worker, as in torch. The other stop signals have no effect in workers.
    ``DataLoader`` passes the index of the worker.
    """
    if not hasattr(signal, "sigwaitinfo"):  # only Linux tells a thread who sent a signal
        return
    # Blocked in all threads, so that only the thread below receives it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        parent = os.getppid()
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, name=f"signals of worker {worker}", daemon=True).start()


def _set_flag(number: int, frame: FrameType | None) -> None:
    # A forked process inherits this handler.
    if os.getpid() != _Flag.process:
        return
    _Flag.is_set = True
    if number != signal.SIGINT:
        return
    _Flag.presses += 1
    if _Flag.presses > 1 and _Flag.may_raise:
        raise KeyboardInterrupt
    with suppress(OSError):  # stderr may be full or closed
        os.write(2, _CTRL_C if _Flag.presses == 1 else _CTRL_C_AGAIN)
    if _Flag.presses > 1:
        os._exit(INTERRUPTED)


def run_jobs(
    function: Callable[[_Shared, _Job], _Result], shared: _Shared, jobs: Sequence[_Job], *, workers: int
) -> Iterator[tuple[_Job, _Result]]:
    """Calls ``function(shared, job)`` for every job.

    Args:
        function: Function that can be pickled: defined at the top level of a module.
        shared: First argument of all calls; sent to each worker once.
        jobs: Second argument of each call.
        workers: Number of processes; with 1, or for one job, this process does the work.

    Yields:
        (job, result) in the order in which the jobs finish.
    """
    # One process: the results come in the order of the jobs, and starting another would take a second.
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, function(shared, job)
        return
    # spawn: a forked copy of a process with threads (torch's, the progress bar's) may deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(shared,))
    others = set(multiprocessing.active_children())
    try:
        with _ctrl_c_later():
            waiting = {pool.submit(_call, function, job): job for job in jobs}
        for future in as_completed(waiting):
            result = future.result()
            if isinstance(result, _Refusal):
                raise result.error
            yield waiting.pop(future), result
    except BrokenProcessPool as error:
        raise DataWorkerError(
            "a worker process was killed, most likely because it ran out of memory; use fewer workers (--num-workers), "
            "then run the same command again"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # its result will not be used
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Blocks Ctrl-C, which processes that are started inside inherit, and handles it at the end of the context."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # The signal may reach a thread of a library that does not block it. Python then calls the handler in the main
    # thread, where KeyboardInterrupt would leave a worker without its job.
    presses: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: presses.append(number)) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number in presses:
            signal.raise_signal(number)


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(requested: int | None, *, work: float) -> int:
    """Returns the number of worker processes.

    Args:
        requested: The number that the user asked for; None for one per core, fewer if there is little work.
        work: Amount of work, in units that take one process about 10 seconds.
    """
    if requested is None:
        return min(available_cores(), 1 + int(work))
    return check_integer("num_workers", requested, "[1, inf)")


_shared: Any = None  # in a worker: the argument that all jobs share, sent once


class _Refusal(NamedTuple):
    """A user error in a worker, sent back as a result; as an exception, it would get the worker's traceback."""

    error: Exception


def _init_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    os.environ["OMP_NUM_THREADS"] = "1"  # one core per worker; torch reads it when it is imported
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose parent process was killed; else it would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[[Any, _Job], _Result], job: _Job) -> _Result | _Refusal:
    try:
        return function(_shared, job)
    except Exception as error:
        if is_user_error(error):
            return _Refusal(error)
        raise


Bars = Callable[..., Callable[[int], None]]
"""A function that makes the progress bar of a task, ``bars(title, total, done=0, unit="")``.

``total`` is the amount of work, and ``done`` that of an earlier run, which does not count for the speed. It returns a
function to call with each finished amount.
"""


def no_bars(title: str, total: int, *, done: int = 0, unit: str = "") -> Callable[[int], None]:
    """Returns a function that shows nothing, with the signature of ``Bars``."""
    return lambda count: None


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Bars]:
    """Yields a function that makes bars or log lines with the time left; ``shown`` is True on one rank."""
    if not shown:
        yield no_bars
        return
    how: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stdout.isatty():  # a bar in a log file would be thousands of lines
        seconds = _SECONDS_BETWEEN_LINES
        how = {"file": _LogLines(), "mininterval": seconds, "delay": seconds, "miniters": 1, "ncols": 0, "position": 0}
    with ExitStack() as opened:

        def make_bar(title: str, total: int, *, done: int = 0, unit: str = "") -> Callable[[int], None]:
            bar = opened.enter_context(_Bar(desc=title, total=total, initial=done, unit=unit, leave=False, **how))

            def advance(count: int) -> None:
                bar.update(count)
                if bar.n >= total:
                    bar.close()

            return advance

        yield make_bar


class _Bar(tqdm):  # type: ignore[misc]  # tqdm: untyped
    """A bar without a thread of its own, which a process that forks must not have."""

    monitor_interval = 0


class _LogLines:
    """A file that sends the states of a bar to the log."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        """Logs a text that is not blank."""
        if text.strip():
            log.info("%s", text.strip())

    def flush(self) -> None:
        """Does nothing."""


@contextmanager
def named_bars(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``advance(title, count, total)``, which adds to the bar of a title, made at its first call."""
    with progress_bars() as bars:
        advances: dict[str, Callable[[int], None]] = {}

        def advance(title: str, count: int, total: int) -> None:
            if title not in advances:
                advances[title] = bars(title, total, unit=unit)
            advances[title](count)

        yield advance

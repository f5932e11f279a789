"""The same function over many shards, in this process or in several.

Used by what makes, indexes and verifies shards. The results do not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

from maskgit_pl.checks import check_integer
from maskgit_pl.errors import is_user_error

__all__ = ["available_cores", "choose_workers", "run_jobs"]

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")
_shared: Any = None  # in a worker: what all jobs have in common, sent once


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(given: int | None, *, work: float) -> int:
    """Returns the number of processes: as asked for, else one a core as far as there is work.

    Args:
        given: What is asked for; None for nothing.
        work: In units that take one process some 10 seconds.
    """
    return min(available_cores(), 1 + int(work)) if given is None else given


def run_jobs(
    function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job], *, workers: int
) -> Iterator[tuple[Job, Result]]:
    """Calls ``function(shared, job)`` for every job.

    Args:
        function: Of a module's top level, as are the types of its arguments.
        shared: What all jobs have in common; sent to each worker once.
        jobs: Hashable or not, in any number.
        workers: Processes; with 1, or for one job, this process does the work.

    Yields:
        (job, result) in the order in which they are done.

    Raises:
        ValueError: if ``workers`` is not an integer of at least 1.
    """
    check_integer("workers", workers, "[1, inf)")
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, function(shared, job)
        return
    # spawned, since a fork of a process with threads (torch's, the progress bar's) may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(shared,))
    others = set(multiprocessing.active_children())
    try:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: Ctrl-C is not theirs
        try:
            waiting = {pool.submit(_call, function, job): job for job in jobs}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for future in as_completed(waiting):
            result = future.result()
            if isinstance(result, _Refusal):
                raise result.error
            yield waiting.pop(future), result
    except (KeyboardInterrupt, GeneratorExit):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # nobody waits for what it does
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Refusal(NamedTuple):
    """Bad input that a worker has met; where it was raised is known only there."""

    error: Exception


def _init_worker(shared: Any) -> None:
    global _shared
    _shared = shared
    os.environ["OMP_NUM_THREADS"] = "1"  # one core each; read when torch is imported
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends a worker whose owner was killed, which would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[[Any, Job], Result], job: Job) -> Result | _Refusal:
    try:
        return function(_shared, job)
    except Exception as error:
        if is_user_error(error):
            return _Refusal(error)
        raise

"""Runs one function over many shards, in this process or in several.

Used by ``writer``, ``index`` and ``verify``. The results do not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from maskgit_pl.checks import check_integer
from maskgit_pl.errors import DataWorkerError, is_user_error
from maskgit_pl.processes import hold_ctrl_c

__all__ = ["available_cores", "choose_workers", "run_jobs"]

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")
_shared: Any = None  # in a worker: the argument that all jobs share, sent once


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(given: int | None, *, work: float) -> int:
    """Returns the number of worker processes.

    Args:
        given: The number that the user asked for; None for one per core, fewer if there is little work.
        work: Amount of work, in units that take one process about 10 seconds.
    """
    return min(available_cores(), 1 + int(work)) if given is None else given


def run_jobs(
    function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job], *, workers: int
) -> Iterator[tuple[Job, Result]]:
    """Calls ``function(shared, job)`` for every job.

    Args:
        function: Function that can be pickled: defined at the top level of a module.
        shared: First argument of all calls; sent to each worker once.
        jobs: Second argument of each call.
        workers: Number of processes; with 1, or for one job, this process does the work.

    Yields:
        (job, result) in the order in which the jobs finish.

    Raises:
        ValueError: if ``workers`` is not an integer of at least 1.
        DataWorkerError: if a worker was killed.
    """
    check_integer("workers", workers, "[1, inf)")
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
        with hold_ctrl_c():
            waiting = {pool.submit(_call, function, job): job for job in jobs}
        for future in as_completed(waiting):
            result = future.result()
            if isinstance(result, _Refusal):
                raise result.error
            yield waiting.pop(future), result
    except BrokenProcessPool as error:
        raise DataWorkerError(
            "a worker process was killed, most likely because it ran out of memory; use fewer workers (--num-workers), "
            "then run the same command again to resume"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # its result will not be used
        raise
    finally:
        pool.shutdown(cancel_futures=True)


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


def _call(function: Callable[[Any, Job], Result], job: Job) -> Result | _Refusal:
    try:
        return function(_shared, job)
    except Exception as error:
        if is_user_error(error):
            return _Refusal(error)
        raise

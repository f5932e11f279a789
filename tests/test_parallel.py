import os
import signal

import pytest

from maskgit_pl.errors import DataWorkerError
from maskgit_pl.processes import run_jobs


def square(offset: int, number: int) -> int:
    return offset + number**2


def die(offset: int, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_has_its_result(workers: int) -> None:
    assert dict(run_jobs(square, 1, [2, 3, 4], workers=workers)) == {2: 5, 3: 10, 4: 17}


def test_a_worker_that_is_killed_is_said_in_a_line_with_the_way_out() -> None:
    with pytest.raises(DataWorkerError, match=r"a worker process was killed, .*; use fewer workers \(--num-workers\)"):
        list(run_jobs(die, 1, [2, 3, 4], workers=2))

"""Signals to a process that listens, as it runs and as it waits for something that does not come."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from maskgit_pl import processes
from maskgit_pl.errors import DataWorkerError
from maskgit_pl.processes import launcher_rank, local_rank, named_bars, progress_bars, run_jobs

# Python 3.12 and newer warn of a fork beside another thread, such as the one that waits for signals.
PYTHON = [sys.executable, "-W", "ignore::DeprecationWarning"]
LISTEN = """
import os, sys, time
from maskgit_pl import processes
with processes.catch_stop_signals(until="exit"):
    own = os.getpid()
    child = os.fork()  # as a process that loads data
    if child == 0:
        while os.getppid() == own:
            time.sleep(0.02)
        os._exit(0)
    print("listens", flush=True)
    if sys.argv[1] == "blocked":
        os.waitpid(child, 0)  # taken up again after each signal
    while not processes.is_requested():
        time.sleep(0.01)
    time.sleep(float(sys.argv[2]))
sys.exit(75)
"""


def send(*times: float, state: str = "runs", saving: float = 0.0) -> tuple[int, list[str]]:
    """Sends Ctrl-C to the process group after each pause. Returns exit code and lines of stderr."""
    with subprocess.Popen(
        [*PYTHON, "-c", LISTEN, state, str(saving)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        for pause in times:
            time.sleep(pause)
            subprocess.run(["kill", "-INT", "--", f"-{process.pid}"], check=True)
        _, error = process.communicate()
    return process.returncode, [line for line in error.splitlines() if line]


FIRST = "finishing this step and saving; press Ctrl-C again to quit immediately (exit code 130)"
CALLED = "finishing this step and saving; press Ctrl-C again to quit immediately"
SECOND = "quit immediately; repeat the command to resume from the last checkpoint"


def test_one_ctrl_c_sets_the_flag_also_if_workers_get_it_too():
    assert send(0) == (75, [FIRST])


def test_signals_to_a_process_that_is_being_forked_are_not_the_parents():
    """The new process gets one before it is set up; it is its own."""
    code = """
import os, signal, sys, time
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))  # those registered first run first
from maskgit_pl import processes
with processes.catch_stop_signals(until="exit"):
    for _ in range(20):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    time.sleep(0.2)
    sys.exit(int(processes.is_requested()))
"""
    done = subprocess.run([*PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("state", ["runs", "blocked"])
def test_a_second_ctrl_c_ends_at_once_with_130(state):
    assert send(0, 0.2, state=state, saving=600) == (130, [FIRST, SECOND])


def test_after_listening_ctrl_c_means_what_it_meant_before():
    code = """
import os, signal, sys
from maskgit_pl import processes
with processes.catch_stop_signals(until="exit"):
    pass
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize(("way", "code"), [("a job's script blocked them", 0), ("it was asked to stop", 75)])
def test_signals_until_the_process_is_gone_do_not_change_the_exit_code(way, code):
    """The interpreter takes a while to end, and Slurm sends its signal when the time comes, not when it suits."""
    listen = """
import os, signal, sys
from maskgit_pl import processes
if sys.argv[1] == "0":
    signal.pthread_sigmask(signal.SIG_BLOCK, processes.SIGNALS)
with processes.catch_stop_signals(until="exit"):
    if sys.argv[1] == "75":
        os.kill(os.getpid(), signal.SIGUSR1)
objects = [[number] for number in range(1_000_000)]  # to be freed at the end
print("done", flush=True)
sys.exit(int(sys.argv[1]))
"""
    with subprocess.Popen([sys.executable, "-c", listen, str(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n", way
        while process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGTERM)
    assert process.returncode == code


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in processes.SIGNALS]


def test_a_caller_that_goes_on_has_its_handlers_again_and_may_be_asked_again(capfd):
    before = handlers()
    for _ in range(2):
        with processes.catch_stop_signals():
            assert not processes.is_requested()
            signal.raise_signal(signal.SIGINT)
            assert processes.is_requested()
            with processes.catch_stop_signals(until="exit"):  # inside another one: nothing
                assert processes.is_requested()
        assert handlers() == before
    assert capfd.readouterr().err.split("\n\n") == ["\n" + CALLED, CALLED + "\n"]


def test_a_second_ctrl_c_raises_where_the_caller_goes_on():
    def listen() -> None:
        with processes.catch_stop_signals():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                signal.raise_signal(number)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        listen()
    assert handlers() == before
    assert not processes.is_requested()


def test_another_thread_listens_to_nothing():
    before, seen = handlers(), []

    def listen() -> None:
        with processes.catch_stop_signals():
            seen.extend(handlers())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == before


def test_ctrl_c_waits_while_processes_start_although_another_thread_receives_it():
    reached, ends = [], threading.Event()

    def start() -> None:
        with processes.hold_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            reached.append(subprocess.run([sys.executable, "-c", "print(1)"], check=True).returncode)

    other = threading.Thread(target=ends.wait)  # started before the signal is blocked, so it receives the signal
    other.start()
    before = handlers()
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        ends.set()
        other.join()
    assert reached == [0]
    assert handlers() == before


def test_a_new_process_ignores_ctrl_c():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    with processes.hold_ctrl_c():
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.stdout == "alive\n"


def test_a_held_ctrl_c_counts_once_where_the_second_one_ends_the_process():
    code = """
import os, signal, threading, time
from maskgit_pl import processes

with processes.catch_stop_signals(until="exit"):
    with processes.hold_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    time.sleep(0.2)
    print(processes.is_requested())
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (made.returncode, made.stdout) == (0, "True\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, (2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script: nobody has started 7 others
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"},
            (1, 2),
        ),  # torchrun in srun
        ({"RANK": "3"}, (0, 1)),
    ],
)
def test_ranks_are_those_of_whoever_started_the_processes(environment, expected):
    assert launcher_rank(environment) == expected


@pytest.mark.parametrize(
    ("environment", "rank"), [({}, 0), ({"SLURM_LOCALID": "2"}, 2), ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1)]
)
def test_the_rank_on_a_machine_is_that_of_torchrun_or_else_of_slurm(environment, rank):
    assert local_rank(environment) == rank


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'one'"):
        launcher_rank({"RANK": "one", "WORLD_SIZE": "2"})


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


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Yields the seconds of a fake clock, one after the other."""
    seconds: list[float] = []
    monkeypatch.setattr(processes.time, "monotonic", lambda: seconds.pop(0))
    return seconds


@pytest.fixture
def lines(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    """The log lines without a terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(logging.getLogger("maskgit_pl"), "propagate", True)
    caplog.set_level(logging.INFO, "maskgit_pl")
    return caplog


def test_a_log_has_a_line_now_and_then_with_the_pace_since_the_line_before(clock, lines):
    clock += [0.0, 10.0, 40.0, 60.0]
    with progress_bars() as bars:
        advance = bars("sampling", 100, done=20, unit="images")
        for _ in range(3):
            advance(10)
    assert lines.messages == [
        "sampling: 40 of 100 images, 0.50 images/s, 0:02:00 left",
        "sampling: 50 of 100 images, 0.50 images/s, 0:01:40 left",
    ]


def test_what_has_no_unit_is_counted_and_a_fast_pace_has_no_decimals(clock, lines):
    clock += [0.0, 20.0]
    with progress_bars() as bars:
        bars("classifier", 5_000)(1_000)
    assert lines.messages == ["classifier: 1000 of 5000, 50/s, 0:01:20 left"]


def test_nothing_is_told_where_it_is_not_to_be_shown_or_nothing_was_done(clock, lines):
    with progress_bars(shown=False) as bars:
        bars("other ranks", 10, done=1, unit="images")(5)
    clock += [0.0, 20.0]
    with progress_bars() as bars:
        bars("nothing", 10)(0)
    assert lines.messages == []


def test_a_terminal_has_bars_of_which_finished_ones_go_where_there_are_many(monkeypatch, lines):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(processes, "_SECONDS_BETWEEN_UPDATES", 0.0)
    with progress_bars() as bars:
        made = [bars(f"work {number}", 4, done=1, unit="images") for number in range(12)]
        for advance in made[:2]:
            advance(1)
            advance(2)
        tasks = made[0].progress.tasks
        assert [task.completed for task in tasks[:3]] == [4, 4, 1]
        assert [task.visible for task in tasks[:3]] == [False, False, True]
        assert tasks[0].fields["speed"].endswith("images/s")
    assert lines.messages == []


def test_a_bar_is_not_updated_for_every_small_thing(monkeypatch, clock):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    clock += [1.0, 1.01, 1.02, 1.03]
    with progress_bars() as bars:
        advance = bars("work", 4)
        monkeypatch.setattr(advance.progress, "get_time", lambda: 0.0)
        seen = []
        for _ in range(4):
            advance(1)
            seen.append(advance.progress.tasks[0].completed)
    assert seen == [1, 1, 1, 4]


def test_a_bar_with_a_name_is_made_when_its_work_begins(clock, lines):
    clock += [0.0, 10.0, 30.0, 40.0, 60.0]
    with named_bars("shards") as advance:
        for title, count in (("train", 1), ("train", 1), ("val", 3)):
            advance(title, count, 4)
    assert [record.getMessage().partition(",")[0] for record in lines.records] == [
        "train: 2 of 4 shards",
        "val: 3 of 4 shards",
    ]

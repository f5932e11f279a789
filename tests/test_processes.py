"""Signals to a process that listens, as it runs and as it waits for something that does not come."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import popen_spawn_posix

import pytest

from maskgit_pl import processes
from maskgit_pl.cli import main
from maskgit_pl.errors import DataWorkerError
from maskgit_pl.processes import launcher_rank, local_rank, run_jobs

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


FIRST = "finishing this step and saving; press Ctrl-C again to quit immediately"
SECOND = "quit immediately; repeat the command to resume from the last checkpoint"


def test_one_ctrl_c_sets_the_flag_with_workers_in_the_group():
    assert send(0) == (75, [FIRST])


def test_a_signal_to_a_process_being_forked_does_not_stop_the_parent():
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
    # Signals that arrive before the process waits would count as one.
    assert send(0.5, 0.5, state=state, saving=600) == (130, [FIRST, SECOND])


@pytest.mark.slow
@pytest.mark.parametrize(("way", "code"), [("a job's script blocked them", 0), ("it was asked to stop", 75)])
def test_signals_at_the_end_of_a_process_do_not_change_its_exit_code(way, code):
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


def test_the_handlers_are_restored_and_a_run_can_be_stopped_again(capfd):
    before = handlers()
    for _ in range(2):
        with processes.catch_stop_signals():
            assert not processes.is_requested()
            signal.raise_signal(signal.SIGINT)
            assert processes.is_requested()
            with processes.catch_stop_signals(until="exit"):  # inside another one: nothing
                assert processes.is_requested()
        assert handlers() == before
    assert capfd.readouterr().err.split("\n\n") == ["\n" + FIRST, FIRST + "\n"]


def test_a_second_ctrl_c_raises_keyboard_interrupt_in_a_library_call():
    def listen() -> None:
        with processes.catch_stop_signals():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                signal.raise_signal(number)

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        listen()
    assert handlers() == before
    assert not processes.is_requested()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, (3, 4, 1)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, (2, 8, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),  # a batch script: nobody has started 7 others
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, (1, 2, 0)),
    ],
)
def test_ranks_are_those_of_torchrun_or_else_of_slurm(environment, expected):
    assert (*launcher_rank(environment), local_rank(environment)) == expected


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "", "-1"])
def test_a_variable_of_a_launcher_that_is_no_number_is_named(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert main(["models"]) == 2
    assert f"the variable {name} of the environment must be an integer >= 0, got {value!r}" in capsys.readouterr().err


def square(offset: int, number: int) -> int:
    return offset + number**2


def die(offset: int, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_has_its_result(workers: int) -> None:
    assert dict(run_jobs(square, 1, [2, 3, 4], workers=workers)) == {2: 5, 3: 10, 4: 17}


def test_a_killed_worker_is_one_line_with_the_way_out() -> None:
    with pytest.raises(DataWorkerError, match=r"a worker process was killed, .*; use fewer workers \(--num-workers\)"):
        list(run_jobs(die, 1, [2, 3, 4], workers=2))


def test_ctrl_c_while_workers_start_waits_until_they_have_started(monkeypatch, capfd):
    """A library's thread takes the signal between the start of a worker and the arrival of its job."""
    start, done = popen_spawn_posix.util.spawnv_passfds, threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()

    def start_and_press(path, words, files):
        number = start(path, words, files)
        if "--multiprocessing-fork" in [word.decode() if isinstance(word, bytes) else word for word in words]:
            signal.pthread_kill(other.ident, signal.SIGINT)
            time.sleep(0.05)
        return number

    monkeypatch.setattr(popen_spawn_posix.util, "spawnv_passfds", start_and_press)
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(square, 1, [2, 3, 4], workers=2))
    done.set()
    time.sleep(1)  # a worker without its job ends with a traceback by then
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err == ""  # no worker without its job

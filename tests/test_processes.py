"""Signals to a process that listens, as it runs and as it waits for something that does not come."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from maskgit_pl import processes

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

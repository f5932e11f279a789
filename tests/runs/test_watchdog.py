"""The time limits of the watchdog. tests/test_survival.py exceeds them in real runs.

The heartbeat of two ranks in separate processes.
"""

import contextlib
import os
import re
import signal
import socket
import struct
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from lightning.pytorch import LightningModule, Trainer

from maskgit_pl import runs
from maskgit_pl.errors import DataBudgetError
from maskgit_pl.runs.build import build
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.watchdog import Ending, Peers, Watchdog
from maskgit_pl.training.strategies import build_strategy
from tests.conftest import flags
from tests.forked import PROCESSES

TINY = Path(__file__).parents[1] / "tiny"


def test_what_has_no_median_has_more_time_from_its_start(tmp_path):
    trainer, module = Trainer(accelerator="cpu", logger=False, barebones=True), LightningModule()
    watchdog = Watchdog(tmp_path, seconds=0.05)
    assert watchdog.limit == 18 * 0.05  # set-up
    for _ in range(8):
        watchdog.on_train_batch_end(trainer, module)
        time.sleep(0.01)
    of_a_step = watchdog.limit
    assert 20 * 0.01 <= of_a_step < 18
    for begin in (watchdog.on_validation_start, lambda *_: watchdog.on_save_checkpoint(trainer, module, {})):
        begin(trainer, module)
        assert watchdog.limit == 18 * 0.05
        watchdog.on_train_batch_end(trainer, module)
        watchdog.on_train_batch_end(trainer, module)
        assert watchdog.limit != 18 * 0.05


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("seconds", [0.5, 100.0, 600.0, 1e9])
def test_collectives_wait_longer_than_the_watchdog(tmp_path, strategy, seconds):
    watchdog = Watchdog(tmp_path, seconds=seconds)
    waits = build_strategy(strategy, longest_wait=watchdog.longest_limit)._timeout
    assert isinstance(waits, timedelta)
    assert waits.total_seconds() > min(watchdog.limit, 86400 * 365)
    # torch adds it to a time in nanoseconds, as 64 bits.
    assert waits.total_seconds() * 1e9 < 2**62


def test_the_strategy_of_a_run_waits_longer_than_its_watchdog(tmp_path, tiny_shards):
    tiny = flags(yaml.safe_load((TINY / "tokenizer.yaml").read_text()))
    words = [*tiny, "--hang_seconds=600", "--trainer.devices=2"]
    recipe = runs.Recipe.read("tokenizer", cluster="ddp", overrides=words)
    trainer = build(plan_run(recipe, run=tmp_path / "runs" / "one", data=tiny_shards)).trainer
    assert trainer.strategy._timeout.total_seconds() > 18 * 600


def other(port: int, acts: str, ready) -> None:
    """Runs rank 1."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    peers = Peers(1, 2)
    ready.set()
    if acts == "is firewalled":
        peers._listen_socket.close()  # connections are refused, as by a firewall
    if acts == "resets":
        connection, _ = peers._listen_socket.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # as firewalls do
        connection.close()
    if acts == "announces":
        peers.announce(Ending(DataBudgetError.exit_code, "rank", "rank 1: too many"))
    elif acts == "asks":
        while True:
            peers.describe_silent()
    elif acts == "waits":
        time.sleep(600)
    elif acts == "dies":
        os._exit(0)
    elif acts == "leaves":
        peers.leave()
        os._exit(0)
    while True:
        time.sleep(0.2)
        peers.beat()


@pytest.fixture
def begin(monkeypatch):
    """Starts rank 1 with an action. Returns the peers of rank 0 and the process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    started, here = [], []

    def call(acts: str):
        ready = PROCESSES.Event()
        process = PROCESSES.Process(target=other, args=(store.port, acts, ready))
        process.start()
        started.append(process)
        assert ready.wait(60)
        here.append(Peers(0, 2))
        return here[0], process

    yield call
    here[0].leave()
    for process in started:
        process.kill()
        process.join()


def beats(peers: Peers, count: int = 15) -> Ending | None:
    """Returns the result of several beats, without the pause of a second between them."""
    for _ in range(count):
        ending = peers.beat()
        if ending is not None:
            return ending
        time.sleep(0.1)
    return None


def assert_missed(peers: Peers, process) -> None:
    """Asserts that rank 0 detects the end of the process."""
    process.join()
    ending = beats(peers)
    assert ending is not None
    assert ending.reason == "rank"
    assert ending.text.endswith(f"process {process.pid}): its process has ended")


@pytest.mark.slow
@pytest.mark.survival
def test_a_rank_whose_process_has_ended_is_missed_and_one_that_is_stopped_is_named(begin):
    peers, process = begin("lives")
    assert beats(peers) is None
    assert peers.describe_silent() == ""
    os.kill(process.pid, signal.SIGSTOP)
    assert beats(peers) is None  # it may continue later
    assert re.fullmatch(rf"rank 1 \(.*, process {process.pid}\): no heartbeat for .* s", peers.describe_silent())
    process.kill()
    assert_missed(peers, process)


@pytest.mark.slow
@pytest.mark.survival
@pytest.mark.parametrize("acts", ["waits", "dies"])
def test_a_rank_that_has_beaten_once_is_missed(begin, acts):
    peers, process = begin(acts)
    if acts == "waits":
        assert beats(peers) is None
        process.kill()
    assert_missed(peers, process)


@pytest.mark.slow
@pytest.mark.survival
def test_a_connection_that_breaks_while_the_rank_lives_is_made_again(begin):
    peers, process = begin("resets")
    assert beats(peers, 25) is None
    os.kill(process.pid, signal.SIGSTOP)
    assert beats(peers) is None
    process.kill()
    assert_missed(peers, process)


@pytest.mark.slow
@pytest.mark.survival
def test_a_firewall_that_refuses_connections_is_not_the_end_of_a_rank_that_stands_still(begin):
    peers, process = begin("is firewalled")
    while not peers._is_firewalled:
        assert beats(peers, 1) is None
    os.kill(process.pid, signal.SIGSTOP)
    assert beats(peers, 35) is None


class Wire:
    """A proxy of the store whose connections can be cut.

    Args:
        port: Port of the store.
    """

    def __init__(self, port: int) -> None:
        self._to, self._ends = port, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """The port of the proxy."""
        return self.listener.getsockname()[1]

    def cut(self) -> None:
        """Closes all connections; new ones are possible."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            self._ends += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    @staticmethod
    def _carry(one: socket.socket, other: socket.socket) -> None:
        with one, contextlib.suppress(OSError):  # cut
            while data := one.recv(1 << 16):
                other.sendall(data)
            other.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
@pytest.mark.survival
def test_a_store_that_is_cut_off_is_found_again_and_missed_when_it_is_gone(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    wire = Wire(store.port)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(wire.port))
    one, other = Peers(0, 2), Peers(1, 2)
    for _ in range(2):
        wire.cut()
        assert beats(one) is None
    other.announce(Ending(76, "rank", "lost, since the store is cut off"))  # cut off as well, and not told of it
    assert beats(other) is None
    other.announce(Ending(76, "rank", "heard"))
    assert beats(one) == Ending(76, "rank", "heard")

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = Peers(0, 2)
    assert beats(again) is None  # what was said is of the start before
    wire.listener.shutdown(socket.SHUT_RDWR)
    wire.listener.close()
    wire.cut()
    ending = beats(again)
    assert ending is not None
    assert "rank 0 (which holds the store)" in ending.text
    for peers in (one, other, again):
        peers.leave()


@pytest.mark.slow
@pytest.mark.survival
def test_ranks_that_look_for_silent_ones_at_once_hear_each_other(begin):
    peers, _ = begin("asks")
    assert [peers.describe_silent() for _ in range(2)] == ["", ""]


@pytest.mark.slow
@pytest.mark.survival
def test_a_rank_that_leaves_is_not_missed(begin):
    peers, process = begin("leaves")
    process.join()
    assert beats(peers) is None


@pytest.mark.slow
@pytest.mark.survival
def test_what_a_rank_announces_is_read_and_the_first_announcement_stays(begin):
    peers, _ = begin("announces")
    ending = beats(peers)
    assert ending == Ending(76, "rank", "rank 1: too many")
    peers.announce(Ending(70, "hang", "later"))
    assert peers.read_ending() == ending

"""Two ranks in processes of their own: what each knows of the other."""

import multiprocessing
import os
import re
import signal
import time

import pytest
import torch.distributed as dist

from maskgit_pl.errors import DataBudgetError
from maskgit_pl.training.peers import Ending, Peers


def other(port: int, acts: str, ready) -> None:
    """Rank 1."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    peers = Peers(1, 2)
    ready.set()
    if acts == "tells":
        peers.tell(Ending(DataBudgetError.exit_code, "rank", "rank 1: too many"))
    elif acts == "leaves":
        peers.leave()
        os._exit(0)
    while True:
        time.sleep(0.2)
        peers.beat()


@pytest.fixture
def begin(monkeypatch):
    """Starts rank 1, which does something; gives rank 0's peers and the process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    context = multiprocessing.get_context("spawn")
    started, here = [], []

    def call(acts: str):
        ready = context.Event()
        process = context.Process(target=other, args=(store.port, acts, ready))
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
    """What comes of so many beats; a watchdog takes a second for each."""
    for _ in range(count):
        ending = peers.beat()
        if ending is not None:
            return ending
        time.sleep(0.1)
    return None


@pytest.mark.slow
def test_a_rank_whose_process_has_ended_is_missed_and_one_that_is_stopped_is_named(begin):
    peers, process = begin("lives")
    assert beats(peers) is None
    assert peers.silent() == ""
    os.kill(process.pid, signal.SIGSTOP)
    assert beats(peers) is None  # it may go on
    assert re.fullmatch(rf"rank 1 \(.*, process {process.pid}\): not heard of for .* s", peers.silent())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ending = beats(peers)
    assert ending is not None
    assert ending.why == "rank"
    assert ending.text.endswith(f"process {process.pid}): its process has ended")


@pytest.mark.slow
def test_a_rank_that_takes_leave_is_not_missed(begin):
    peers, process = begin("leaves")
    process.join()
    assert beats(peers) is None


@pytest.mark.slow
def test_what_a_rank_tells_is_heard_and_the_first_word_counts(begin):
    peers, _ = begin("tells")
    ending = beats(peers)
    assert ending == Ending(76, "rank", "rank 1: too many")
    peers.tell(Ending(70, "hang", "later"))
    assert peers.told() == ending

"""The time limits of the watchdog, and its end of one process. tests/test_survival.py has those of several ranks."""

import signal
import time
from datetime import timedelta

import pytest
from lightning.pytorch import LightningModule, Trainer

from maskgit_pl import runs
from maskgit_pl.errors import INTERNAL_ERROR, PreemptedError
from maskgit_pl.runs.build import build
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.training.stopping import Watchdog
from maskgit_pl.training.strategies import build_strategy
from tests.conftest import tiny_flags
from tests.forked import Command


def test_what_has_no_median_has_more_time_from_its_start(tmp_path):
    trainer, module = Trainer(accelerator="cpu", logger=False, barebones=True), LightningModule()
    watchdog = Watchdog(tmp_path, seconds=0.05)
    assert watchdog.limit == 18 * 0.05  # set-up
    for _ in range(8):
        watchdog.on_train_batch_end(trainer, module)
        time.sleep(0.01)
    of_a_step = watchdog.limit
    assert 20 * 0.01 <= of_a_step < 18
    for begin in (
        watchdog.on_validation_start,
        watchdog.on_train_end,
        lambda *_: watchdog.on_save_checkpoint(trainer, module, {}),
        lambda *_: watchdog.on_exception(trainer, module, PreemptedError("stopped")),
    ):
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
    words = [*tiny_flags("tokenizer"), "--hang_seconds=600", "--trainer.devices=2"]
    recipe = runs.Recipe.read("tokenizer", cluster="ddp", overrides=words)
    trainer = build(plan_run(recipe, run=tmp_path / "runs" / "one", data=tiny_shards)).trainer
    assert trainer.strategy._timeout.total_seconds() > 18 * 600


WATCHED = """
import os, time
from pathlib import Path
from lightning.pytorch import Trainer
from maskgit_pl.training import stopping

stopping._GRACE_SECONDS = stopping._REPORT_SECONDS = 1.0
trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
{before}
with stopping.Watchdog(Path({folder!r}), seconds={limit} / 18).watch(trainer):
    Path({folder!r}, "begun").touch()
    time.sleep({sleep})
"""

FULL_PIPE = """
reader, writer = os.pipe()
os.set_blocking(writer, False)
while os.get_blocking(writer) is False:
    try:
        os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
os.dup2(writer, 2)
"""


@pytest.mark.slow
@pytest.mark.survival
@pytest.mark.parametrize("before", ["", FULL_PIPE], ids=["stderr", "a pipe that no process reads"])
def test_a_hang_ends_the_process_with_its_stacks(tmp_path, before):
    code = WATCHED.format(folder=str(tmp_path), limit=1, sleep=600, before=before)
    with Command(code) as process:
        _, error = process.communicate(60)
    assert process.returncode == INTERNAL_ERROR
    stacks = (tmp_path / "stacks.txt").read_text()
    assert 'File "<string>"' in stacks
    if not before:
        assert "hang, rank 0: set-up: no progress for 1 s after step 0" in error
        assert stacks in error


@pytest.mark.slow
@pytest.mark.survival
def test_time_in_which_the_process_is_stopped_does_not_count(tmp_path):
    code = WATCHED.format(folder=str(tmp_path), limit=3, sleep=5, before="")
    with Command(code) as process:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0

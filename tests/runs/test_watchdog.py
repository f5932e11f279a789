"""The time limits of the watchdog. tests/test_survival.py exceeds them in real runs."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer

from maskgit_pl import runs
from maskgit_pl.runs.build import build
from maskgit_pl.runs.plan import plan_run
from maskgit_pl.runs.watchdog import Watchdog
from maskgit_pl.training.strategies import build_strategy
from tests.conftest import flags

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

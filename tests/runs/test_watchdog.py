"""The time limits of the watchdog. tests/test_survival.py exceeds them in real runs."""

import time

from lightning.pytorch import LightningModule, Trainer

from maskgit_pl.runs.watchdog import Watchdog


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

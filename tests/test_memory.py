"""A long run does not grow: memory and open files stay constant over many steps."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback

from maskgit_pl.data import Batch
from maskgit_pl.runs.callbacks import UnreadableReport
from maskgit_pl.training.optimizers import LearningRate
from tests.short_runs import data, fit, tiny_module

STEPS, WARM_UP, EVERY = 2000, 550, 50
MOST = 1024  # kB of growth in 100 steps

pytestmark = [
    pytest.mark.slow,  # 20 s each, on a busy machine 60
    pytest.mark.survival,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]


class Gauge(Callback):
    """Counts the resident kilobytes and open files of this process and its workers, every few steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.kilobytes: dict[str, list[int]] = {}
        self.files: dict[str, list[int]] = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        step = trainer.global_step
        if step < WARM_UP or step % EVERY:
            return
        self.steps.append(step)
        workers = sorted(child.pid for child in multiprocessing.active_children())
        for name, pid in [("main", os.getpid()), *((f"worker {n}", pid) for n, pid in enumerate(workers))]:
            status = Path(f"/proc/{pid}/status").read_text()
            resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
            self.kilobytes.setdefault(name, []).append(resident)
            self.files.setdefault(name, []).append(len(os.listdir(f"/proc/{pid}/fd")))


def test_memory_and_open_files_stay_level_over_2000_steps(tiny_shards, tiny_pretrained, tmp_path):
    num_workers, gauge = 2, Gauge()
    module = tiny_module("transformer", tiny_pretrained / "tokenizer", rate=LearningRate(1e-4), global_batch=2)
    source = data(tiny_shards, global_batch=2, max_batch_per_device=2, validation_samples=8, num_workers=num_workers)
    fit(
        module, source, steps=STEPS, folder=tmp_path, every=STEPS, callbacks=[gauge, UnreadableReport(tmp_path)],
        num_sanity_val_steps=0, check_val_every_n_epoch=None, val_check_interval=500,
    )  # fmt: skip
    assert gauge.steps[-1] == STEPS
    assert len(gauge.kilobytes) >= 1 + num_workers
    for name, kilobytes in gauge.kilobytes.items():
        slope = 100 * np.polyfit(gauge.steps[-len(kilobytes) :], kilobytes, 1)[0]
        files = gauge.files[name]
        print(f"{num_workers} workers, {name}: {slope:+.0f} kB in 100 steps, {min(files)} to {max(files)} open files")
        assert slope < MOST, kilobytes
        half = len(files) // 2
        # Tensors between processes are open files too: one batch more or less.
        assert max(files[half:]) <= max(files[:half]) + len(Batch._fields), files

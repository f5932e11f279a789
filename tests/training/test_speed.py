"""The figures of a run while it trains: speed, waiting for data, memory and time."""

from types import SimpleNamespace

import pytest
import torch

from maskgit_pl.training import speed
from maskgit_pl.training.speed import SpeedMonitor, read_training_time

MODULE = SimpleNamespace(device=torch.device("cpu"))


class Records:
    """A logger that keeps its values."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))


@pytest.fixture
def trainer() -> SimpleNamespace:
    return SimpleNamespace(
        global_step=0, log_every_n_steps=2, world_size=3, is_global_zero=True, sanity_checking=False,
        loggers=[Records()],
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now.seconds)
    return now


def train(monitor: SpeedMonitor, trainer: SimpleNamespace, clock: SimpleNamespace, *, validate_after: int = 0) -> None:
    """Trains four steps of two micro-batches with five images: a second of waiting, and three of computing."""
    monitor.on_train_start(trainer, MODULE)
    for micro_batch in range(8):
        clock.seconds += 1
        monitor.on_train_batch_start(trainer, MODULE, SimpleNamespace(index=range(5)), micro_batch)
        clock.seconds += 3
        trainer.global_step += micro_batch % 2
        monitor.on_train_batch_end(trainer, MODULE)
        if micro_batch + 1 == validate_after:
            monitor.on_validation_start(trainer, MODULE)
            clock.seconds += 1000
            monitor.on_validation_end(trainer, MODULE)


@pytest.mark.parametrize("validate_after", [0, 1, 4])
def test_figures_are_of_the_steps_since_the_last_time_without_validations(trainer, clock, validate_after, tmp_path):
    monitor = SpeedMonitor(tmp_path)
    train(monitor, trainer, clock, validate_after=validate_after)
    (logger,) = trainer.loggers
    assert [step for step, _ in logger.rows] == [2, 4]
    for _, values in logger.rows:
        assert values["speed/images_per_second"] == pytest.approx(3 * 20 / 16)  # 3 ranks
        assert values["speed/data_wait"] == pytest.approx(0.25)
        assert values["speed/peak_memory_gb"] > 0.01


def test_the_time_of_all_steps_continues_over_restarts_without_validations(trainer, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(speed.time, "process_time", lambda: 2 * clock.seconds)  # two busy threads
    for steps in (4, 8):
        monitor = SpeedMonitor(tmp_path)
        train(monitor, trainer, clock, validate_after=4)
        clock.seconds += 4
        monitor.on_train_end(trainer, MODULE)
        time = read_training_time(tmp_path)
        assert time.steps == steps
        assert time.cost == 2 * 9 * steps

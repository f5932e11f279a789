"""Health is measured as independent formulas say, survives a resume, and an alarm comes once and names the way out."""

import logging

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from maskgit_pl.training.health import (
    CodeHistory,
    HealthMonitor,
    attainable_codes,
    find_problems,
    grace_steps,
)
from tests.short_runs import data, fit, tiny_module

pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:.*smaller than the logging")


@pytest.fixture
def strict(monkeypatch):
    """Reports any usage below all codes, so that a healthy network gives alarms."""
    for name, value in (("LEAST_USAGE", 1.0), ("LEAST_PERPLEXITY", 1.0), ("PATIENCE", 2), ("GRACE", (2, 2))):
        monkeypatch.setattr(f"maskgit_pl.training.health.{name}", value)


@pytest.fixture
def train(tiny_shards):
    """Trains a tokenizer with a CSV log and checkpoints in the folder; returns the monitor."""

    def call(folder, *, steps, resume=None, log_every=1, every=100):
        monitor = HealthMonitor()
        fit(
            tiny_module("tokenizer"), data(tiny_shards), steps=steps, folder=folder / "checkpoints", every=every,
            resume=resume, callbacks=[monitor], logger=CSVLogger(folder, "", ""), num_sanity_val_steps=0,
            log_every_n_steps=log_every,
        )  # fmt: skip
        return monitor

    return call


def logged(folder):
    """The rows of a CSV log by step, without empty cells."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    names, rows = lines[0].split(","), {}
    for line in lines[1:]:
        row = {name: float(cell) for name, cell in zip(names, line.split(","), strict=True) if cell}
        rows.setdefault(int(row.pop("step")), {}).update(row)
    return rows


def test_usage_perplexity_and_dead_codes_by_hand():
    history = CodeHistory(4)
    history.add(torch.tensor([[0, 0], [1, 1]]), step=1)
    history.add(torch.tensor([[0, 2], [0, 2]]), step=5)
    found, num_tokens = history.measure(8, dead_after=4)
    assert num_tokens == 8
    shares = torch.tensor([4, 2, 2]) / 8
    assert found == pytest.approx({
        "codebook_usage": 3 / 4,
        "perplexity": float((-(shares * shares.log()).sum()).exp()),
        "dead_codes": 2,  # code 1 for 7 steps, code 3 since the beginning
    })  # fmt: skip


def test_a_resumed_run_measures_as_an_uninterrupted_one(train, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight, steps=8, log_every=2)
    train(resumed, steps=5, log_every=2, every=5)
    train(resumed, steps=8, log_every=2, resume=resumed / "checkpoints" / "step-00000005")
    names = [name for name in logged(straight)[8] if name.startswith("train/")]
    assert len(names) >= 3
    for step in (6, 8):
        assert [logged(resumed)[step][name] for name in names] == [logged(straight)[step][name] for name in names]


@pytest.mark.usefixtures("strict")
def test_an_alarm_is_reported_once_after_grace_and_patience(train, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        monitor = train(tmp_path, steps=8)
    warnings = [record.getMessage() for record in caplog.records if "health:" in record.getMessage()]
    assert len(warnings) == len(monitor.reported) >= 1
    assert warnings[0].startswith("step 4: ")  # 2 of grace, then 2 measurements
    assert all("model.network.quantizer" in line and "Training continues" in line for line in warnings)


def problems(metrics, *, codebook_size=16, num_tokens=10_000):
    return list(find_problems(metrics, codebook_size=codebook_size, num_tokens=num_tokens))


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ({"codebook_usage": 0.29}, "codebook_usage"),
        ({"perplexity": 1.59}, "perplexity"),
        ({"discriminator_accuracy": 0.99}, "discriminator_wins"),
        ({"discriminator_accuracy": 0.29}, "discriminator_fails"),
    ],
)
def test_each_range_has_a_cause_and_advice(metrics, cause):
    (found,) = problems(metrics)
    assert found.cause == cause
    assert found.advice
    assert all("model." in each for each in found.advice)


def test_values_inside_of_the_ranges_are_no_problem():
    healthy = {"codebook_usage": 0.3, "perplexity": 1.6, "discriminator_accuracy": 0.5}
    assert problems(healthy) == problems({}) == []


def test_few_tokens_cannot_use_many_codes():
    sizes = {"codebook_size": 2**18, "num_tokens": 100}
    assert attainable_codes(2**18, 100) == pytest.approx(100, rel=1e-3)
    assert problems({"codebook_usage": 100 / 2**18, "perplexity": 100.0}, **sizes) == []
    assert len(problems({"codebook_usage": 20 / 2**18, "perplexity": 9.0}, **sizes)) == 2


def test_the_grace_period_follows_the_length_of_the_run():
    assert [grace_steps(steps) for steps in (100, 20_000, 10**6)] == [100, 1000, 5000]

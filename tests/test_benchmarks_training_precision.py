"""The benchmark of bf16-mixed at its smallest networks: a row for each, and rounds in turn."""

import pytest

from tests.benchmark_scripts import benchmark_script


@pytest.fixture
def training_precision():
    with benchmark_script("training_precision") as script:
        yield script


@pytest.mark.slow
def test_each_network_has_a_row(training_precision, capsys, monkeypatch):
    monkeypatch.setattr(training_precision, "_STAGE_1", ((16, 16, 1),))
    monkeypatch.setattr(training_precision, "_STAGE_2", ((64,), ((4, 1),)))
    training_precision.main(["--threads", "1", "--repeats", "1"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, *found = [[cell.strip() for cell in row] for row in rows]
    assert head == ["stage", "width", "batch", "fp32, s", "bf16, s", "bf16 / fp32"]
    assert [row[:3] for row in found] == [["1", "16", "1 of 16 x 16 pixels"], ["2", "64", "1 of 4 x 4 tokens"]]
    assert all(float(row[-1]) > 0 for row in found)


def test_the_fraction_is_the_median_over_the_rounds_without_the_first(training_precision):
    seconds = iter([100.0, 1.0, 2.0, 1.0, 4.0, 3.0, 5.0, 1.0])  # fp32 and bf16 in turn

    def step(watch):
        watch.parts["step"] = next(seconds)

    row = training_precision.compare({"fp32": step, "bf16": step}, repeats=3, clock="wall")
    assert row == {"fp32, s": "4.000", "bf16, s": "1.000", "bf16 / fp32": "0.50"}

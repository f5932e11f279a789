"""The benchmark of health monitoring at tiny sizes: it runs, each part does its work, and the table is whole."""

import pytest
import torch

from tests.benchmark_scripts import benchmark_script


@pytest.fixture(scope="module")
def script():
    with benchmark_script("health") as script:
        yield script


@pytest.fixture
def task(script):
    return script.Task(
        batch=2, image_size=16, base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4,
        codebook_size=16, code_dim=4, discriminator=1 / 64,
    )  # fmt: skip


@pytest.mark.slow
def test_each_part_does_its_work(script, task, tmp_path):
    made, watch = script.Contenders(task, tmp_path), script.Stopwatch()
    before = [weight.detach().clone() for weight in made.module.network.parameters()]
    made.step(watch)
    assert not all(map(torch.equal, before, made.module.network.parameters()))
    tokens = 2 * made.module.grid[0] * made.module.grid[1]
    assert made.monitor.history.counts.sum() == tokens  # the hook of the step
    made.count(watch)
    assert made.monitor.history.counts.sum() == 2 * tokens
    made.measure(watch)
    assert made.monitor.history.counts.sum() == 0  # measured, and counted from the beginning
    made.read_clocks(watch)
    assert made.speed._images == 2
    made.measure_speed(watch)
    assert made.speed._images == 0
    made.norms_of_weights(watch)
    assert all(weight.grad is None for weight in made.module.parameters())


@pytest.mark.slow
def test_a_measurement_has_a_row_for_each_part(script, task):
    step, parts = script.measure(task, repeats=2)
    assert step > 0
    assert [part.every for part in parts] == [1, script.LOG_EVERY, 1, script.LOG_EVERY, 1, 1]
    assert all(part.seconds >= 0 for part in parts)
    table = script.format_table([part.row(step) for part in parts]).splitlines()
    assert len({line.count("|") for line in table}) == 1

"""Benchmarks at tiny sizes: they run, their tables are complete, and they compare the same work."""

import dataclasses
import json
from functools import partial

import pytest
import torch

from tests.benchmark_scripts import benchmark_script

OURS = ["ours", "naive"]


@pytest.fixture(scope="module")
def stage2_step():
    with benchmark_script("stage2_step") as script:
        yield script


@pytest.fixture(scope="module")
def task(stage2_step):
    return stage2_step.Task(
        batch=3, depth=2, embed_dim=32, mlp_dim=64, num_heads=4, grid=(4, 4), codebook_size=16, num_classes=3
    )


def ours_and_naive(stage2_step, task):
    """Loss and gradients of the first step of both."""
    gradients = []
    for name in OURS:
        step = stage2_step.build(name, task, "fp32")
        network = step.module.transformer if name == "ours" else step.network
        found = {}
        step.optimizer.register_step_post_hook(
            lambda *_, network=network, found=found: found.update(
                {key: weight.grad.clone() for key, weight in network.named_parameters()}
            )
        )
        gradients.append((step(stage2_step.Stopwatch()), found))
    return gradients


def test_ours_and_the_naive_step_have_the_same_loss_and_gradients(stage2_step, task):
    (our_loss, ours), (naive_loss, naive) = ours_and_naive(stage2_step, task)
    torch.testing.assert_close(our_loss, naive_loss, rtol=1e-6, atol=1e-6)
    ours = stage2_step.rename_weights(ours)
    assert ours.keys() == naive.keys()
    for name, gradient in naive.items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_counted_work_is_that_of_the_formula(stage2_step, task):
    """The formula: 6 FLOPs per weight of a linear layer and row; 3 x 4 S S D for attention."""
    rows, masked, width = 3 * 17, int(task.mask().sum()), task.embed_dim
    assert 0 < masked < 3 * 16
    vocabulary = task.network.vocabulary_size
    attention = 3 * 4 * 17 * 17 * width * 3 * task.depth
    projections, feed_forward = 3 * width**2, width**2 + 2 * width * task.mlp_dim
    head = width**2 + width * vocabulary
    block = 6 * rows * (projections + feed_forward)
    _, naive, *_ = stage2_step.warm_up(stage2_step.build("naive", task, "fp32"))
    assert naive == attention + task.depth * block + 6 * rows * head
    _, ours, kernels, syncs = stage2_step.warm_up(stage2_step.build("ours", task, "fp32"))
    assert kernels > 100
    assert syncs == 0
    last = 6 * rows * projections + 6 * masked * feed_forward
    assert ours == attention + (task.depth - 1) * block + last + 6 * masked * head


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measurement_has_a_whole_row_for_each_contender(stage2_step, task, precision):
    peaks = {name: stage2_step.measure_memory(name, task, precision, threads=1) for name in OURS}
    measured = stage2_step.measure(task, precision, peaks=peaks, repeats=3, product_size=64)
    assert [one.name for one in measured] == OURS
    assert measured[0].loss == pytest.approx(measured[1].loss, rel=1e-2 if precision == "bf16" else 1e-6)
    assert measured[0].ratio == 1
    assert measured[0].floor == measured[1].floor == measured[0].flops < measured[1].flops
    for one in measured:
        assert len(one.seconds) == 3
        assert list(one.parts) == ["forward", "backward", "clip", "optimiser", "average"]
        assert [sum(each) for each in zip(*one.parts.values(), strict=True)] == pytest.approx(one.seconds)
        assert one.memory is None or one.memory >= 0  # what else this process has held shows in it
        assert json.loads(json.dumps(dataclasses.asdict(one)))["peak"] > 0
    table = stage2_step.format_table([one.row() for one in measured]).splitlines()
    assert len(table) == 2 + len(OURS)
    assert len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table}) == 1


@pytest.mark.slow
def test_peak_memory_is_that_of_what_runs(stage2_step):
    peak = stage2_step.run_in_fresh_process(stage2_step.measure_peak_memory, partial(torch.ones, 50_000_000))
    assert peak is None or 150e6 < peak < 260e6  # the system may take pages of libraries back in the meantime
